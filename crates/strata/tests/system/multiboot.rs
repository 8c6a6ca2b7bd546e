//! Kernels that are not Linux: small ones of our own, which follow the Multiboot
//! specification and end through the debug-exit port. Sources are in `programs/multiboot`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::guest::{Ended, feed, run};
use crate::host::program;

const NOT_STARTED: i32 = 125;
const TRIPLE_FAULT: i32 = 241;

/// Needs no C library, of either width.
const OPTIONS: [&str; 10] = [
    "-O2",
    "-ffreestanding",
    "-nostdlib",
    "-static",
    "-no-pie",
    "-fno-pie",
    "-fno-stack-protector",
    "-mgeneral-regs-only",
    "-Wl,--build-id=none",
    "-Wl,--no-warnings",
];

/// A kernel that was built, and a folder for what goes with it.
struct Kernel {
    directory: TempDir,
    path: PathBuf,
}

impl Kernel {
    /// Compiles the kernel `name`.
    fn build(name: &str, options: &[&str]) -> Self {
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/system/programs/multiboot");
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(name);
        let mut gcc = Command::new(program("gcc"));
        gcc.args(OPTIONS).args(options).arg("-o").arg(&path);
        gcc.arg("-T").arg(sources.join("kernel.ld"));
        gcc.arg(sources.join("start.S"));
        gcc.arg(sources.join(name).with_extension("c"));
        succeeds(&mut gcc);
        Self { directory, path }
    }

    /// The same kernel in the format `to` of objcopy(1).
    fn converted(mut self, to: &str) -> Self {
        let path = self.path.with_extension(to);
        let mut objcopy = Command::new(program("objcopy"));
        succeeds(objcopy.args(["-O", to]).arg(&self.path).arg(&path));
        self.path = path;
        self
    }

    fn file(&self, name: &str, content: &str) -> PathBuf {
        let path = self.directory.path().join(name);
        fs::write(&path, content).unwrap();
        path
    }

    fn command(&self, options: &[&str]) -> Command {
        let mut command = run(&["--debug-exit", "0xf4"]);
        if !options.contains(&"--memory") {
            command.args(["--memory", "64M"]);
        }
        command.arg("--kernel").arg(&self.path).args(options);
        command
    }

    fn run(&self, options: &[&str]) -> Ended {
        feed(self.command(options), b"")
    }
}

fn succeeds(command: &mut Command) {
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {stderr}");
}

/// Runs a kernel that prints all it is told, and looks at what it prints.
fn finds_what_it_is_told(kernel: &Kernel, width: usize) {
    let disk = kernel.file("disk", "of the disk");
    let module = kernel.file("module", "of the module");
    let mut command = kernel.command(&["--append", "one  two=three"]);
    command.arg("--initrd").arg(&disk);
    command
        .arg("--module")
        .arg(format!("{} its arguments", module.display()));

    let ended = feed(command, b"").expect(0x10 * 2 + 1);

    let text = ended.text();
    for line in [
        "magic 2badb002",
        &format!("width {width}"),
        "loader Strata",
        &format!("command line '{} one  two=three'", kernel.path.display()),
        "lower 27f",
        "upper fc00",
        &format!("module '{}': of the disk", disk.display()),
        &format!("module '{} its arguments': of the module", module.display()),
        "map 0 9fc00 1",
        "map 100000 4000000 1",
        "acpi e0000",
        "bss 0",
    ] {
        assert!(text.lines().any(|l| l == line), "{line} is not in:\n{text}");
    }
    assert_eq!(ended.stderr, "");
}

#[test]
fn a_32_bit_kernel_finds_what_it_is_told() {
    let kernel = Kernel::build("report", &["-m32"]);
    finds_what_it_is_told(&kernel, 4);

    let ended = kernel.run(&[]).expect(0x10 * 2 + 1);
    assert!(ended.text().contains("symbol kernel"), "{}", ended.text());
}

#[test]
fn a_kernel_that_is_no_elf_file_is_loaded_by_its_address_fields() {
    let kernel = Kernel::build("report", &["-m32", "-DADDRESSES"]).converted("binary");
    finds_what_it_is_told(&kernel, 4);
}

#[test]
fn a_kernel_enters_long_mode_by_itself() {
    let options = ["-m64", "-mno-red-zone", "-DLONG_MODE"];
    finds_what_it_is_told(&Kernel::build("report", &options), 8);
    // as test kernels come, which loaders without 64-bit ELF are to take
    let kernel = Kernel::build("report", &options).converted("elf32-i386");
    finds_what_it_is_told(&kernel, 8);
}

#[test]
fn exceptions_and_interrupts_reach_a_32_bit_kernel() {
    let ended = Kernel::build("traps", &["-m32"]).run(&[]).expect(1);

    let expected = "divide error, code segment 18\n\
        eax after it 7\n\
        page fault at 40003004 code 2\n\
        stored 1234\n\
        interrupt, byte before return 80\n\
        ten ticks 1\n\
        spun\n";
    assert_eq!(ended.text(), expected);
}

#[test]
fn a_kernel_starts_the_other_processors_by_itself() {
    let kernel = Kernel::build("processors", &["-m32"]);

    let ended = kernel.run(&["--cpus", "4"]).expect(1);

    assert_eq!(ended.text(), "processors 4\ncounted 9c40\n");
}

#[test]
fn a_kernels_end_has_its_documented_status() {
    let kernel = Kernel::build("ending", &["-m32"]);
    for (way, status) in [
        ("reset", 0),
        ("keyboard", 0),
        ("power-off", 0),
        ("byte", 0x2a * 2 + 1),
        ("triple fault", TRIPLE_FAULT),
    ] {
        kernel.run(&["--append", way]).expect(status);
    }
}

#[test]
fn what_cannot_be_loaded_is_refused_with_the_reason() {
    let kernel = Kernel::build("ending", &["-m32"]);
    let refused = |options: &[&str], why: &str| {
        let ended = kernel.run(options).expect(NOT_STARTED);
        assert!(ended.stderr.contains(why), "{}", ended.stderr);
    };
    refused(&["--module", "/no/such/module"], "/no/such/module");
    refused(&["--memory", "1M"], "at least 2 MiB");
    refused(&["--module", "/dev/zero"], "modules");

    let mut broken = fs::read(&kernel.path).unwrap();
    let magic = 0x1bad_b002_u32.to_le_bytes();
    let header = broken.windows(4).position(|w| w == magic).unwrap();
    broken[header + 4] ^= 0xff;
    fs::write(&kernel.path, broken).unwrap();
    refused(&[], "checksum");
}
