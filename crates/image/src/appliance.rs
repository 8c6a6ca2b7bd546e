//! Makes the default appliance: fetch, unpack, put together, record.
//!
//! Called by `cache` with the lock held. It writes only into the directories it is given.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::apt::{Apt, Fetched, Package};
use crate::deb;
use crate::error::Error;
use crate::initramfs::{self, LIKELY_MODULES, OPTIONAL_MODULES, REQUIRED_MODULES};
use crate::manifest::{FileRecord, Manifest};
use crate::modules::{self, Set};
use crate::progress::Progress;

/// The metapackage that depends on Debian's newest cloud kernel.
const KERNEL_METAPACKAGE: &str = "linux-image-cloud-amd64";
const BUSYBOX_PACKAGE: &str = "busybox-static";

pub(crate) const KERNEL_FILE: &str = "vmlinuz";
pub(crate) const INITRAMFS_FILE: &str = "initramfs.cpio";

/// How often the kernel package may be read again for dependencies of dependencies.
const MAX_PASSES: usize = 8;

/// An appliance that is ready to boot.
#[derive(Debug, Clone)]
pub struct Appliance {
    /// The kernel, a bzImage.
    pub kernel: PathBuf,
    /// The initramfs, an uncompressed cpio archive. A [`Session`](crate::Session) may follow.
    pub initramfs: PathBuf,
    /// What it was made from.
    pub manifest: Manifest,
}

impl Appliance {
    pub(crate) fn at(directory: &Path, manifest: Manifest) -> Self {
        Self {
            kernel: directory.join(KERNEL_FILE),
            initramfs: directory.join(INITRAMFS_FILE),
            manifest,
        }
    }
}

/// Builds the appliance in `target`, with `work` as scratch space; both are empty directories.
pub(crate) fn build(
    target: &Path,
    work: &Path,
    progress: &mut dyn Progress,
) -> Result<Manifest, Error> {
    let (kernel_package, busybox_package) = fetch(work, progress)?;
    let manifest = assemble(target, &kernel_package, &busybox_package, progress)?;
    manifest
        .save(target)
        .map_err(Error::io("write the manifest in", target))?;
    Ok(manifest)
}

/// Fetches both packages with the host's lists or, where those lack them or name versions
/// that are gone from the mirror, with fresh ones.
fn fetch(work: &Path, progress: &mut dyn Progress) -> Result<(Fetched, Fetched), Error> {
    let mut apt = Apt::new(work);
    loop {
        progress.step("Looking for Debian's kernel and BusyBox", None);
        let found = resolve(&apt).and_then(|(kernel, busybox)| {
            let busybox = apt.download(&busybox, progress)?;
            let kernel = apt.download(&kernel, progress)?;
            Ok((kernel, busybox))
        });
        match found {
            Err(Error::PackageNotFound { .. } | Error::Fetch { .. }) if !apt.is_private() => {
                apt.refresh(progress)?;
            }
            other => return other,
        }
    }
}

fn resolve(apt: &Apt) -> Result<(Package, Package), Error> {
    let find = |name: &str| apt.find(name)?.ok_or_else(|| apt.not_found(name));
    let metapackage = find(KERNEL_METAPACKAGE)?;
    let kernel = metapackage
        .depends
        .iter()
        .find(|name| name.starts_with("linux-image-"))
        .ok_or_else(|| apt.not_found("linux-image-*-cloud-amd64"))?;
    Ok((find(kernel)?, find(BUSYBOX_PACKAGE)?))
}

fn assemble(
    target: &Path,
    kernel_package: &Fetched,
    busybox_package: &Fetched,
    progress: &mut dyn Progress,
) -> Result<Manifest, Error> {
    let busybox = read_busybox(busybox_package)?;
    let kernel = read_kernel(kernel_package, progress)?;
    progress.step("Putting the appliance together", None);
    let initramfs = initramfs::build(&busybox, &kernel.release, &kernel.modules);
    for (name, data) in [(KERNEL_FILE, &kernel.image), (INITRAMFS_FILE, &initramfs)] {
        let path = target.join(name);
        fs::write(&path, data).map_err(Error::io("write the file", &path))?;
    }
    let record = |name: &str| {
        FileRecord::of(target, name).map_err(Error::io("read the file", &target.join(name)))
    };
    Ok(Manifest {
        recipe: initramfs::recipe(),
        built_by: env!("CARGO_PKG_VERSION").to_owned(),
        kernel_release: kernel.release,
        sources: vec![
            kernel_package.record.clone(),
            busybox_package.record.clone(),
        ],
        files: vec![record(KERNEL_FILE)?, record(INITRAMFS_FILE)?],
    })
}

fn read_busybox(package: &Fetched) -> Result<Vec<u8>, Error> {
    let mut busybox = None;
    deb::for_each_file(&package.path, &mut |_| {}, |member| {
        if member.path == "bin/busybox" {
            busybox = Some(member.read()?);
        }
        Ok(())
    })?;
    busybox.ok_or_else(|| Error::bad(&package.path, "it has no bin/busybox"))
}

struct Kernel {
    release: String,
    image: Vec<u8>,
    modules: Set,
}

/// What one pass over the kernel package finds.
#[derive(Default)]
struct Contents {
    image: Option<(String, Vec<u8>)>,
    builtin: BTreeSet<String>,
    modules: Set,
}

/// Takes the kernel and the modules that are needed from the package. Which those are is known
/// only when they have been read; the guess is good, so one pass is the rule.
fn read_kernel(package: &Fetched, progress: &mut dyn Progress) -> Result<Kernel, Error> {
    let mut wanted: BTreeSet<String> = [REQUIRED_MODULES, OPTIONAL_MODULES, LIKELY_MODULES]
        .concat()
        .into_iter()
        .map(str::to_owned)
        .collect();
    for _ in 0..MAX_PASSES {
        progress.step(
            &format!("Unpacking {}", package.record.package),
            Some(package.record.size),
        );
        let contents = read_kernel_once(&package.path, &wanted, progress)?;
        let missing = modules::missing(&contents.modules, &contents.builtin);
        if missing.is_empty() {
            return check_kernel(&package.path, contents);
        }
        if missing.is_subset(&wanted) {
            return Err(Error::bad(
                &package.path,
                format!("it lacks modules that others need: {missing:?}"),
            ));
        }
        wanted.extend(missing);
    }
    Err(Error::bad(
        &package.path,
        "the dependencies of its modules do not end",
    ))
}

fn check_kernel(path: &Path, contents: Contents) -> Result<Kernel, Error> {
    let Contents {
        image,
        builtin,
        mut modules,
    } = contents;
    let (release, image) = image.ok_or_else(|| Error::bad(path, "it has no boot/vmlinuz-*"))?;
    let available = |name: &str| modules.contains_key(name) || builtin.contains(name);
    if let Some(name) = REQUIRED_MODULES.iter().find(|name| !available(name)) {
        return Err(Error::bad(path, format!("it has no module '{name}'")));
    }
    // Guesses that nothing asked for would only cost room.
    let needed: BTreeSet<String> = REQUIRED_MODULES
        .iter()
        .chain(OPTIONAL_MODULES)
        .flat_map(|name| modules::load_order(&modules, name))
        .collect();
    modules.retain(|name, _| needed.contains(name));
    Ok(Kernel {
        release,
        image,
        modules,
    })
}

fn read_kernel_once(
    path: &Path,
    wanted: &BTreeSet<String>,
    progress: &mut dyn Progress,
) -> Result<Contents, Error> {
    let mut contents = Contents::default();
    deb::for_each_file(path, &mut |position| progress.advance(position), |member| {
        let path = member.path.to_owned();
        if let Some(release) = path.strip_prefix("boot/vmlinuz-") {
            contents.image = Some((release.to_owned(), member.read()?));
        } else if !path.starts_with("lib/modules/") {
        } else if path.ends_with("/modules.builtin") {
            let text = member.read()?;
            let text = String::from_utf8_lossy(&text);
            contents.builtin = text.lines().map(modules::normalise).collect();
        } else if let Some(at) = path.rfind(".ko") {
            let name = modules::normalise(&path);
            if wanted.contains(&name) {
                let (file, suffix) = path.split_at(at + ".ko".len());
                let file = file.rsplit('/').next().unwrap_or(file);
                let packed = member.read()?;
                let mut data = Vec::new();
                io::copy(&mut deb::decompress(suffix, &*packed)?, &mut data)?;
                let module = modules::parse(file, data).map_err(io::Error::other)?;
                contents.modules.insert(name, module);
            }
        }
        Ok(())
    })?;
    Ok(contents)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpio::tests::read;
    use crate::deb::tests::package;
    use crate::manifest::SourceRecord;
    use crate::modules::tests::module_file;
    use crate::progress::Silent;

    fn fetched(path: &Path) -> Fetched {
        Fetched {
            path: path.to_owned(),
            record: SourceRecord {
                package: "p".into(),
                version: "1".into(),
                size: 1,
                sha256: "0".into(),
            },
        }
    }

    fn module(depends: &str) -> Vec<u8> {
        module_file(&format!("depends={depends}\0"))
    }

    const DIR: &str = "./usr/lib/modules/6.1.0/kernel";

    fn kernel_package(dir: &Path, extra: &[(&str, &[u8])]) -> Fetched {
        let path = dir.join("kernel.deb");
        let pci = module("virtio,virtio_ring");
        let mut files: Vec<(String, Vec<u8>)> = vec![
            ("./boot/vmlinuz-6.1.0".into(), b"image".to_vec()),
            (
                "./usr/lib/modules/6.1.0/modules.builtin".into(),
                b"kernel/a/virtio.ko\n".to_vec(),
            ),
            (format!("{DIR}/a/virtio_pci.ko"), pci.clone()),
            (format!("{DIR}/a/virtio_blk.ko"), module("late-helper")),
            (format!("{DIR}/a/virtio_ring.ko"), module("")),
            (format!("{DIR}/a/unrelated.ko"), module("")),
        ];
        files.extend(extra.iter().map(|(n, d)| ((*n).to_owned(), d.to_vec())));
        let files: Vec<(&str, &[u8])> = files.iter().map(|(n, d)| (&**n, &**d)).collect();
        package(&path, ".xz", &files);
        fetched(&path)
    }

    #[test]
    fn an_appliance_has_the_kernel_and_the_modules_that_are_needed() {
        let dir = tempfile::tempdir().unwrap();
        let console = format!("{DIR}/a/virtio_console.ko");
        let helper = format!("{DIR}/z/late_helper.ko");
        let kernel = kernel_package(
            dir.path(),
            &[(&console, &module("")), (&helper, &module(""))],
        );
        let busybox_path = dir.path().join("busybox.deb");
        package(&busybox_path, ".xz", &[("./bin/busybox", b"tools")]);

        let manifest = assemble(dir.path(), &kernel, &fetched(&busybox_path), &mut Silent).unwrap();

        assert_eq!(manifest.kernel_release, "6.1.0");
        assert_eq!(fs::read(dir.path().join(KERNEL_FILE)).unwrap(), b"image");
        let entries = read(&fs::read(dir.path().join(INITRAMFS_FILE)).unwrap());
        let has = |name: &str| entries.iter().any(|e| e.0.ends_with(name));
        assert!(has("/virtio_ring.ko") && has("/late_helper.ko") && has("bin/busybox"));
        assert!(!has("/unrelated.ko"));
    }

    #[test]
    fn a_kernel_package_without_a_needed_module_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let helper = format!("{DIR}/z/late_helper.ko");
        let kernel = kernel_package(dir.path(), &[(&helper, &module(""))]);

        let error = read_kernel(&kernel, &mut Silent).err().unwrap().to_string();

        assert!(error.contains("virtio_console"), "{error}");
    }

    #[test]
    fn a_dependency_that_is_nowhere_is_an_error_not_a_loop() {
        let dir = tempfile::tempdir().unwrap();
        let kernel = kernel_package(dir.path(), &[]);

        let error = read_kernel(&kernel, &mut Silent).err().unwrap().to_string();

        assert!(error.contains("late_helper"), "{error}");
    }
}
