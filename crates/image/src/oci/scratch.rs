//! The disk for what a machine writes over the layers of its image: an empty ext4 file system.
//!
//! ```text
//! mke2fs ──(make, once for each size)──> scratch/<size>-<recipe>, the template
//!                                             │
//!                                  (clone, for each machine) ──> the machine's disk
//! ```
//!
//! A template is the file system in a sparse file, and behind it the digest of what is in it. It
//! is there wholly or not at all; one that is not what its digest says is made anew. Of two
//! processes that make the same one at once each makes a whole one, and either will do.
//!
//! Clones of a template have its UUID and its hash seed. That is no harm: a guest sees no scratch
//! disk but its own, and mounts it by its device.

use std::env;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{SeekFrom, ioctl_ficlone, seek};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use crate::manifest::hex;
use crate::oci::digest::Digest;
use crate::oci::error::Error;
use crate::oci::store::{self, Store};

/// Version of what a template's file is, beside the file system in it.
const FORMAT: u32 = 1;

/// Length of the digest at the end of a template, hexadecimal digits.
const DIGEST_LENGTH: usize = 64;

/// What is hashed and copied at once, bytes.
const CHUNK: usize = 256 << 10;

/// What is hashed unless it is zero, bytes: a block of ext4.
const BLOCK: usize = 4096;

/// Makes an ext4 file system of `size` bytes in the file `path`, unless that is there. It is
/// there wholly or not at all. Hold a [`Lease`](super::Lease) on the store meanwhile.
pub fn scratch_at(store: &Store, path: &Path, size: u64) -> Result<(), Error> {
    if path.exists() {
        return Ok(());
    }
    let failed = || Error::io("create a disk at", path);
    let directory = path.parent().unwrap_or(Path::new("."));
    let file = tempfile::NamedTempFile::new_in(directory).map_err(failed())?;
    let lasting = true;
    Recipe { size, lasting }.fill(store, file.as_file())?;
    file.as_file().sync_all().map_err(failed())?;
    file.persist(path).map_err(|error| failed()(error.error))?;
    Ok(())
}

/// An empty ext4 file system of `size` bytes in a file without a name, which goes with its last
/// descriptor. It takes room as it is written to, where the store is. Hold a
/// [`Lease`](super::Lease) on that meanwhile.
pub fn scratch(store: &Store, size: u64) -> Result<File, Error> {
    let directory = store.partial()?;
    let file = tempfile::tempfile_in(&directory)
        .map_err(Error::io("create a scratch disk in", &directory))?;
    let lasting = false;
    Recipe { size, lasting }.fill(store, &file)?;
    Ok(file)
}

/// Whether this version of Strata would use a template of this name.
pub(crate) fn is_wanted(name: &str) -> bool {
    let size = name.split('-').next().and_then(|size| size.parse().ok());
    size.is_some_and(|size| {
        [false, true]
            .into_iter()
            .any(|lasting| Recipe { size, lasting }.name() == name)
    })
}

/// Which file system is wanted.
#[derive(Debug, Clone, Copy)]
struct Recipe {
    /// Bytes.
    size: u64,
    /// One that does not last needs nothing that outlives a crash.
    lasting: bool,
}

impl Recipe {
    /// What mke2fs is told, so that it writes little: two copies of the superblock, not many; no
    /// room to grow, which takes 4 MiB; and nothing where the file has zeros already.
    fn arguments(self) -> [&'static str; 9] {
        let features = if self.lasting {
            "has_journal,^resize_inode,sparse_super2"
        } else {
            "^has_journal,^resize_inode,sparse_super2"
        };
        let extended = "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0";
        [
            "-F", "-t", "ext4", "-m", "0", "-O", features, "-E", extended,
        ]
    }

    /// What its template is called: another way to make it gives another name.
    fn name(self) -> String {
        let way = format!("{FORMAT} {}", self.arguments().join(" "));
        let way = Digest::of(way.as_bytes()).hex();
        format!("{}-{}", self.size, &way[..16])
    }

    /// Makes the empty file `target` such a file system.
    fn fill(self, store: &Store, target: &File) -> Result<(), Error> {
        self.fill_by(store, target, |file| self.format(file))
    }

    fn fill_by(
        self,
        store: &Store,
        target: &File,
        format: impl FnOnce(&File) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let path = store.templates()?.join(self.name());
        match File::open(&path) {
            Ok(template) => match self.clone_to(&template, target) {
                Ok(true) => return Ok(()),
                Ok(false) => tracing::warn!(template = %path.display(),
                    "a template for scratch disks is damaged and is made anew"),
                Err(error) => return Err(Error::io("copy the file", &path)(error)),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io("open the file", &path)(error)),
        }
        let template = self.make(store, &path, format)?;
        match self.clone_to(&template, target) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Error::Scratch {
                reason: format!("{} does not keep what is written", path.display()),
            }),
            Err(error) => Err(Error::io("copy the file", &path)(error)),
        }
    }

    /// Makes the template `path`.
    fn make(
        self,
        store: &Store,
        path: &Path,
        format: impl FnOnce(&File) -> Result<(), Error>,
    ) -> Result<File, Error> {
        let partial = store.partial()?;
        let failed = || Error::io("make the file", path);
        let file = tempfile::NamedTempFile::new_in(&partial).map_err(failed())?;
        file.as_file().set_len(self.size).map_err(failed())?;
        format(file.as_file())?;
        let digest = self.pass(file.as_file(), |_, _| Ok(())).map_err(failed())?;
        file.as_file()
            .write_all_at(digest.as_bytes(), self.size)
            .and_then(|()| file.as_file().sync_all())
            .map_err(failed())?;
        let file = file.persist(path).map_err(|error| failed()(error.error))?;
        store::sync_directory(path)?;
        Ok(file)
    }

    /// Makes a file such a file system.
    fn format(self, file: &File) -> Result<(), Error> {
        let failed = |reason: String| Error::Scratch { reason };
        let program = find("mke2fs").ok_or_else(|| failed("there is no mke2fs here".to_owned()))?;
        let own = file
            .try_clone()
            .map_err(|error| failed(error.to_string()))?;
        let made = Command::new(program)
            .arg("-q")
            .args(self.arguments())
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

    /// Gives `target` the contents of a template, and says whether they are what they were made
    /// to be. They are shared with it where the host's file system can do that, else copied.
    fn clone_to(self, template: &File, target: &File) -> io::Result<bool> {
        target.set_len(0)?;
        let mut digest = [0; DIGEST_LENGTH];
        let length = self.size.saturating_add(DIGEST_LENGTH as u64);
        if template.metadata()?.len() != length {
            return Ok(false);
        }
        template.read_exact_at(&mut digest, self.size)?;
        let shared = ioctl_ficlone(target, template).is_ok();
        target.set_len(self.size)?;
        let found = self.pass(template, |data, at| {
            if shared {
                return Ok(());
            }
            target.write_all_at(data, at)
        })?;
        Ok(found.as_bytes() == digest)
    }

    /// Has `take` take what is in the file system in `file`, holes left out, with its offset; and
    /// says its digest: of the offset and the contents of each block that is not zero, so that it
    /// stays the same wherever a host's file system has its holes.
    fn pass(
        self,
        file: &File,
        mut take: impl FnMut(&[u8], u64) -> io::Result<()>,
    ) -> io::Result<String> {
        let mut hash = Sha256::new();
        let mut buffer = vec![0; CHUNK];
        let mut from = 0;
        while let Some(data) = data_after(file, from, self.size)? {
            from = data.end;
            let mut at = data.start;
            while at < data.end {
                let count = (data.end - at).min(CHUNK as u64) as usize;
                let chunk = &mut buffer[..count];
                file.read_exact_at(chunk, at)?;
                take(chunk, at)?;
                for block in chunk.chunks(BLOCK) {
                    if block.iter().any(|byte| *byte != 0) {
                        hash.update(at.to_le_bytes());
                        hash.update(block);
                    }
                    at += block.len() as u64;
                }
            }
        }
        Ok(hex(&hash.finalize()))
    }
}

/// Where the next data of a sparse file are, from `from` to less than `end`: whole blocks, as far
/// as there are.
fn data_after(file: &File, from: u64, end: u64) -> io::Result<Option<Range<u64>>> {
    let block = BLOCK as u64;
    if from >= end {
        return Ok(None);
    }
    let start = match seek(file, SeekFrom::Data(from)) {
        Ok(start) => start / block * block,
        Err(Errno::NXIO) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let hole = seek(file, SeekFrom::Hole(start.max(from)))?;
    let range = start.max(from)..hole.next_multiple_of(block).min(end);
    Ok((!range.is_empty()).then_some(range))
}

/// Where a program is, also among the administrators'.
fn find(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|directory| directory.join(name))
        .find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt;
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;

    const SMALL: u64 = 64 << 20;
    const USUAL: u64 = 16 << 30;

    fn store() -> (tempfile::TempDir, Store) {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::at(directory.path());
        (directory, store)
    }

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.collect()
    }

    fn never(_: &File) -> Result<(), Error> {
        panic!("a file system was made although there is a template");
    }

    fn contents(file: &File) -> Vec<u8> {
        let mut contents = vec![0; SMALL as usize];
        file.read_exact_at(&mut contents, 0).unwrap();
        contents
    }

    fn assert_sound(path: &Path) {
        let mut check = Command::new(find("e2fsck").expect("e2fsprogs is installed"));
        let checked = check.args(["-f", "-n"]).arg(path).output().unwrap();
        assert!(checked.status.success(), "{checked:?}");
    }

    #[test]
    fn a_clone_is_what_the_template_is() {
        let (directory, store) = store();

        let clone = scratch(&store, SMALL).unwrap();

        let [name] = &names(&directory.path().join("scratch"))[..] else {
            panic!("there is one template");
        };
        let template = File::open(directory.path().join("scratch").join(name)).unwrap();
        assert_eq!(clone.metadata().unwrap().len(), SMALL);
        assert!(contents(&clone) == contents(&template));
        assert_eq!(names(&directory.path().join("partial")), [""; 0]);
    }

    #[test]
    fn a_clone_is_sound_and_takes_no_more_room_than_its_file_system_needs() {
        let (directory, store) = store();
        let path = directory.path().join("disk");

        scratch_at(&store, &path, USUAL).unwrap();

        assert_sound(&path);
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!(metadata.len(), USUAL);
        assert!(metadata.blocks() * 512 < 512 << 10, "{metadata:?}");
    }

    #[test]
    fn a_disk_that_is_there_is_kept() {
        let (directory, store) = store();
        let path = directory.path().join("disk");
        fs::write(&path, "what was written").unwrap();

        scratch_at(&store, &path, SMALL).unwrap();

        assert_eq!(fs::read(&path).unwrap(), b"what was written");
    }

    #[test]
    fn where_there_is_a_template_no_file_system_is_made() {
        let (_directory, store) = store();
        for lasting in [false, true] {
            let size = SMALL;
            let recipe = Recipe { size, lasting };
            let first = tempfile::tempfile().unwrap();
            recipe.fill(&store, &first).unwrap();

            let second = tempfile::tempfile().unwrap();
            recipe.fill_by(&store, &second, never).unwrap();

            assert!(contents(&first) == contents(&second));
        }
    }

    #[test]
    fn a_damaged_template_is_made_anew() {
        type Damage = fn(&Path);
        let damages: [Damage; 4] = [
            |path| fs::write(path, "").unwrap(),
            |path| {
                let file = File::options().write(true).open(path).unwrap();
                file.set_len(SMALL / 2).unwrap();
            },
            |path| {
                let file = File::options().write(true).open(path).unwrap();
                file.write_all_at(b"x", 1024 + 17).unwrap();
            },
            |path| {
                let file = File::options().write(true).open(path).unwrap();
                file.write_all_at(b"x", SMALL - 4096).unwrap();
            },
        ];
        let (directory, store) = store();
        let recipe = Recipe {
            size: SMALL,
            lasting: true,
        };
        let template = directory.path().join("scratch").join(recipe.name());
        for damage in damages {
            recipe.fill(&store, &tempfile::tempfile().unwrap()).unwrap();
            damage(&template);

            let clone = tempfile::NamedTempFile::new().unwrap();
            recipe.fill(&store, clone.as_file()).unwrap();

            assert_sound(clone.path());
            let again = tempfile::tempfile().unwrap();
            recipe.fill_by(&store, &again, never).unwrap();
            assert!(contents(clone.as_file()) == contents(&again));
        }
    }

    #[test]
    fn a_template_that_cannot_be_made_leaves_nothing_behind() {
        let (directory, store) = store();

        let error = scratch(&store, 4096).unwrap_err();

        assert!(matches!(error, Error::Scratch { .. }), "{error:?}");
        for name in ["scratch", "partial"] {
            assert_eq!(names(&directory.path().join(name)), [""; 0]);
        }
    }

    #[test]
    fn disks_made_at_the_same_time_are_all_sound() {
        let (directory, store) = store();

        thread::scope(|scope| {
            for number in 0..4 {
                let path = directory.path().join(number.to_string());
                let store = &store;
                scope.spawn(move || scratch_at(store, &path, SMALL).unwrap());
            }
        });

        for number in 0..4 {
            assert_sound(&directory.path().join(number.to_string()));
        }
        assert_eq!(names(&directory.path().join("scratch")).len(), 1);
        assert_eq!(names(&directory.path().join("partial")), [""; 0]);
    }

    #[test]
    fn a_collection_keeps_the_templates_of_this_version_alone() {
        let (directory, store) = store();
        scratch(&store, SMALL).unwrap();
        let kept = names(&directory.path().join("scratch"));
        for name in ["67108864-0000000000000000", "leftover"] {
            fs::write(directory.path().join("scratch").join(name), "old").unwrap();
        }

        let collected = store.collect(&[]).unwrap();

        assert_eq!(collected.files, 2);
        assert_eq!(names(&directory.path().join("scratch")), kept);
    }

    /// The median of 20 times that `act` takes.
    fn median(mut act: impl FnMut()) -> Duration {
        let mut times: Vec<_> = (0..20)
            .map(|_| {
                let start = Instant::now();
                act();
                start.elapsed()
            })
            .collect();
        times.sort();
        times[10]
    }

    #[test]
    #[ignore = "a measurement, to be run by hand with --nocapture"]
    fn how_long_scratch_disks_take() {
        let (directory, store) = store();
        let create = || tempfile::tempfile_in(directory.path()).unwrap();
        for size in [SMALL, 1 << 30, USUAL, 256 << 30, 1 << 40] {
            for lasting in [false, true] {
                let recipe = Recipe { size, lasting };
                let made = median(|| {
                    let file = create();
                    file.set_len(size).unwrap();
                    recipe.format(&file).unwrap();
                });
                recipe.fill(&store, &create()).unwrap();
                let cloned = median(|| recipe.fill_by(&store, &create(), never).unwrap());
                let template = store.templates().unwrap().join(recipe.name());
                println!(
                    "{} MiB, lasting {lasting}: {} KiB, made in {made:?}, cloned in {cloned:?}",
                    size >> 20,
                    fs::metadata(template).unwrap().blocks() / 2
                );
            }
        }
    }
}
