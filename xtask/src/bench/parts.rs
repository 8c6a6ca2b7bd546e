//! What the benchmark boots: the default appliance's kernel and initramfs, with the
//! benchmark program and a script added to the latter. Made once a run, in a directory
//! that goes away with it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use strata_image::{Archive, Cache};
use tempfile::TempDir;

use super::guests::LIMITS;
use crate::progress::Lines;
use crate::{Error, packages, process, root};

/// What the guest's script prints when user space has begun.
pub(crate) const STARTED: &str = "BENCH-STARTED";
/// What it prints when all is done.
pub(crate) const DONE: &str = "BENCH-DONE";
/// The script's place in the guest, for `rdinit=`.
pub(crate) const SCRIPT: &str = "/bench/init";
/// Added to the kernel command line, it has the script run the rows.
pub(crate) const ROWS: &str = "bench=rows";

/// Files to boot and to run.
pub(crate) struct Parts {
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: PathBuf,
    /// The benchmark program, statically linked.
    pub(crate) program: PathBuf,
    /// Frequency of the host's time stamp counter.
    pub(crate) tsc_khz: u64,
    _directory: TempDir,
}

impl Parts {
    /// Compiles the program and puts the initramfs together.
    pub(crate) fn make() -> Result<Self, Error> {
        let directory = tempfile::tempdir()
            .map_err(Error::file("create a directory in", &std::env::temp_dir()))?;
        let program = directory.path().join("guest-bench");
        compile("guest-bench.c", &program)?;
        let tsc_khz = tsc_khz(directory.path())?;

        let appliance = Cache::of_user()?.appliance(&mut Lines)?;
        let initrd = directory.path().join("initrd");
        let mut bytes =
            fs::read(&appliance.initramfs).map_err(Error::file("read", &appliance.initramfs))?;
        let code = fs::read(&program).map_err(Error::file("read", &program))?;
        bytes.extend(segment(&code));
        fs::write(&initrd, bytes).map_err(Error::file("write", &initrd))?;
        Ok(Self {
            kernel: appliance.kernel,
            initrd,
            program,
            tsc_khz,
            _directory: directory,
        })
    }
}

/// Compiles one of the programs in the folder `bench`.
fn compile(source: &str, program: &Path) -> Result<(), Error> {
    let source = root().join("bench").join(source);
    let mut gcc = Command::new(packages::GCC.require()?);
    gcc.args(["-O2", "-static", "-o"]).arg(program).arg(source);
    process::succeed("gcc", &mut gcc)
}

fn tsc_khz(directory: &Path) -> Result<u64, Error> {
    let program = directory.join("tsc-khz");
    compile("tsc-khz.c", &program)?;
    let done = process::measure("tsc-khz", &mut Command::new(program), LIMITS)?;
    let khz = done.output.trim().parse();
    khz.map_err(|_| Error::Output(format!("tsc-khz printed '{}'", done.output)))
}

/// The initramfs segment that follows the appliance's own.
fn segment(program: &[u8]) -> Vec<u8> {
    // Linux hands words of its command line that it does not know to init's environment.
    let script = format!(
        "#!/bin/busybox sh\n\
         /bin/busybox mount -t proc proc /proc\n\
         /bin/busybox mount -t sysfs sysfs /sys\n\
         /bin/busybox mount -t devtmpfs dev /dev\n\
         echo {STARTED}\n\
         [ \"$bench\" = rows ] && /bench/guest-bench\n\
         echo {DONE}\n\
         exec /bin/busybox reboot -f\n"
    );
    let mut archive = Archive::new();
    archive.directory("bench", 0o755);
    archive.file(SCRIPT, 0o755, script.as_bytes());
    archive.file("bench/guest-bench", 0o755, program);
    archive.finish()
}
