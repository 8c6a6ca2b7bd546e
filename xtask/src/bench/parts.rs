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
/// Has it run the load for two CPUs.
pub(crate) const PARALLEL: &str = "bench=parallel";
/// Has it sleep for [`SLEEP`] seconds, between two words of its own.
pub(crate) const SLEEPS: &str = "bench=sleep";
/// Seconds that it sleeps.
pub(crate) const SLEEP: u32 = 10;
/// What it prints before it sleeps.
pub(crate) const ASLEEP: &str = "BENCH-ASLEEP";
/// What it prints after that.
pub(crate) const AWAKE: &str = "BENCH-AWAKE";

/// Files to boot and to run.
pub(crate) struct Parts {
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: PathBuf,
    /// The benchmark program, statically linked.
    pub(crate) program: PathBuf,
    /// The load for two CPUs, likewise.
    pub(crate) parallel: PathBuf,
    /// Guest memory, with a unit that both machines know.
    pub(crate) memory: String,
    /// Frequency of the host's time stamp counter.
    pub(crate) tsc_khz: u64,
    _directory: TempDir,
}

impl Parts {
    /// Compiles the program and puts the initramfs together.
    pub(crate) fn make(memory: &str) -> Result<Self, Error> {
        let directory = tempfile::tempdir()
            .map_err(Error::file("create a directory in", &std::env::temp_dir()))?;
        let program = directory.path().join("guest-bench");
        compile("guest-bench.c", &program)?;
        let parallel = directory.path().join("parallel");
        compile("parallel.c", &parallel)?;
        let tsc_khz = tsc_khz(directory.path())?;

        let appliance = Cache::of_user()?.appliance(&mut Lines)?;
        let initrd = directory.path().join("initrd");
        let mut bytes =
            fs::read(&appliance.initramfs).map_err(Error::file("read", &appliance.initramfs))?;
        let read = |path: &Path| fs::read(path).map_err(Error::file("read", path));
        bytes.extend(segment(&read(&program)?, &read(&parallel)?));
        fs::write(&initrd, bytes).map_err(Error::file("write", &initrd))?;
        Ok(Self {
            kernel: appliance.kernel,
            initrd,
            program,
            parallel,
            memory: memory.to_owned(),
            tsc_khz,
            _directory: directory,
        })
    }
}

/// Compiles one of the programs in the folder `bench`.
fn compile(source: &str, program: &Path) -> Result<(), Error> {
    let source = root().join("bench").join(source);
    let mut gcc = Command::new(packages::GCC.require()?);
    gcc.args(["-O2", "-static", "-pthread", "-o"])
        .arg(program)
        .arg(source);
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
fn segment(program: &[u8], parallel: &[u8]) -> Vec<u8> {
    // Linux hands words of its command line that it does not know to init's environment.
    let script = format!(
        "#!/bin/busybox sh\n\
         /bin/busybox mount -t proc proc /proc\n\
         /bin/busybox mount -t sysfs sysfs /sys\n\
         /bin/busybox mount -t devtmpfs dev /dev\n\
         echo {STARTED}\n\
         case $bench in\n\
         rows) /bench/guest-bench ;;\n\
         parallel) /bench/parallel ;;\n\
         sleep) echo {ASLEEP}; /bin/busybox sleep {SLEEP}; echo {AWAKE} ;;\n\
         esac\n\
         echo {DONE}\n\
         exec /bin/busybox reboot -f\n"
    );
    let mut archive = Archive::new();
    archive.directory("bench", 0o755);
    archive.file(SCRIPT, 0o755, script.as_bytes());
    archive.file("bench/guest-bench", 0o755, program);
    archive.file("bench/parallel", 0o755, parallel);
    archive.finish()
}
