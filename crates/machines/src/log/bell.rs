//! Waiting for something to be written to a log.

use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, Reader, WatchFlags};

/// How often is looked where the kernel does not tell of writes: it is out of watches, or there is no
/// directory yet.
const LOOK: Duration = Duration::from_millis(50);

/// Rings when a log is written to. Silent before the first wait.
#[derive(Debug, Default)]
pub(super) struct Bell {
    /// `None` before the directory could be watched.
    watch: Option<OwnedFd>,
}

impl Bell {
    /// Waits until something may have been written in the log's `directory` since the last wait, no
    /// longer than `time`.
    pub(super) fn wait(&mut self, directory: &Path, time: Duration) {
        let Some(watch) = &self.watch else {
            self.watch = watch(directory);
            if self.watch.is_none() {
                thread::sleep(time.min(LOOK));
            }
            // What was written before the watch was there has to be looked for once more.
            return;
        };
        let time = Timespec::try_from(time).ok();
        let rings = poll(&mut [PollFd::new(watch, PollFlags::IN)], time.as_ref());
        if rings.is_ok_and(|count| count > 0) {
            // One look suffices for all that has been told.
            let mut buffer = [MaybeUninit::uninit(); 4096];
            let mut reader = Reader::new(watch, &mut buffer);
            while reader.next().is_ok() {}
        }
    }
}

fn watch(directory: &Path) -> Option<OwnedFd> {
    let watch = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).ok()?;
    let events = WatchFlags::MODIFY | WatchFlags::CREATE;
    inotify::add_watch(&watch, directory, events).ok()?;
    Some(watch)
}
