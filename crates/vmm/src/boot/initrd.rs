//! The initial RAM disk: files and bytes put together, each part padded to 4 bytes so that
//! the kernel finds the cpio archive that begins the next.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use crate::config::InitrdPart;
use crate::error::Error;

const ALIGNMENT: usize = 4;

/// All parts in order. Files that cannot fit into `memory` bytes are not read at all.
pub(super) fn read(parts: &[InitrdPart], memory: u64) -> Result<Vec<u8>, Error> {
    let mut size = 0;
    for part in parts {
        size += match part {
            InitrdPart::File(path) => fs::metadata(path).map_err(error(path))?.len(),
            InitrdPart::Bytes(bytes) => bytes.len() as u64,
        };
    }
    if size > memory {
        return Err(Error::InitrdTooLarge { size, room: memory });
    }
    let mut initrd = Vec::with_capacity(size as usize + parts.len() * ALIGNMENT);
    for part in parts {
        match part {
            InitrdPart::File(path) => {
                read_file(path, memory, &mut initrd).map_err(error(path))?;
            }
            InitrdPart::Bytes(bytes) => initrd.extend_from_slice(bytes),
        }
        let size = initrd.len() as u64;
        if size > memory {
            return Err(Error::InitrdTooLarge { size, room: memory });
        }
        initrd.resize(initrd.len().next_multiple_of(ALIGNMENT), 0);
    }
    Ok(initrd)
}

/// Appends a file, which may be a pipe and have no size, and no more than can fit.
fn read_file(path: &Path, memory: u64, initrd: &mut Vec<u8>) -> io::Result<usize> {
    let limit = (memory + 1).saturating_sub(initrd.len() as u64);
    File::open(path)?.take(limit).read_to_end(initrd)
}

fn error(path: &Path) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Read {
        what: "initial RAM disk",
        path: path.to_owned(),
        source,
    }
}
