//! How a run ended, and the exit status that says so. The one place where these numbers are.
//!
//! They are documented for users in `docs/run.md` and in `strata run --help`; a test holds
//! the three together.

use std::process::ExitCode;

/// How `strata` ended.
///
/// The numbers stay clear of what shells and commands use themselves: 0 to 127 are mostly a
/// command's own, 128 + n tells of signal n (n up to 64). 124 and 125 mean what they mean for
/// `timeout(1)` and `env(1)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The guest powered off or rebooted, or the user quit: 0.
    Done,
    /// The status of the command that ran in the guest.
    Command(u8),
    /// The guest wrote this value to the port of `--debug-exit`: twice the value and 1, of which
    /// the low byte is left.
    DebugExit(u32),
    /// `strata image` could not do what it was asked for: 1.
    Failed,
    /// `strata doctor` finds that this host cannot run guests: 1.
    Unfit,
    /// `strata disk check` finds that data may be lost: 2.
    DiskDamaged,
    /// `strata disk check` finds room that is not used and not free: 3.
    DiskLeaks,
    /// The time of `--timeout` was over: 124.
    Timeout,
    /// No machine was started: bad input, or the host lacks something: 125.
    NotStarted,
    /// Signal n ended `strata` itself: 128 + n.
    Signal(i32),
    /// The guest's kernel panicked: 240.
    KernelPanic,
    /// The guest's processor shut down on a triple fault: 241.
    TripleFault,
    /// The machine could not go on, through a fault of Strata or of the host: 242.
    MachineFailed,
    /// The guest ended before the command could be started: 243.
    CommandNotStarted,
}

impl End {
    /// The process exit status.
    pub(crate) fn status(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Command(status) => status,
            // As QEMU's isa-debug-exit has it, which test kernels are written for.
            Self::DebugExit(value) => (value << 1 | 1) as u8,
            Self::Failed | Self::Unfit => 1,
            Self::DiskDamaged => 2,
            Self::DiskLeaks => 3,
            Self::Timeout => 124,
            Self::NotStarted => 125,
            Self::Signal(number) => 128_u8.saturating_add(u8::try_from(number).unwrap_or(127)),
            Self::KernelPanic => 240,
            Self::TripleFault => 241,
            Self::MachineFailed => 242,
            Self::CommandNotStarted => 243,
        }
    }
}

impl End {
    /// What happened to a machine, in a word or two.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Done => "powered off",
            Self::Command(_) => "exited",
            Self::DebugExit(_) => "debug exit",
            Self::Timeout => "timed out",
            Self::Signal(_) => "stopped",
            Self::KernelPanic => "kernel panic",
            Self::TripleFault => "triple fault",
            Self::CommandNotStarted => "command not started",
            Self::NotStarted => "not started",
            Self::MachineFailed
            | Self::Failed
            | Self::Unfit
            | Self::DiskDamaged
            | Self::DiskLeaks => "failed",
        }
    }
}

impl From<End> for ExitCode {
    fn from(end: End) -> Self {
        Self::from(end.status())
    }
}

/// The part of `strata run --help` on exit statuses.
pub(crate) const HELP: &str = "\
Exit status:
  a command's  with -- CMD, an image or a shell: its own (126 not executable, 127 not found,
               128+n signal n)
  0            the guest powered off or rebooted, or Ctrl-A x
  V * 2 + 1    the guest wrote V to the port of --debug-exit
  2            wrong usage
  124          --timeout was over
  125          no machine was started: bad input, or the host lacks something
  128+n        signal n ended the command, or strata itself
  240          the guest's kernel panicked
  241          the guest's processor shut down on a triple fault
  242          the machine could not go on: a fault of Strata or of the host
  243          the guest ended before the command could be started";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commands_status_is_ours() {
        for status in [0, 1, 42, 127, 139, 255] {
            assert_eq!(End::Command(status).status(), status);
        }
    }

    #[test]
    fn a_debug_exit_is_told_as_test_kernels_expect() {
        let statuses = [0, 1, 0x10, 0x7f, 0x80, u32::MAX].map(|v| End::DebugExit(v).status());
        assert_eq!(statuses, [1, 3, 33, 255, 1, 255]);
    }

    #[test]
    fn a_signal_is_told_as_a_shell_tells_it() {
        assert_eq!(End::Signal(2).status(), 130);
        assert_eq!(End::Signal(15).status(), 143);
    }

    #[test]
    fn deaths_of_the_guest_are_distinct_and_above_all_signals() {
        let mut statuses = [
            End::KernelPanic,
            End::TripleFault,
            End::MachineFailed,
            End::CommandNotStarted,
        ]
        .map(End::status);
        assert!(statuses.iter().all(|s| *s > 128 + 64));
        statuses.sort_unstable();
        assert!(statuses.windows(2).all(|pair| pair[0] != pair[1]));
    }

    #[test]
    fn help_and_book_name_every_status() {
        let book = include_str!("../../../docs/run.md");
        for end in [
            End::Done,
            End::Timeout,
            End::NotStarted,
            End::KernelPanic,
            End::TripleFault,
            End::MachineFailed,
            End::CommandNotStarted,
        ] {
            let status = end.status().to_string();
            assert!(HELP.contains(&status), "help lacks {status}");
            assert!(
                book.contains(&format!("| {status} |")),
                "book lacks {status}"
            );
        }
    }
}
