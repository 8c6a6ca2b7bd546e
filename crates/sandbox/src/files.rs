//! Landlock: no file but those in a folder that is served, no TCP port, abstract socket or other
//! process can be reached any more. Files that are open stay as they are.

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, LandlockStatus,
    PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus,
    Scope,
};

use crate::{Folder, Role};

/// The newest version of Landlock that this was tested with. An older kernel's forbids less:
/// TCP from version 4 on, signals and abstract sockets from 6 on.
const TESTED: ABI = ABI::V7;

pub(crate) fn enter(role: Role<'_>) -> Result<String, String> {
    let files = match role {
        Role::Files(Folder { file: Some(_), .. }) => "no file but the one that is served",
        Role::Files(_) => "no files but the folder's",
        Role::Machine | Role::ListeningMachine | Role::Network => "no files",
    };
    let status = forbid_all(role).map_err(|error| error.to_string())?;
    match (status.ruleset, status.landlock) {
        (RulesetStatus::NotEnforced, LandlockStatus::NotEnabled) => {
            Err("turned off on this host (kernel parameter lsm=)".into())
        }
        (RulesetStatus::NotEnforced, _) => {
            Err("the host's kernel is without (Linux 5.13 or later has it)".into())
        }
        (_, LandlockStatus::Available { effective_abi, .. }) => {
            Ok(format!("{files} (ABI {})", effective_abi as i32))
        }
        _ => Ok(files.into()),
    }
}

/// Declares all kinds of access as governed by rules, and gives no rule but for the folder that
/// is served. TCP is a switch's trade.
fn forbid_all(role: Role<'_>) -> Result<landlock::RestrictionStatus, RulesetError> {
    let files = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(TESTED))?;
    let rules = match role {
        Role::Machine | Role::ListeningMachine | Role::Files(_) => {
            files.handle_access(AccessNet::from_all(TESTED))?
        }
        Role::Network => files,
    };
    let mut rules = rules.scope(Scope::from_all(TESTED))?.create()?;
    if let Role::Files(folder) = role {
        // In the working directory, also where the root directory is another by now.
        if let Ok(here) = PathFd::new(folder.file.unwrap_or(".")) {
            let mut access = served(folder.read_only);
            if folder.file.is_some() {
                access &= AccessFs::from_file(TESTED);
            }
            rules = rules.add_rule(PathBeneath::new(here, access))?;
        }
    }
    rules.restrict_self()
}

/// What a server does to files: everything but running them, controlling devices, and making some.
fn served(read_only: bool) -> BitFlags<AccessFs> {
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    if read_only {
        return read;
    }
    let others = AccessFs::Execute | AccessFs::IoctlDev | AccessFs::MakeChar | AccessFs::MakeBlock;
    read | (AccessFs::from_all(TESTED) & !others)
}
