//! The initial RAM disk: files and bytes put together, each part padded to 4 bytes so that
//! the kernel finds the cpio archive that begins the next.

use std::fs;
use std::io;
use std::path::Path;

use super::files;
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
                files::append(path, memory, &mut initrd).map_err(error(path))?;
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

fn error(path: &Path) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Read {
        what: "initial RAM disk",
        path: path.to_owned(),
        source,
    }
}
