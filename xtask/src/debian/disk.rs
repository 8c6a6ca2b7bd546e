//! The root disk: Debian 12, minimal, with what the checks run. Made once by mmdebstrap and
//! mke2fs, which want root, and kept in `target/debian` until its recipe changes.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::packages::{self, Program};
use crate::{Error, checks, process};

const SUITE: &str = "bookworm";
const PACKAGES: &str = "systemd-sysv,udev,apt,python3,libpython3.11-testsuite,g++,stress-ng,\
     linux-perf";
/// The disk's size; what is not used takes no room on the host.
const SIZE: &str = "4G";

/// Where the C++ program of the checks is on the disk.
pub(super) const PROGRAM: &str = "/root/program.cc";

/// Run on the host for the new root directory, whose path is `$1`: a login shell on the
/// serial console without a password.
const SET_UP: &str = r#"#!/bin/sh
set -e
cd "$1"
echo strata >etc/hostname
echo '127.0.0.1 localhost strata' >etc/hosts
echo '/dev/vda / ext4 defaults 0 1' >etc/fstab
: >etc/machine-id
getty=etc/systemd/system/serial-getty@ttyS0.service.d
mkdir -p "$getty"
cat >"$getty/autologin.conf" <<'EOF'
[Service]
ExecStart=
ExecStart=-/sbin/agetty --autologin root --keep-baud 115200 - dumb
EOF
cat >root/program.cc <<'EOF'
"#;
const SOURCE: &str = include_str!("program.cc");

const MMDEBSTRAP: Program = Program {
    name: "mmdebstrap",
    package: "mmdebstrap debian-archive-keyring",
};
const MKE2FS: Program = Program {
    name: "mke2fs",
    package: "e2fsprogs",
};

/// The disk's image, which must not be written to. Made if it is not there, or is of
/// another recipe.
pub(super) fn provide() -> Result<PathBuf, Error> {
    let directory = directory()?;
    let image = directory.join("root.img");
    let recipe = directory.join("recipe");
    let now = format!("{SUITE}\n{PACKAGES}\n{SIZE}\n{}", set_up());
    if image.is_file() && fs::read_to_string(&recipe).is_ok_and(|made| made == now) {
        return Ok(image);
    }
    if !rustix::process::geteuid().is_root() {
        return Err(Error::Output(format!(
            "making Debian's root disk needs root; run this command as root once, or copy {} \
             from where it was made",
            directory.display()
        )));
    }
    packages::provide(&[MMDEBSTRAP, MKE2FS])?;
    eprintln!("Making Debian's root disk; this takes some minutes and fetches about 200 MB");
    let new = directory.join("root.new");
    make(&directory, &new)?;
    fs::write(&recipe, now).map_err(Error::file("write", &recipe))?;
    fs::rename(&new, &image).map_err(Error::file("name", &image))?;
    Ok(image)
}

/// Where the disk is kept and copied to.
pub(super) fn directory() -> Result<PathBuf, Error> {
    let directory = checks::target().join("debian");
    fs::create_dir_all(&directory).map_err(Error::file("create", &directory))?;
    Ok(directory)
}

/// A copy of `image` for one machine to write to.
pub(super) fn copy(image: &Path, to: &Path) -> Result<(), Error> {
    let mut cp = Command::new("cp");
    cp.args(["--sparse=always", "--reflink=auto"])
        .arg(image)
        .arg(to);
    process::succeed("cp", &mut cp)
}

fn set_up() -> String {
    format!("{SET_UP}{SOURCE}EOF\n")
}

fn make(directory: &Path, image: &Path) -> Result<(), Error> {
    let work = tempfile::tempdir_in(directory).map_err(Error::file("use", directory))?;
    let tree = work.path().join("root");
    let hook = work.path().join("set-up");
    fs::write(&hook, set_up())
        .and_then(|()| fs::set_permissions(&hook, Permissions::from_mode(0o755)))
        .map_err(Error::file("write", &hook))?;
    let mut mmdebstrap = Command::new(MMDEBSTRAP.require()?);
    mmdebstrap
        .args(["--quiet", "--mode=root", "--variant=minbase"])
        .arg(format!("--include={PACKAGES}"))
        .arg("--aptopt=Acquire::Languages \"none\"")
        // apt has something to simulate with
        .arg("--skip=cleanup/apt/lists")
        .arg(format!("--customize-hook={}", hook.display()))
        .arg(SUITE)
        .arg(&tree);
    process::succeed("mmdebstrap", &mut mmdebstrap)?;
    let _ = fs::remove_file(image);
    let mut mke2fs = Command::new(MKE2FS.require()?);
    mke2fs
        .args(["-q", "-t", "ext4", "-d"])
        .args([&tree, image])
        .arg(SIZE);
    process::succeed("mke2fs", &mut mke2fs)
}
