//! Those of the host who take part in the main command.

use std::io::{self, BufReader};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rustix::event::PollFlags;
use rustix::process::{PidfdFlags, pidfd_open};
use strata_protocol::{Reply, Run, Streams};
use vsock::VsockStream;

use super::proxy::{Proxy, wait_for};
use super::{Agent, Answer, failed, main_command};

/// Where the main command's input goes, for all who attach: this alone keeps it open. `None` where it
/// has none of theirs, or no more.
#[derive(Debug)]
pub(super) struct MainInput(Mutex<Option<Arc<OwnedFd>>>);

impl MainInput {
    pub(super) fn new(input: Option<OwnedFd>) -> Self {
        Self(Mutex::new(input.map(Arc::new)))
    }

    fn get(&self) -> Weak<OwnedFd> {
        let input = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        input.as_ref().map_or_else(Weak::new, Arc::downgrade)
    }

    /// Nobody has more for it.
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
        let watch = || -> io::Result<_> {
            let end = pidfd_open(pid, PidfdFlags::empty())?;
            let proxy = Proxy::new(pid, self.main_input.get(), is_terminal, stream, from)?;
            Ok((end, proxy))
        };
        let (end, mut proxy) = watch().map_err(failed("watch the main command"))?;
        proxy.tell(&Reply::Started {
            pid: pid.as_raw_pid() as u32,
        });
        while !proxy.is_gone() {
            let [host, input] = proxy.waits_for();
            let watched = [Some((end.as_fd(), PollFlags::IN)), host, input];
            let [ended, host, input] = wait_for(watched, !proxy.has_message())
                .map_err(failed("wait for the main command"))?;
            proxy.serve(host, input);
            if proxy.input_is_over() {
                self.main_input.end();
            }
            if !ended.is_empty() {
                break;
            }
        }
        proxy.finish();
        Ok(Reply::Done)
    }
}
