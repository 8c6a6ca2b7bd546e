//! The record beside a built appliance: what it was made from and what came out.
//!
//! Written once by `appliance`, read at every run by `cache` to see whether the files are
//! still the ones that were built.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Name of the manifest in the appliance's directory.
pub(crate) const FILE_NAME: &str = "manifest.json";

/// What an appliance was made from and what came out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Fingerprint of this crate's way to build; see the cache's layout.
    pub recipe: String,
    /// Version of Strata that built it.
    pub built_by: String,
    /// The kernel's release, as `uname -r` gives it.
    pub kernel_release: String,
    /// The packages it was made from.
    pub sources: Vec<SourceRecord>,
    /// The files that came out.
    pub files: Vec<FileRecord>,
}

/// One Debian package.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceRecord {
    /// Package name.
    pub package: String,
    /// Debian version.
    pub version: String,
    /// Size of the package file, bytes.
    pub size: u64,
    /// SHA-256 of the package file, lower-case hex.
    pub sha256: String,
}

/// One file of the appliance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// File name inside the appliance's directory.
    pub name: String,
    /// Size in bytes.
    pub size: u64,
    /// Time of last change, nanoseconds since 1970.
    pub modified: u64,
    /// SHA-256 of the contents, lower-case hex.
    pub sha256: String,
}

impl FileRecord {
    /// Records the file as it is now.
    pub(crate) fn of(directory: &Path, name: &str) -> io::Result<Self> {
        let path = directory.join(name);
        let (size, modified) = size_and_time(&path)?;
        Ok(Self {
            name: name.to_owned(),
            size,
            modified,
            sha256: sha256_of(&path)?,
        })
    }

    /// Says what is wrong with the file now, if anything is. Size and time alone settle it
    /// where both are as recorded; else the contents are read.
    pub(crate) fn defect(&self, directory: &Path) -> Option<String> {
        let path = directory.join(&self.name);
        let (size, modified) = match size_and_time(&path) {
            Ok(found) => found,
            Err(error) => return Some(format!("{}: {error}", self.name)),
        };
        if size != self.size {
            return Some(format!(
                "{} has {size} bytes where {} were written",
                self.name, self.size
            ));
        }
        if modified == self.modified {
            return None;
        }
        match sha256_of(&path) {
            Ok(sum) if sum == self.sha256 => None,
            Ok(_) => Some(format!("the contents of {} have changed", self.name)),
            Err(error) => Some(format!("{}: {error}", self.name)),
        }
    }
}

impl Manifest {
    /// Reads the manifest in `directory`; `None` where there is none.
    pub(crate) fn load(directory: &Path) -> Option<Result<Self, String>> {
        match fs::read(directory.join(FILE_NAME)) {
            Ok(text) => Some(
                serde_json::from_slice(&text).map_err(|e| format!("{FILE_NAME} is damaged: {e}")),
            ),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => Some(Err(format!("{FILE_NAME}: {error}"))),
        }
    }

    /// Writes the manifest into `directory`.
    pub(crate) fn save(&self, directory: &Path) -> io::Result<()> {
        let mut text = serde_json::to_vec_pretty(self)?;
        text.push(b'\n');
        fs::write(directory.join(FILE_NAME), text)
    }
}

fn size_and_time(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::metadata(path)?;
    if !metadata.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let time = metadata.modified()?.duration_since(UNIX_EPOCH);
    Ok((metadata.len(), time.map_or(0, |t| t.as_nanos() as u64)))
}

/// SHA-256 of a file, lower-case hex.
pub(crate) fn sha256_of(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 18];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(&hash.finalize())),
            count => hash.update(&buffer[..count]),
        }
    }
}

/// Lower-case hex digits of `bytes`.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sha256_is_the_standard_one() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("f"), "abc").unwrap();
        assert_eq!(
            sha256_of(&dir.path().join("f")).unwrap(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    #[test]
    fn an_untouched_file_has_no_defect() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("f"), "contents").unwrap();
        let record = FileRecord::of(dir.path(), "f").unwrap();
        assert_eq!(record.defect(dir.path()), None);
    }

    #[test]
    fn a_file_that_only_got_a_new_time_has_no_defect() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("f"), "contents").unwrap();
        let record = FileRecord {
            modified: 1,
            ..FileRecord::of(dir.path(), "f").unwrap()
        };
        assert_eq!(record.defect(dir.path()), None);
    }

    #[test]
    fn missing_short_and_changed_files_are_defects() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(&path, "contents").unwrap();
        let record = FileRecord {
            modified: 1,
            ..FileRecord::of(dir.path(), "f").unwrap()
        };

        fs::write(&path, "Contents").unwrap();
        assert!(record.defect(dir.path()).unwrap().contains("changed"));
        fs::write(&path, "cont").unwrap();
        assert!(record.defect(dir.path()).unwrap().contains("4 bytes"));
        fs::remove_file(&path).unwrap();
        assert!(record.defect(dir.path()).is_some());
    }

    #[test]
    fn a_damaged_manifest_is_told_from_a_missing_one() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Manifest::load(dir.path()).is_none());
        fs::write(dir.path().join(FILE_NAME), "{\"recipe\": ").unwrap();
        assert!(Manifest::load(dir.path()).unwrap().is_err());
    }
}
