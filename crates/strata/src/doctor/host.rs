//! Facts about this host, as far as they matter to a guest. Reads; judges and changes nothing.

use std::arch::is_x86_feature_detected;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::thread;

use rustix::fs::{Access, MemfdFlags, memfd_create};

use crate::sandbox::{self, Found};

/// Bit of `AT_HWCAP2` by which Linux tells that user space may use FSGSBASE
/// (`arch/x86/include/uapi/asm/hwcap2.h`).
const HWCAP2_FSGSBASE: usize = 1 << 1;

/// What was found.
#[derive(Debug)]
pub(super) struct Host {
    pub(super) vendor: String,
    pub(super) model: String,
    pub(super) cpus: usize,
    pub(super) instructions: Vec<InstructionSet>,
    pub(super) kvm: KvmDevice,
    /// Bytes.
    pub(super) memory_available: Option<u64>,
    /// The control group's limit, bytes.
    pub(super) memory_limit: Option<u64>,
    pub(super) memfd: Result<(), String>,
    /// Value of the sysctl `vm.memfd_noexec`, where the kernel has it.
    pub(super) memfd_noexec: Option<u64>,
    /// What each layer of the sandbox finds here.
    pub(super) sandbox: Result<Vec<Found>, String>,
    pub(super) apt: Option<String>,
}

/// A group of instructions and what the host lacks of it.
#[derive(Debug)]
pub(super) struct InstructionSet {
    pub(super) name: &'static str,
    /// What it is good for.
    pub(super) use_of: &'static str,
    /// Whether guests cannot run without.
    pub(super) needed: bool,
    pub(super) missing: Vec<&'static str>,
}

/// What the permissions of /dev/kvm say.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum KvmDevice {
    Absent,
    Forbidden,
    Permitted,
}

impl Host {
    pub(super) fn examine() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name| field(&cpuinfo, name).unwrap_or("unknown").to_owned();
        Self {
            vendor: field("vendor_id"),
            model: field("model name"),
            cpus: thread::available_parallelism().map_or(1, usize::from),
            instructions: instructions(),
            kvm: kvm(),
            memory_available: fs::read_to_string("/proc/meminfo")
                .ok()
                .and_then(|text| memory_available(&text)),
            memory_limit: read_number("/sys/fs/cgroup/memory.max"),
            memfd: memfd_create("strata-doctor", MemfdFlags::CLOEXEC)
                .map(drop)
                .map_err(|error| error.to_string()),
            memfd_noexec: read_number("/proc/sys/vm/memfd_noexec"),
            sandbox: sandbox::probe().map_err(|error| error.to_string()),
            apt: strata_image::apt_version(),
        }
    }
}

fn instructions() -> Vec<InstructionSet> {
    let set = |name, use_of, needed, list: &[(&'static str, bool)]| InstructionSet {
        name,
        use_of,
        needed,
        missing: list
            .iter()
            .filter(|(_, has)| !has)
            .map(|(n, _)| *n)
            .collect(),
    };
    let fsgsbase = rustix::param::linux_hwcap().1 & HWCAP2_FSGSBASE != 0;
    vec![
        set(
            "x86-64-v2, XSAVE",
            "all that guests need",
            true,
            &[
                ("cmpxchg16b", is_x86_feature_detected!("cmpxchg16b")),
                ("popcnt", is_x86_feature_detected!("popcnt")),
                ("sse3", is_x86_feature_detected!("sse3")),
                ("ssse3", is_x86_feature_detected!("ssse3")),
                ("sse4.1", is_x86_feature_detected!("sse4.1")),
                ("sse4.2", is_x86_feature_detected!("sse4.2")),
                ("xsave", is_x86_feature_detected!("xsave")),
            ],
        ),
        set(
            "AVX2",
            "guests can use it",
            false,
            &[
                ("avx", is_x86_feature_detected!("avx")),
                ("avx2", is_x86_feature_detected!("avx2")),
            ],
        ),
        set(
            "BMI",
            "guests can use it",
            false,
            &[
                ("bmi1", is_x86_feature_detected!("bmi1")),
                ("bmi2", is_x86_feature_detected!("bmi2")),
                ("lzcnt", is_x86_feature_detected!("lzcnt")),
            ],
        ),
        set(
            "FSGSBASE",
            "there (guests have it in any case)",
            false,
            &[("fsgsbase", fsgsbase)],
        ),
    ]
}

fn kvm() -> KvmDevice {
    const DEVICE: &str = "/dev/kvm";
    match fs::metadata(DEVICE) {
        Err(_) => KvmDevice::Absent,
        // access(2) asks the permissions; the device is not opened.
        Ok(metadata)
            if metadata.rdev() != 0
                && rustix::fs::access(Path::new(DEVICE), Access::READ_OK | Access::WRITE_OK)
                    .is_ok() =>
        {
            KvmDevice::Permitted
        }
        Ok(_) => KvmDevice::Forbidden,
    }
}

fn read_number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The first value of a field in the form of `/proc/cpuinfo`.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == name)
        .map(|(_, value)| value.trim())
}

fn memory_available(meminfo: &str) -> Option<u64> {
    let kibibytes: u64 = field(meminfo, "MemAvailable")?
        .split_whitespace()
        .next()?
        .parse()
        .ok()?;
    Some(kibibytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_in_bytes() {
        let text = "MemTotal:  16000000 kB\nMemAvailable:    2048 kB\n";
        assert_eq!(memory_available(text), Some(2 << 20));
    }
}
