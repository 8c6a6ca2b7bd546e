//! Files of the registry: JSON with a version, there wholly or not at all.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Version of all files that this crate writes.
const VERSION: u64 = 1;

/// Rights of files: their owner's.
const FILE_MODE: u32 = 0o600;
/// Rights of directories: their owner's.
const DIRECTORY_MODE: u32 = 0o700;

#[derive(Serialize, Deserialize)]
struct Versioned<T> {
    version: u64,
    #[serde(flatten)]
    content: T,
}

#[derive(Deserialize)]
struct Version {
    version: u64,
}

/// A line of JSON.
pub(crate) fn to_text<T: Serialize>(path: &Path, content: &T) -> Result<Vec<u8>> {
    let versioned = Versioned {
        version: VERSION,
        content,
    };
    let mut text = serde_json::to_vec(&versioned)
        .map_err(|error| Error::io("write the file", path)(io::Error::from(error)))?;
    text.push(b'\n');
    Ok(text)
}

/// What a file has to outlive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outlives {
    /// A power failure.
    Power,
    /// The process that writes it: what belongs to a machine that vanishes with that one.
    Process,
}

/// Writes a file that is there wholly or not at all. Nobody else writes it meanwhile.
pub(crate) fn write_whole(path: &Path, text: &[u8], outlives: Outlives) -> Result<File> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let partial = path.with_file_name(name);
    let mut file = create(&partial)?;
    let lasts = outlives == Outlives::Power;
    file.write_all(text)
        .and_then(|()| if lasts { file.sync_all() } else { Ok(()) })
        .map_err(Error::io("write the file", &partial))?;
    fs::rename(&partial, path).map_err(Error::io("rename a file to", path))?;
    if lasts {
        sync_directory(path.parent().unwrap_or(Path::new(".")))?;
    }
    Ok(file)
}

/// Creates a file, or empties it.
pub(crate) fn create(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true);
    options
        .mode(FILE_MODE)
        .open(path)
        .map_err(Error::io("create the file", path))
}

/// Opens a file to read and write it, and creates it if it is not there.
pub(crate) fn open_or_create(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    options
        .mode(FILE_MODE)
        .open(path)
        .map_err(Error::io("open the file", path))
}

/// Reads what [`write_whole`] wrote of [`to_text`].
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = fs::read(path).map_err(Error::io("read the file", path))?;
    parse(path, &text)
}

/// The same of a file that need not be there.
pub(crate) fn read_if_there<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    match read(path) {
        Err(error) if error.is_not_found() => Ok(None),
        other => other.map(Some),
    }
}

/// Parses the text of the file `path`.
pub(crate) fn parse<T: DeserializeOwned>(path: &Path, text: &[u8]) -> Result<T> {
    let damaged = |error: serde_json::Error| Error::damaged(path, error.to_string());
    let Version { version } = serde_json::from_slice(text).map_err(damaged)?;
    if version > VERSION {
        let path = path.to_owned();
        return Err(Error::Newer { path, version });
    }
    if version < VERSION {
        return Err(Error::damaged(
            path,
            format!("there is no version {version}"),
        ));
    }
    let versioned: Versioned<T> = serde_json::from_slice(text).map_err(damaged)?;
    Ok(versioned.content)
}

/// Creates a directory for its owner alone, and those above it.
pub(crate) fn create_directory(path: &Path) -> Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(DIRECTORY_MODE)
        .create(path)
        .map_err(Error::io("create the directory", path))
}

/// Takes a directory from all but its owner.
pub(crate) fn make_private(path: &Path) -> Result<()> {
    let metadata = fs::metadata(path).map_err(Error::io("look at", path))?;
    let others = metadata.permissions().mode() & !DIRECTORY_MODE & 0o777;
    if others == 0 {
        return Ok(());
    }
    fs::set_permissions(path, Permissions::from_mode(DIRECTORY_MODE))
        .map_err(Error::io("change the permissions of", path))
}

/// Makes the names in a directory as lasting as the files.
pub(crate) fn sync_directory(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(Error::io("sync the directory", path))
}

/// The entries of a directory, by name; none if it is not there.
pub(crate) fn entries(path: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("read the directory", path)(error)),
    };
    let paths = entries.map(|entry| Ok(entry?.path()));
    let paths: io::Result<Vec<PathBuf>> = paths.collect();
    let mut paths = paths.map_err(Error::io("read the directory", path))?;
    paths.sort();
    Ok(paths)
}
