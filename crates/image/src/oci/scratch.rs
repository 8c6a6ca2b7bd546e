//! The disk for what a machine writes over the layers of its image.
//!
//! It is made anew for each machine: mke2fs takes 10 ms for 256 GiB and writes 7 MB of it, so
//! that keeping one to copy would gain nothing.

use std::env;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::oci::error::Error;
use crate::oci::store::Store;

/// Makes an ext4 file system of `size` bytes in the file `path`, unless that is there. It is
/// there wholly or not at all.
pub fn scratch_at(path: &Path, size: u64) -> Result<(), Error> {
    if path.exists() {
        return Ok(());
    }
    let failed = || Error::io("create a disk at", path);
    let directory = path.parent().unwrap_or(Path::new("."));
    let file = tempfile::NamedTempFile::new_in(directory).map_err(failed())?;
    file.as_file().set_len(size).map_err(failed())?;
    format(file.as_file(), true)?;
    file.as_file().sync_all().map_err(failed())?;
    file.persist(path).map_err(|error| failed()(error.error))?;
    Ok(())
}

/// An empty ext4 file system of `size` bytes in a file without a name, which goes with its last
/// descriptor. It takes room as it is written to, where the store is.
pub fn scratch(store: &Store, size: u64) -> Result<File, Error> {
    let directory = store.partial()?;
    let file = tempfile::tempfile_in(&directory)
        .and_then(|file| file.set_len(size).map(|()| file))
        .map_err(Error::io("create a scratch disk in", &directory))?;
    format(&file, false)?;
    Ok(file)
}

/// Makes a file an ext4 file system. One that does not last needs nothing that outlives a crash.
fn format(file: &File, lasting: bool) -> Result<(), Error> {
    let failed = |reason: String| Error::Scratch { reason };
    let program = find("mke2fs").ok_or_else(|| failed("there is no mke2fs here".to_owned()))?;
    let journal = if lasting {
        "has_journal"
    } else {
        "^has_journal"
    };
    let own = file
        .try_clone()
        .map_err(|error| failed(error.to_string()))?;
    let made = Command::new(program)
        .args(["-q", "-F", "-t", "ext4", "-m", "0"])
        .args(["-O", journal, "-E"])
        .arg("lazy_itable_init=1,nodiscard,root_owner=0:0")
        .arg("/proc/self/fd/0")
        .stdin(Stdio::from(own))
        .output()
        .map_err(|error| failed(error.to_string()))?;
    if !made.status.success() {
        let said = String::from_utf8_lossy(&made.stderr);
        return Err(failed(said.trim().to_owned()));
    }
    Ok(())
}

/// Where a program is, also among the administrators'.
fn find(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|directory| directory.join(name))
        .find(|file| file.is_file())
}
