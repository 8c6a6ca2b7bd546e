//! How a machine ended: what to say, and the exit status.

use strata_vmm::Outcome;

use crate::command::Progress;
use crate::console::Tail;
use crate::exit::End;
use crate::report::say;
use crate::supervisor::Stop;

/// How much of a hidden console is shown when the guest dies, lines.
const SHOWN_ON_DEATH: usize = 60;

/// All that is known when a machine has ended.
pub(super) struct Ended<'a> {
    pub(super) outcome: Outcome,
    /// Why we stopped it, if we did.
    pub(super) stop: Option<&'a Stop>,
    /// What is known of the command, if there was to be one.
    pub(super) progress: Option<Progress>,
    /// Whoever used it did so on the console, and knows what they did.
    pub(super) on_console: bool,
    /// The console's last output, where the user has not seen it.
    pub(super) tail: Option<&'a Tail>,
}

impl Ended<'_> {
    /// Says what is to be said; gives the end and what there is to say of it.
    pub(super) fn tell(&self) -> (End, Option<String>) {
        let (end, message) = self.judge();
        if let Some(message) = &message {
            if let Some(tail) = self.tail
                && !matches!(end, End::Timeout | End::Done)
            {
                for line in tail.lines(SHOWN_ON_DEATH) {
                    eprintln!("{line}");
                }
            }
            say(message);
        }
        (end, message)
    }

    fn judge(&self) -> (End, Option<String>) {
        let died = |end, what: &str| (end, Some(what.to_owned()));
        match &self.outcome {
            Outcome::Panic => return died(End::KernelPanic, "the guest's kernel panicked"),
            Outcome::TripleFault => {
                return died(
                    End::TripleFault,
                    "the guest's processor shut down on a triple fault",
                );
            }
            Outcome::Failed(why) => {
                return (
                    End::MachineFailed,
                    Some(format!("the machine could not go on: {why}")),
                );
            }
            Outcome::Stopped => {
                return match self.stop {
                    Some(stop) => (stop.end(), stop.message()),
                    None => died(End::MachineFailed, "the machine stopped for no reason"),
                };
            }
            Outcome::DebugExit(value) => return (End::DebugExit(*value), None),
            Outcome::PowerOff | Outcome::Reset => {}
        }
        let Some(progress) = self.progress else {
            return (End::Done, None);
        };
        match progress.exit {
            Some(status) => (End::Command(status), None),
            None if progress.started && self.on_console => (End::Done, None),
            None if progress.started => died(
                End::Done,
                "the guest powered off or rebooted before the command ended",
            ),
            None => died(
                End::CommandNotStarted,
                "the guest ended before the command could be started",
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nothing is known of a command.
    const NOTHING: Progress = Progress {
        started: false,
        exit: None,
    };

    fn started(exit: Option<u8>) -> Progress {
        let started = true;
        Progress { started, exit }
    }

    fn ended(outcome: Outcome, progress: impl Into<Option<Progress>>) -> Ended<'static> {
        Ended {
            outcome,
            stop: None,
            progress: progress.into(),
            on_console: false,
            tail: None,
        }
    }

    fn judge(outcome: Outcome, progress: impl Into<Option<Progress>>) -> End {
        ended(outcome, progress).judge().0
    }

    #[test]
    fn power_off_and_reboot_end_a_run_well() {
        assert_eq!(judge(Outcome::PowerOff, None), End::Done);
        assert_eq!(judge(Outcome::Reset, None), End::Done);
    }

    #[test]
    fn a_commands_status_is_the_runs() {
        assert_eq!(judge(Outcome::PowerOff, started(Some(7))), End::Command(7));
    }

    #[test]
    fn a_command_that_powers_off_ends_the_run_well() {
        let mut ended = ended(Outcome::PowerOff, started(None));
        let (end, message) = ended.judge();
        assert_eq!(end, End::Done);
        assert!(message.is_some());
        ended.on_console = true;
        assert_eq!(ended.judge(), (End::Done, None));
    }

    #[test]
    fn a_guest_that_never_started_the_command_is_a_failure() {
        assert_eq!(judge(Outcome::PowerOff, NOTHING), End::CommandNotStarted);
        assert_eq!(judge(Outcome::Reset, NOTHING), End::CommandNotStarted);
    }

    #[test]
    fn a_debug_exit_is_the_guests_own_end() {
        assert_eq!(judge(Outcome::DebugExit(0), None).status(), 1);
    }

    #[test]
    fn death_of_the_guest_outweighs_the_commands_status() {
        let status = started(Some(0));
        assert_eq!(judge(Outcome::Panic, status), End::KernelPanic);
        assert_eq!(judge(Outcome::TripleFault, status), End::TripleFault);
        let failed = Outcome::Failed("x".into());
        assert_eq!(judge(failed, status), End::MachineFailed);
    }
}
