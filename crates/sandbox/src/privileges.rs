//! What a process may do beyond its user's rights: given up.

use std::io;

use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::Role;

/// How many file descriptors the process may have. It opens none any more; what it has stays.
const DESCRIPTORS: u64 = 64;
/// The same for a process to which others connect.
const LISTENER_DESCRIPTORS: u64 = 64 + 1024;
/// Capabilities are numbered from 0 to at most this.
const LAST_CAPABILITY: u32 = 63;

/// What a root that serves files keeps: its rights to files, and to act as their owners.
const OF_FILES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID);

pub(crate) fn enter(role: Role<'_>) -> Result<String, String> {
    let failed = |what: &'static str| move |error| format!("cannot {what}: {error}");
    // A core dump or a debugger of the same user would see the guest's memory.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(io::Error::from)
        .map_err(failed("turn off core dumps and tracing"))?;
    limit(Resource::Core, 0).map_err(failed("limit core dumps"))?;
    match role {
        Role::Machine => limit(Resource::Nofile, DESCRIPTORS),
        Role::ListeningMachine => limit(Resource::Nofile, LISTENER_DESCRIPTORS),
        Role::Network | Role::Files(_) => raise(Resource::Nofile),
    }
    .map_err(failed("limit file descriptors"))?;
    let is_root = rustix::process::geteuid().is_root();
    let kept = match role {
        Role::Files(_) if is_root => OF_FILES,
        _ => CapabilitySet::empty(),
    };
    drop_capabilities(kept)
        .map_err(io::Error::from)
        .map_err(failed("drop capabilities"))?;
    rustix::thread::set_no_new_privs(true)
        .map_err(io::Error::from)
        .map_err(failed("set no_new_privs"))?;
    if kept.is_empty() {
        Ok("no capabilities, no_new_privs".into())
    } else {
        Ok("no capabilities but those for files, no_new_privs".into())
    }
}

/// Sets a limit for good, to `most` or the most that the user may have.
fn limit(resource: Resource, most: u64) -> io::Result<()> {
    let maximum = getrlimit(resource).maximum;
    let least = Some(maximum.map_or(most, |maximum| maximum.min(most)));
    let limited = Rlimit {
        current: least,
        maximum: least,
    };
    Ok(setrlimit(resource, limited)?)
}

/// Raises a limit as far as the user may.
fn raise(resource: Resource) -> io::Result<()> {
    let maximum = getrlimit(resource).maximum;
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    Ok(setrlimit(resource, raised)?)
}

/// Gives up all capabilities but those of `kept` that the process has.
fn drop_capabilities(kept: CapabilitySet) -> rustix::io::Result<()> {
    rustix::thread::clear_ambient_capability_set()?;
    for number in 0..=LAST_CAPABILITY {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if kept.contains(capability) {
            continue;
        }
        if rustix::thread::remove_capability_from_bounding_set(capability).is_err() {
            // The kernel has no more, or we have no right to it, and so nothing to lose.
            break;
        }
    }
    let left = kept & rustix::thread::capabilities(None)?.permitted;
    rustix::thread::set_capabilities(
        None,
        CapabilitySets {
            effective: left,
            permitted: left,
            inheritable: CapabilitySet::empty(),
        },
    )
}
