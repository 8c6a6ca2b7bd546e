//! What a process may do beyond its user's rights: given up.

use std::io;

use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::Role;

/// How many file descriptors the process may have. It opens none any more; what it has stays.
const DESCRIPTORS: u64 = 64;
/// Capabilities are numbered from 0 to at most this.
const LAST_CAPABILITY: u32 = 63;

pub(crate) fn enter(role: Role) -> Result<String, String> {
    let failed = |what: &'static str| move |error| format!("cannot {what}: {error}");
    // A core dump or a debugger of the same user would see the guest's memory.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(io::Error::from)
        .map_err(failed("turn off core dumps and tracing"))?;
    lower(Resource::Core, 0).map_err(failed("limit core dumps"))?;
    match role {
        Role::Machine => lower(Resource::Nofile, DESCRIPTORS),
        Role::Network => raise(Resource::Nofile),
    }
    .map_err(failed("limit file descriptors"))?;
    drop_capabilities()
        .map_err(io::Error::from)
        .map_err(failed("drop capabilities"))?;
    rustix::thread::set_no_new_privs(true)
        .map_err(io::Error::from)
        .map_err(failed("set no_new_privs"))?;
    Ok("no capabilities, no_new_privs".into())
}

/// Lowers a limit, for good.
fn lower(resource: Resource, most: u64) -> io::Result<()> {
    let Rlimit { current, maximum } = getrlimit(resource);
    let least = |limit: Option<u64>| Some(limit.map_or(most, |limit| limit.min(most)));
    let lowered = Rlimit {
        current: least(current),
        maximum: least(maximum),
    };
    Ok(setrlimit(resource, lowered)?)
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

fn drop_capabilities() -> rustix::io::Result<()> {
    rustix::thread::clear_ambient_capability_set()?;
    for number in 0..=LAST_CAPABILITY {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if rustix::thread::remove_capability_from_bounding_set(capability).is_err() {
            // The kernel has no more, or we have no right to it, and so nothing to lose.
            break;
        }
    }
    let none = CapabilitySet::empty();
    rustix::thread::set_capabilities(
        None,
        CapabilitySets {
            effective: none,
            permitted: none,
            inheritable: none,
        },
    )
}
