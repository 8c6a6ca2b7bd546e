//! Programs that are hard on a CPU, run on the host and in the guest: what they print must
//! be equal. Their sources are in the folder `programs`.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::disks::image_of;
use crate::guest::guest_with;
use crate::host::program;

/// Compiles the program `name`, runs it on both sides, and compares.
fn same_as_on_the_host(name: &str, options: &[&str]) {
    same_on_cpus(1, name, options);
}

/// As `same_as_on_the_host`, in a guest with this many vCPUs.
pub(crate) fn same_on_cpus(cpus: u8, name: &str, options: &[&str]) {
    let directory = tempfile::tempdir().unwrap();
    let content = directory.path().join("content");
    fs::create_dir(&content).unwrap();
    let binary = content.join(name);
    compile(name, options, &binary);
    let host = Command::new(&binary).output().unwrap();
    assert!(host.status.success(), "on the host: {host:?}");

    let (_image_directory, image) = image_of(&content);
    let disk = format!("{},ro", image.to_str().unwrap());
    let script = format!("mount -t ext4 -o ro,noload /dev/vda /mnt && exec /mnt/{name}");
    let ended = guest_with(
        &["--cpus", &cpus.to_string(), "--disk", &disk],
        &["sh", "-c", &script],
        b"",
    )
    .expect(0);

    assert_eq!(ended.text(), String::from_utf8(host.stdout).unwrap());
    assert_eq!(ended.stderr, "");
}

/// Compiles the program `name`, with nothing that it needs outside itself.
pub(crate) fn compile(name: &str, options: &[&str], binary: &Path) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/system/programs")
        .join(name)
        .with_extension("c");
    let mut gcc = Command::new(program("gcc"));
    gcc.args(["-O2", "-static", "-pthread"]).args(options);
    let gcc = gcc.arg("-o").arg(binary).arg(source).output().unwrap();
    assert!(
        gcc.status.success(),
        "{}",
        String::from_utf8_lossy(&gcc.stderr)
    );
}

#[test]
fn x87_and_mmx_give_the_hosts_bits() {
    same_as_on_the_host("x87", &[]);
}

/// Needs no 32-bit C library, which a host may lack.
#[test]
fn a_32_bit_program_gives_what_it_gives_on_the_host() {
    let options = [
        "-m32",
        "-nostdlib",
        "-ffreestanding",
        "-fno-pie",
        "-no-pie",
        "-fno-stack-protector",
    ];
    same_as_on_the_host("compat", &options);
}

#[test]
fn avx2_and_fma_give_the_hosts_bits() {
    let there = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
        && is_x86_feature_detected!("bmi2")
        && is_x86_feature_detected!("lzcnt");
    if !there {
        eprintln!("skipped: this host has no AVX2");
        return;
    }
    let options = [
        "-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt", "-msse4.2", "-mpopcnt",
    ];
    same_as_on_the_host("avx2", &options);
}

#[test]
fn a_hundred_thousand_signals_leave_all_registers_as_they_were() {
    same_as_on_the_host("signals", &[]);
}

#[test]
fn code_that_changes_itself_runs_as_changed() {
    same_as_on_the_host("patching", &[]);
}

#[test]
fn processes_threads_and_pipes_hold_under_stress() {
    same_as_on_the_host("processes", &[]);
}
