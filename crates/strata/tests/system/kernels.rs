//! Kernels of the user's own, in every form that distributions ship: here Debian's, taken
//! out of its bzImage and packed again with the programs that the kernel's build calls.

use std::fs;
use std::io::Write;
use std::ops::Range;
use std::process::{Command, Stdio};
use std::thread;

use strata_image::{Appliance, Archive, Cache, Silent};

use crate::guest::{feed, run};
use crate::host::program;

/// Says what was booted, and how, then powers off.
const INIT: &str = "#!/bin/busybox sh\n\
    /bin/busybox mount -t proc proc /proc\n\
    echo \"own init, $word, $(/bin/busybox uname -r), $(/bin/busybox cat /proc/cmdline)\"\n\
    exec /bin/busybox poweroff -f\n";
/// Bytes in a block of the LZ4 legacy frames that the kernel's build makes.
const LZ4_BLOCK: usize = 8 << 20;

fn appliance() -> Appliance {
    Cache::of_user().unwrap().appliance(&mut Silent).unwrap()
}

/// Boots `kernel`, a file's bytes, to an init of its own and sees it power off.
fn boots(kernel: &[u8]) {
    let mut initrd = fs::read(appliance().initramfs).unwrap();
    let mut archive = Archive::new();
    archive.file("own", 0o755, INIT.as_bytes());
    initrd.extend(archive.finish());
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = directory.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    };

    let mut command = run(&["--memory", "256M"]);
    command.arg("--kernel").arg(file("kernel", kernel));
    command.arg("--initrd").arg(file("initrd", &initrd));
    let line = "console=ttyS0 quiet panic=-1 rdinit=/own word=hello";
    command.args(["--append", line]);
    let ended = feed(command, b"").expect(0);

    let said = format!("own init, hello, {}, {line}", Image::of_debian().release());
    assert!(ended.text().contains(&said), "{}", ended.text());
    assert_eq!(ended.stderr, "");
}

/// A bzImage, and where in it the kernel proper is.
struct Image {
    bytes: Vec<u8>,
    payload: Range<usize>,
}

impl Image {
    // Offsets are those of the setup header (Documentation/arch/x86/boot.rst).
    const SETUP_SECTORS: usize = 0x1f1;
    const KERNEL_VERSION: usize = 0x20e;
    const PAYLOAD_OFFSET: usize = 0x248;
    const PAYLOAD_LENGTH: usize = 0x24c;

    fn of_debian() -> Self {
        let bytes = fs::read(appliance().kernel).unwrap();
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
        let setup = (usize::from(bytes[Self::SETUP_SECTORS]) + 1) * 512;
        let start = setup + word(Self::PAYLOAD_OFFSET);
        let payload = start..start + word(Self::PAYLOAD_LENGTH);
        Self { bytes, payload }
    }

    /// The release, as `uname -r` has it.
    fn release(&self) -> String {
        let at = &self.bytes[Self::KERNEL_VERSION..][..2];
        let at = 0x200 + usize::from(u16::from_le_bytes(at.try_into().unwrap()));
        let version = self.bytes[at..].split(|byte| *byte <= b' ').next().unwrap();
        String::from_utf8(version.to_vec()).unwrap()
    }

    /// The ELF file that the payload unpacks to.
    fn vmlinux(&self) -> Vec<u8> {
        let payload = &self.bytes[self.payload.clone()];
        let (body, size) = payload.split_last_chunk().unwrap();
        let mut blocks = body
            .strip_prefix(b"\x02\x21\x4c\x18")
            .expect("Debian packs its kernel with LZ4");
        let mut vmlinux = Vec::with_capacity(u32::from_le_bytes(*size) as usize);
        while let Some((length, rest)) = blocks.split_first_chunk() {
            let (block, rest) = rest.split_at(u32::from_le_bytes(*length) as usize);
            vmlinux.extend(lz4_flex::block::decompress(block, LZ4_BLOCK).unwrap());
            blocks = rest;
        }
        vmlinux
    }

    /// The bzImage with another payload.
    fn with_payload(mut self, payload: Vec<u8>) -> Vec<u8> {
        let length = (payload.len() as u32).to_le_bytes();
        self.bytes[Self::PAYLOAD_LENGTH..][..4].copy_from_slice(&length);
        self.bytes.splice(self.payload, payload);
        self.bytes
    }
}

/// What `packer` makes of `data`.
fn packed_by(packer: &str, options: &[&str], data: &[u8]) -> Vec<u8> {
    let mut child = Command::new(program(packer))
        .args(options)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let output = thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(data).unwrap());
        child.wait_with_output().unwrap()
    });
    assert!(output.status.success(), "{packer}: {}", output.status);
    output.stdout
}

/// Boots Debian's kernel packed by `packer`, with the unpacked size after it as the kernel's
/// build appends it.
fn boots_packed_by(packer: &str, options: &[&str]) {
    let debian = Image::of_debian();
    let vmlinux = debian.vmlinux();
    let mut payload = packed_by(packer, options, &vmlinux);
    // gzip's own trailer ends with the size.
    if packer != "gzip" {
        payload.extend((vmlinux.len() as u32).to_le_bytes());
    }
    boots(&debian.with_payload(payload));
}

#[test]
fn a_kernel_and_initrd_of_ones_own_boot_with_their_command_line() {
    boots(&Image::of_debian().bytes);
}

#[test]
fn an_elf_vmlinux_boots() {
    boots(&Image::of_debian().vmlinux());
}

// Options are those of the kernel's scripts/Makefile.lib and xz_wrap.sh, but for the effort
// spent on making it small.

#[test]
fn a_kernel_packed_with_gzip_boots() {
    boots_packed_by("gzip", &["-n", "-1"]);
}

#[test]
fn a_kernel_packed_with_xz_boots() {
    let options = ["--check=crc32", "--x86", "--lzma2=preset=0,dict=32MiB"];
    boots_packed_by("xz", &options);
}

#[test]
fn a_kernel_packed_with_zstd_boots() {
    // the window that -22 has, on input whose size is not known before
    boots_packed_by("zstd", &["--ultra", "-1", "--zstd=wlog=27"]);
}
