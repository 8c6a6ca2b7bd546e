//! Kernel modules: only those of the devices that are there, since loading one costs more than
//! anything else in a boot.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::Path;

use rustix::io::Errno;
use rustix::system::{finit_module, uname};

/// Drivers by PCI vendor and device: virtio 1.2 section 4.1.2, modern and transitional numbers,
/// and QEMU's pvpanic.
const DRIVERS: &[(&str, &str, &[&str])] = &[
    ("0x1af4", "0x1041", &["virtio_pci", "virtio_net"]),
    ("0x1af4", "0x1000", &["virtio_pci", "virtio_net"]),
    ("0x1af4", "0x1042", &["virtio_pci", "virtio_blk"]),
    ("0x1af4", "0x1001", &["virtio_pci", "virtio_blk"]),
    ("0x1af4", "0x1043", &["virtio_pci", "virtio_console"]),
    ("0x1af4", "0x1003", &["virtio_pci", "virtio_console"]),
    ("0x1af4", "0x1044", &["virtio_pci", "virtio_rng"]),
    ("0x1af4", "0x1005", &["virtio_pci", "virtio_rng"]),
    ("0x1af4", "0x105a", &["virtio_pci", "virtiofs"]),
    ("0x1b36", "0x0011", &["pvpanic_pci"]),
];

/// The ACPI device of pvpanic, and its driver.
const PANIC_DEVICE: &str = "/sys/bus/acpi/devices/QEMU0001:00";
const PANIC_DRIVER: &str = "pvpanic_mmio";

/// The driver of a socket device, and its number: loaded when somebody is there to use it.
pub(super) const SOCKETS: &str = "vmw_vsock_virtio_transport";
const SOCKET_DEVICE: (&str, &str) = ("0x1af4", "0x1053");

/// What container images are mounted with.
pub(super) const IMAGE_MODULES: &[&str] = &["erofs", "overlay"];

/// Loads the drivers of all devices.
pub(super) fn load() {
    let mut wanted = BTreeSet::new();
    let mut names: Vec<&str> = Vec::new();
    let mut want = |name| {
        if wanted.insert(name) {
            names.push(name);
        }
    };
    for (vendor, device) in devices() {
        for (of, is, drivers) in DRIVERS {
            if vendor == *of && device == *is {
                drivers.iter().copied().for_each(&mut want);
            }
        }
    }
    if Path::new(PANIC_DEVICE).exists() {
        want(PANIC_DRIVER);
    }
    load_modules(&names);
}

/// Vendor and device of all that is on the PCI bus.
fn devices() -> impl Iterator<Item = (String, String)> {
    let devices = fs::read_dir("/sys/bus/pci/devices").into_iter().flatten();
    devices.flatten().map(|device| {
        let number = |name| {
            let text = fs::read_to_string(device.path().join(name)).unwrap_or_default();
            text.trim().to_owned()
        };
        (number("vendor"), number("device"))
    })
}

/// Whether the machine has a socket device.
pub(super) fn has_sockets() -> bool {
    devices().any(|(vendor, device)| (&*vendor, &*device) == SOCKET_DEVICE)
}

/// Loads modules and what they need; those that are not there may be built into the kernel.
pub(super) fn load_modules(names: &[&str]) {
    open_modules(names).iter().for_each(insert);
}

/// The files of modules and what they need, in the order in which they are to be loaded.
pub(super) fn open_modules(names: &[&str]) -> Vec<File> {
    let release = uname().release().to_string_lossy().into_owned();
    let directory = Path::new("/lib/modules").join(release);
    let index = fs::read_to_string(directory.join("modules.dep")).unwrap_or_default();
    let mut done = BTreeSet::new();
    let mut opened = Vec::new();
    for name in names {
        for file in files_of(&index, name) {
            if done.insert(file) {
                opened.extend(File::open(directory.join(file)));
            }
        }
    }
    opened
}

/// The files of a module and what it needs, in the order in which they are to be loaded.
fn files_of<'a>(index: &'a str, name: &str) -> Vec<&'a str> {
    let is_it = |file: &str| {
        let file = file.rsplit('/').next().unwrap_or(file);
        file.strip_suffix(".ko")
            .is_some_and(|file| file.replace('-', "_") == name)
    };
    let line = index.lines().find_map(|line| {
        let (file, needs) = line.split_once(':')?;
        is_it(file).then_some((file, needs))
    });
    let Some((file, needs)) = line else {
        return Vec::new();
    };
    let mut files: Vec<&str> = needs.split_ascii_whitespace().collect();
    // modules.dep(5): the one that has to be loaded first is last.
    files.reverse();
    files.push(file);
    files
}

/// Loads a module, unless it is loaded already.
pub(crate) fn insert(module: &File) {
    match finit_module(module, c"", 0) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => eprintln!("strata: a module of the kernel cannot be loaded: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_module_needs_is_loaded_before_it() {
        let index = "virtio-rng.ko: virtio.ko virtio_ring.ko\nkernel/fs/erofs.ko:\nvirtio.ko: virtio_ring.ko\n";
        assert_eq!(
            files_of(index, "virtio_rng"),
            ["virtio_ring.ko", "virtio.ko", "virtio-rng.ko"]
        );
        assert_eq!(files_of(index, "erofs"), ["kernel/fs/erofs.ko"]);
        assert!(files_of(index, "rng").is_empty());
    }
}
