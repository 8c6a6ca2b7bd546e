//! Those of the host who take part in the main command.

use std::io::BufReader;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use rustix::event::PollFlags;
use rustix::process::{PidfdFlags, pidfd_open};
use strata_protocol::{Reply, Run, Streams};
use vsock::VsockStream;

use super::inlet::{Inlet, Taken, wait_for};
use super::{Agent, Answer, failed, main_command};

/// Where the main command's input goes, for all who attach; `None` where it has none of theirs, or no
/// more.
#[derive(Debug, Default)]
pub(super) struct MainInput(Mutex<Option<OwnedFd>>);

impl MainInput {
    pub(super) fn new(input: Option<OwnedFd>) -> Self {
        Self(Mutex::new(input))
    }

    fn get(&self) -> std::io::Result<Option<OwnedFd>> {
        let input = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        input.as_ref().map(OwnedFd::try_clone).transpose()
    }

    /// Nobody has more for it. A terminal is not closed by that.
    fn end(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl Agent {
    /// Gives the main command what the host has for it, until either has gone.
    pub(super) fn attach(&self, stream: &VsockStream, from: BufReader<&VsockStream>) -> Answer {
        let pid = main_command()?;
        let is_terminal = matches!(
            self.session.run,
            Run::Command {
                streams: Streams::Terminal(_),
                ..
            }
        );
        let watch = || -> std::io::Result<_> {
            let end = pidfd_open(pid, PidfdFlags::empty())?;
            let inlet = Inlet::new(pid, self.main_input.get()?, is_terminal, stream, from)?;
            Ok((end, inlet))
        };
        let (end, mut inlet) = watch().map_err(failed("watch the main command"))?;
        inlet.tell(&Reply::Started {
            pid: pid.as_raw_pid() as u32,
        });
        loop {
            if !inlet.has_message() {
                let [host, input] = inlet.waits_for();
                let watched = [Some((end.as_fd(), PollFlags::IN)), host, input];
                let [ended, host, input] =
                    wait_for(watched).map_err(failed("wait for the main command"))?;
                if input {
                    inlet.feed();
                }
                if ended {
                    return Ok(Reply::Done);
                }
                if !host {
                    continue;
                }
            }
            match inlet.take() {
                Taken::Message => {}
                Taken::End if is_terminal => {}
                Taken::End => self.main_input.end(),
                Taken::Gone => return Ok(Reply::Done),
            }
        }
    }
}
