//! Landlock: no file, TCP port, abstract socket or other process can be reached any more. Files
//! that are open stay as they are.

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, LandlockStatus, Ruleset,
    RulesetAttr, RulesetError, RulesetStatus, Scope,
};

use crate::Role;

/// The newest version of Landlock that this was tested with. An older kernel's forbids less:
/// TCP from version 4 on, signals and abstract sockets from 6 on.
const TESTED: ABI = ABI::V7;

pub(crate) fn enter(role: Role) -> Result<String, String> {
    let status = forbid_all(role).map_err(|error| error.to_string())?;
    match (status.ruleset, status.landlock) {
        (RulesetStatus::NotEnforced, LandlockStatus::NotEnabled) => {
            Err("turned off on this host (kernel parameter lsm=)".into())
        }
        (RulesetStatus::NotEnforced, _) => {
            Err("the host's kernel is without (Linux 5.13 or later has it)".into())
        }
        (_, LandlockStatus::Available { effective_abi, .. }) => {
            Ok(format!("no files (ABI {})", effective_abi as i32))
        }
        _ => Ok("no files".into()),
    }
}

/// Declares all kinds of access as governed by rules, and gives no rule. TCP is a switch's trade.
fn forbid_all(role: Role) -> Result<landlock::RestrictionStatus, RulesetError> {
    let files = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(TESTED))?;
    let rules = match role {
        Role::Machine | Role::ListeningMachine => {
            files.handle_access(AccessNet::from_all(TESTED))?
        }
        Role::Network => files,
    };
    rules
        .scope(Scope::from_all(TESTED))?
        .create()?
        .restrict_self()
}
