//! `strata rm`: machines that are not needed any more.

use clap::Args;

use super::stop::end;
use super::{Fault, each};
use crate::exit::End;

/// Arguments of `strata rm`.
#[derive(Debug, Args)]
pub(crate) struct RemoveArgs {
    /// Running ones too, which end at once
    #[arg(short, long)]
    force: bool,

    /// The machines: names, or first digits of IDs
    #[arg(required = true, value_name = "MACHINE")]
    machines: Vec<String>,
}

/// Removes machines, with their disks and logs.
pub(crate) fn remove(args: &RemoveArgs) -> End {
    each(&args.machines, |machine| {
        if args.force && machine.state()?.is_running() {
            end(machine)?;
        }
        match machine.remove() {
            // One in the foreground goes by itself.
            Err(strata_machines::Error::Gone(_)) if args.force => Ok(()),
            result => result.map_err(Fault::from),
        }
    })
}
