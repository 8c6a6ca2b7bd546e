//! Programs of the host that tests and benchmarks need, and the Debian packages that have
//! them. Called by the commands before they begin.

use std::env;
use std::path::PathBuf;
use std::process::Command;

use crate::{Error, process};

/// A program that is needed, and where Debian has it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Program {
    /// What it is called as.
    pub(crate) name: &'static str,
    /// The Debian package.
    pub(crate) package: &'static str,
}

/// C compiler, with the static C library that guest programs are linked with.
pub(crate) const GCC: Program = Program {
    name: "gcc",
    package: "gcc libc6-dev",
};
/// The peer of the benchmarks.
pub(crate) const QEMU: Program = Program {
    name: "qemu-system-x86_64",
    package: "qemu-system-x86",
};

/// Measures networks.
pub(crate) const IPERF3: Program = Program {
    name: "iperf3",
    package: "iperf3",
};

/// Disk images, as the peer has them.
pub(crate) const QEMU_IMG: Program = Program {
    name: "qemu-img",
    package: "qemu-utils",
};

/// What the tests need.
pub(crate) const FOR_TESTS: &[Program] = &[
    GCC,
    Program {
        name: "strace",
        package: "strace",
    },
    Program {
        name: "ip",
        package: "iproute2",
    },
    Program {
        name: "nft",
        package: "nftables",
    },
    Program {
        name: "mke2fs",
        package: "e2fsprogs",
    },
    QEMU_IMG,
    Program {
        name: "sfdisk",
        package: "fdisk",
    },
    Program {
        name: "fsck.erofs",
        package: "erofs-utils",
    },
    Program {
        name: "skopeo",
        package: "skopeo",
    },
    Program {
        name: "docker-registry",
        package: "docker-registry",
    },
    Program {
        name: "setpriv",
        package: "util-linux",
    },
    Program {
        name: "xz",
        package: "xz-utils",
    },
    Program {
        name: "zstd",
        package: "zstd",
    },
];

impl Program {
    /// Where it is, searching also where administrators' programs are.
    pub(crate) fn find(self) -> Option<PathBuf> {
        let path = env::var_os("PATH").unwrap_or_default();
        env::split_paths(&path)
            .chain(["/usr/sbin".into(), "/sbin".into()])
            .map(|directory| directory.join(self.name))
            .find(|file| file.is_file())
    }

    /// Where it is, or the error that says how to get it.
    pub(crate) fn require(self) -> Result<PathBuf, Error> {
        self.find().ok_or(Error::Missing {
            program: self.name,
            package: self.package,
        })
    }
}

/// Installs what is missing of `programs` where this process may; else says which package
/// the first missing one needs.
pub(crate) fn provide(programs: &[Program]) -> Result<(), Error> {
    let missing: Vec<Program> = programs
        .iter()
        .copied()
        .filter(|program| program.find().is_none())
        .collect();
    let Some(first) = missing.first() else {
        return Ok(());
    };
    let names: Vec<&str> = missing
        .iter()
        .flat_map(|program| program.package.split(' '))
        .collect();
    if !rustix::process::geteuid().is_root() {
        return first.require().map(drop);
    }
    eprintln!("Installing {}", names.join(" "));
    let apt = || {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive").arg("-qq");
        command
    };
    process::succeed("apt-get update", apt().arg("update"))?;
    let mut install = apt();
    install
        .args(["install", "--yes", "--no-install-recommends"])
        .args(&names);
    process::succeed("apt-get install", &mut install)?;
    missing.iter().try_for_each(|p| p.require().map(drop))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_names_its_package() {
        let program = Program {
            name: "no-such-program",
            package: "its-package",
        };
        let error = program.require().unwrap_err().to_string();
        assert!(error.contains("apt-get install its-package"), "{error}");
    }
}
