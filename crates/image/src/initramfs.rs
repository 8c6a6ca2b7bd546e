//! The contents of the appliance's initramfs: `BusyBox`, kernel modules and a few files.
//! Process 1 comes with each session. Called by `appliance`; pure, no files.

use sha2::{Digest, Sha256};

use crate::cpio::Archive;
use crate::manifest::hex;
use crate::modules::{self, Set};

/// Modules without which the appliance is of no use.
pub(crate) const REQUIRED_MODULES: &[&str] = &["virtio_pci", "virtio_blk", "virtio_console"];

/// Modules loaded where the kernel has them: entropy, the network, sockets that lead to the host, folders of
/// the host, word of a
/// panic to the host, and the file systems of container images.
pub(crate) const OPTIONAL_MODULES: &[&str] = &[
    "virtio_rng",
    "virtio_net",
    "vmw_vsock_virtio_transport",
    "virtiofs",
    "pvpanic_mmio",
    "pvpanic_pci",
    "erofs",
    "overlay",
];

/// What the modules above are known to depend on. Only spares reading the package twice: what
/// they really depend on is read from themselves.
pub(crate) const LIKELY_MODULES: &[&str] = &[
    "virtio",
    "virtio_ring",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "fuse",
    "net_failover",
    "failover",
    "vmw_vsock_virtio_transport_common",
    "vsock",
    "pvpanic",
];

const DIRECTORIES: &[&str] = &[
    "bin",
    "dev",
    "etc",
    "lib",
    "lib/modules",
    "mnt",
    "proc",
    "root",
    "run",
    "sbin",
    "sys",
    "usr",
    "usr/bin",
    "usr/sbin",
    "var",
    "var/log",
];

const FILES: &[(&str, u32, &str)] = &[
    ("etc/profile", 0o644, include_str!("../guest/profile")),
    ("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\n"),
    ("etc/group", 0o644, "root:x:0:\n"),
];

/// Fingerprint of all in this crate that shapes an appliance, sixteen hex digits. Two versions
/// of Strata with the same recipe share a cached appliance.
pub(crate) fn recipe() -> String {
    let mut hash = Sha256::new();
    let mut add = |text: &str| {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    };
    add("layout 1");
    for (path, _, text) in FILES {
        add(path);
        add(text);
    }
    for name in DIRECTORIES
        .iter()
        .chain(REQUIRED_MODULES)
        .chain(OPTIONAL_MODULES)
    {
        add(name);
    }
    hex(&hash.finalize()[..8])
}

/// Builds the archive. It is left uncompressed: the guest would have to undo the compression
/// on a slower processor than the host's disk.
pub(crate) fn build(busybox: &[u8], kernel_release: &str, set: &Set) -> Vec<u8> {
    let mut archive = Archive::new();
    for path in DIRECTORIES {
        archive.directory(path, if *path == "root" { 0o700 } else { 0o755 });
    }
    archive.directory("tmp", 0o1777);
    // Needed until devtmpfs is mounted: init's own console and the shell's.
    archive.character_device("dev/console", 0o600, 5, 1);
    archive.character_device("dev/ttyS0", 0o600, 4, 64);
    archive.character_device("dev/null", 0o666, 1, 3);

    archive.file("bin/busybox", 0o755, busybox);
    archive.symlink("bin/sh", "busybox");
    // The kernel starts /init, which comes with each session.
    for (path, mode, text) in FILES {
        archive.file(path, *mode, text.as_bytes());
    }

    let directory = format!("lib/modules/{kernel_release}");
    archive.directory(&directory, 0o755);
    for module in set.values() {
        archive.file(&format!("{directory}/{}", module.file), 0o644, &module.data);
    }
    archive.file(
        &format!("{directory}/modules.dep"),
        0o644,
        modules::dependency_index(set).as_bytes(),
    );
    archive.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpio::tests::read;
    use crate::modules::tests::module_file;

    #[test]
    fn a_directory_comes_before_what_is_in_it() {
        let entries = read(&build(b"busybox", "6.1.0", &Set::new()));
        for (index, (path, ..)) in entries.iter().enumerate() {
            if let Some((parent, _)) = path.rsplit_once('/') {
                assert!(
                    entries[..index].iter().any(|entry| entry.0 == parent),
                    "{path} comes before {parent}"
                );
            }
        }
    }

    #[test]
    fn modules_are_where_modprobe_looks_for_them() {
        let module = modules::parse("virtio-rng.ko", module_file("depends=\0")).unwrap();
        let set = Set::from([("virtio_rng".to_owned(), module)]);

        let entries = read(&build(b"busybox", "6.1.0", &set));

        let has = |name: &str| entries.iter().any(|entry| entry.0 == name);
        assert!(has("lib/modules/6.1.0/virtio-rng.ko"));
        assert!(has("lib/modules/6.1.0/modules.dep"));
    }

    #[test]
    fn the_recipe_is_stable_within_a_build() {
        assert_eq!(recipe(), recipe());
        assert_eq!(recipe().len(), 16);
    }
}
