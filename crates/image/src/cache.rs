//! Where appliances are kept: `$XDG_CACHE_HOME/strata`, else `~/.cache/strata`.
//!
//! ```text
//! strata/appliance/.lock                   held while one is built
//! strata/appliance/.building-XXXXXX/       one being built; renamed when it is complete
//! strata/appliance/<recipe>/               manifest.json, vmlinuz, initramfs.cpio
//! ```
//!
//! Any number of processes may ask at once: one builds, the others wait for it.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::appliance::{self, Appliance};
use crate::error::Error;
use crate::initramfs;
use crate::manifest::Manifest;
use crate::progress::Progress;

const BUILDING: &str = ".building-";

/// The user's cache of appliances.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

/// What the cache holds for this version of Strata.
#[derive(Debug, Clone)]
pub enum CacheState {
    /// Nothing yet: the next run builds the appliance.
    Absent,
    /// An appliance that is ready to boot.
    Ready(Manifest),
    /// One whose files are not what was built, and why: the next run builds it anew.
    Damaged(String),
}

impl Cache {
    /// The cache of the user who runs this process.
    pub fn of_user() -> Result<Self, Error> {
        // The XDG Base Directory Specification has relative paths ignored.
        let absolute = |name| {
            env::var_os(name)
                .map(PathBuf::from)
                .filter(|p| p.is_absolute())
        };
        absolute("XDG_CACHE_HOME")
            .or_else(|| Some(absolute("HOME")?.join(".cache")))
            .map(|base| Self::at(&base.join("strata")))
            .ok_or(Error::NoCacheDirectory)
    }

    /// A cache in the directory `root`, which need not exist yet.
    pub fn at(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    /// The directory of the appliance that this version of Strata uses.
    pub fn appliance_directory(&self) -> PathBuf {
        self.root.join("appliance").join(initramfs::recipe())
    }

    /// What the cache holds now. Reads little where all is as it was built.
    pub fn state(&self) -> CacheState {
        let directory = self.appliance_directory();
        match Manifest::load(&directory) {
            None if directory.exists() => {
                CacheState::Damaged("there is no manifest.json".to_owned())
            }
            None => CacheState::Absent,
            Some(Err(reason)) => CacheState::Damaged(reason),
            Some(Ok(manifest)) => match defect(&directory, &manifest) {
                Some(reason) => CacheState::Damaged(reason),
                None => CacheState::Ready(manifest),
            },
        }
    }

    /// The default appliance, built first where that is needed.
    pub fn appliance(&self, progress: &mut dyn Progress) -> Result<Appliance, Error> {
        self.appliance_built_by(progress, &appliance::build)
    }

    fn appliance_built_by(
        &self,
        progress: &mut dyn Progress,
        build: &Builder<'_>,
    ) -> Result<Appliance, Error> {
        let target = self.appliance_directory();
        if let CacheState::Ready(manifest) = self.state() {
            return Ok(Appliance::at(&target, manifest));
        }

        let parent = self.root.join("appliance");
        fs::create_dir_all(&parent).map_err(Error::io("create the cache directory", &parent))?;
        let lock_path = parent.join(".lock");
        let lock = File::create(&lock_path).map_err(Error::io("create the file", &lock_path))?;
        if lock.try_lock().is_err() {
            progress.step("Waiting for another strata to build the appliance", None);
            lock.lock()
                .map_err(Error::io("lock the file", &lock_path))?;
        }
        // Whoever held the lock may have built it.
        match self.state() {
            CacheState::Ready(manifest) => return Ok(Appliance::at(&target, manifest)),
            CacheState::Damaged(reason) => {
                tracing::warn!(directory = %target.display(), reason,
                    "the cached appliance is damaged and is built anew");
            }
            CacheState::Absent => {}
        }
        remove_leftovers(&parent);

        let scratch = |what| {
            tempfile::Builder::new()
                .prefix(what)
                .tempdir_in(&parent)
                .map_err(Error::io("create a directory in", &parent))
        };
        let building = scratch(BUILDING)?;
        let work = scratch(BUILDING)?;
        let manifest = build(building.path(), work.path(), progress)?;
        if target.exists() {
            fs::remove_dir_all(&target).map_err(Error::io("remove the directory", &target))?;
        }
        fs::rename(building.path(), &target)
            .map_err(Error::io("rename a directory to", &target))?;
        Ok(Appliance::at(&target, manifest))
    }
}

/// What builds an appliance: into the first directory, with the second as scratch space.
type Builder<'a> = dyn Fn(&Path, &Path, &mut dyn Progress) -> Result<Manifest, Error> + 'a;

fn defect(directory: &Path, manifest: &Manifest) -> Option<String> {
    for name in [appliance::KERNEL_FILE, appliance::INITRAMFS_FILE] {
        if !manifest.files.iter().any(|file| file.name == name) {
            return Some(format!("the manifest does not record {name}"));
        }
    }
    manifest
        .files
        .iter()
        .find_map(|file| file.defect(directory))
}

/// Removes what builds that were killed left behind. Only with the lock held.
fn remove_leftovers(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(BUILDING) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;
    use std::time::Duration;

    use super::*;
    use crate::manifest::FileRecord;
    use crate::progress::Silent;

    /// Builds an appliance of two small files.
    #[expect(clippy::unnecessary_wraps, reason = "has the form of a builder")]
    fn stub(target: &Path, _: &Path, _: &mut dyn Progress) -> Result<Manifest, Error> {
        let names = [appliance::KERNEL_FILE, appliance::INITRAMFS_FILE];
        for name in names {
            fs::write(target.join(name), name).unwrap();
        }
        let manifest = Manifest {
            recipe: initramfs::recipe(),
            built_by: "test".into(),
            kernel_release: "6".into(),
            sources: vec![],
            files: names.map(|n| FileRecord::of(target, n).unwrap()).to_vec(),
        };
        manifest.save(target).unwrap();
        Ok(manifest)
    }

    fn never(_: &Path, _: &Path, _: &mut dyn Progress) -> Result<Manifest, Error> {
        panic!("built although the cache had it");
    }

    #[test]
    fn the_second_request_builds_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        assert!(matches!(cache.state(), CacheState::Absent));

        cache.appliance_built_by(&mut Silent, &stub).unwrap();
        let again = cache.appliance_built_by(&mut Silent, &never).unwrap();

        assert_eq!(fs::read(again.kernel).unwrap(), b"vmlinuz");
        assert!(matches!(cache.state(), CacheState::Ready(_)));
    }

    #[test]
    fn a_truncated_file_or_a_broken_manifest_has_the_appliance_built_anew() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        for name in ["vmlinuz", "initramfs.cpio", "manifest.json"] {
            cache.appliance_built_by(&mut Silent, &stub).unwrap();
            fs::write(cache.appliance_directory().join(name), "x").unwrap();
            assert!(matches!(cache.state(), CacheState::Damaged(_)), "{name}");

            let appliance = cache.appliance_built_by(&mut Silent, &stub).unwrap();

            assert_eq!(fs::read(appliance.kernel).unwrap(), b"vmlinuz");
        }
    }

    #[test]
    fn a_failed_build_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        let fail = |target: &Path, _: &Path, _: &mut dyn Progress| {
            fs::write(target.join("vmlinuz"), "half").unwrap();
            Err(Error::AptMissing { program: "apt-get" })
        };

        assert!(cache.appliance_built_by(&mut Silent, &fail).is_err());

        assert!(matches!(cache.state(), CacheState::Absent));
        let left: Vec<_> = fs::read_dir(dir.path().join("appliance"))
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(left, [".lock"]);
    }

    #[test]
    fn leftovers_of_a_killed_build_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        let old = dir.path().join("appliance/.building-old");
        fs::create_dir_all(&old).unwrap();

        cache.appliance_built_by(&mut Silent, &stub).unwrap();

        assert!(!old.exists());
    }

    #[test]
    fn requests_at_the_same_time_build_once() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path());
        let builds = AtomicUsize::new(0);
        let slow = |target: &Path, work: &Path, progress: &mut dyn Progress| {
            builds.fetch_add(1, Ordering::SeqCst);
            thread::sleep(Duration::from_millis(50));
            stub(target, work, progress)
        };

        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| cache.appliance_built_by(&mut Silent, &slow).unwrap());
            }
        });

        assert_eq!(builds.load(Ordering::SeqCst), 1);
    }
}
