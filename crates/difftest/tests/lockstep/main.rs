//! The translator and the single-step path agree over a boot of Linux, block by block.
//!
//! ```text
//!   leader: whole blocks ──► Recorder ──► Machine          follower: instruction by instruction
//!      │                        │                               │
//!      └─ state after each ─────┴──► records ──► Replay ────────┴─► equal? memory too, at times
//! ```
//!
//! The leader's time passes with its steps, so that every run is the same run. The follower,
//! on memory of its own, is told what the leader was told; wherever the leader left a block it
//! must pass through the same state (`state` says which, and what is left out). Interrupts come
//! between the leader's blocks, and to the follower at the same instructions.
//! `STRATA_LOCKSTEP_INSTRUCTIONS` says how far, 0 to the end; `STRATA_LOCKSTEP_KERNEL` boots
//! another kernel than the default appliance's. That the comparison can fail is in `planted`.

mod compare;
mod difference;
mod machine;
mod planted;
mod record;
mod state;

use std::env;
use std::path::PathBuf;

use compare::Pair;
use strata_image::{Archive, Cache, Silent};
use strata_vmm::InitrdPart;

/// Instructions that are compared unless the environment says otherwise.
const INSTRUCTIONS: u64 = 50_000_000;
/// Guest memory, in bytes.
const MEMORY: u64 = 256 << 20;
/// The kernel's command line: nothing that both would have to be told of beside the bus.
const COMMAND_LINE: &str =
    "console=ttyS0 earlyprintk=ttyS0 panic=-1 no-kvmclock tsc_early_khz=1000000 rdinit=/lockstep";
/// What user space does: some processes, some files, some arithmetic, the end.
const INIT: &[u8] = b"#!/bin/sh
echo lockstep: user space
/bin/busybox --install -s
mount -t proc none /proc
cat /proc/cpuinfo | md5sum
find / -xdev -type f | gzip | sha1sum
awk 'BEGIN { for (i = 1; i < 2000; i++) s += 1 / i; print s }'
for i in 1 2 3 4 5; do echo $i | sed s/1/2/; done
echo lockstep: over
reboot -f
";
/// The last that user space says.
const OVER: &str = "lockstep: over";

#[test]
fn blocks_do_what_their_instructions_do_one_by_one() {
    let limit = env::var("STRATA_LOCKSTEP_INSTRUCTIONS")
        .map_or(INSTRUCTIONS, |text| text.parse().expect("a number"));
    let (kernel, initrd) = boot_files();
    let mut pair = Pair::new(MEMORY, |memory| {
        strata_vmm::load(&kernel, &initrd, COMMAND_LINE, memory).unwrap()
    });

    let (compared, machine) = pair.compare(limit);

    let compared = compared.unwrap_or_else(|difference| panic!("{difference}"));
    eprintln!("{compared:?}");
    if limit == 0 {
        assert!(machine.output().contains(OVER), "the guest did not end");
    } else {
        assert!(compared.instructions >= limit, "the guest ended early");
    }
}

/// The kernel, and the appliance's files with an init of our own.
fn boot_files() -> (PathBuf, Vec<InitrdPart>) {
    let appliance = Cache::of_user().unwrap().appliance(&mut Silent).unwrap();
    let kernel = env::var_os("STRATA_LOCKSTEP_KERNEL").map_or(appliance.kernel, PathBuf::from);
    let mut archive = Archive::new();
    archive.file("lockstep", 0o755, INIT);
    let initrd = vec![
        InitrdPart::File(appliance.initramfs),
        InitrdPart::Bytes(archive.finish()),
    ];
    (kernel, initrd)
}
