//! A pseudo-terminal with `strata run` on it: the test is the person who types and reads.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{
    InputModes, LocalModes, OptionalActions, SpecialCodeIndex, Termios, Winsize, tcgetattr,
    tcsetattr, tcsetwinsize,
};

use crate::guest::Slot;

/// Nothing that these tests wait for takes this long.
const LIMIT: Duration = Duration::from_mins(2);
/// Between two looks at what changes without a word.
const PAUSE: Duration = Duration::from_millis(5);

/// The terminal's size, unlike any default.
pub(crate) const ROWS: u16 = 33;
pub(crate) const COLUMNS: u16 = 101;

/// A program on a terminal of its own; killed when dropped.
pub(crate) struct Session {
    child: Child,
    keyboard: File,
    /// Keeps the terminal's mode when the program has gone, as a shell would.
    terminal: OwnedFd,
    before: String,
    shown: Receiver<Vec<u8>>,
    screen: String,
    _slot: Option<Slot>,
}

impl Session {
    /// Starts `command` with a terminal as all three of its standard streams.
    pub(crate) fn start(command: Command) -> Self {
        Self::start_with(Some(Slot::take()), command)
    }

    /// The same for a command that runs no guest of its own.
    pub(crate) fn start_beside(command: Command) -> Self {
        Self::start_with(None, command)
    }

    fn start_with(slot: Option<Slot>, mut command: Command) -> Self {
        let (master, terminal) = open();
        let before = all_of(&set_up(&terminal));
        let stream = || Stdio::from(terminal.try_clone().unwrap());
        let child = command
            .stdin(stream())
            .stdout(stream())
            .stderr(stream())
            .env("TERM", "vt220")
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        let keyboard = File::from(master);
        let shown = read_all(keyboard.try_clone().unwrap());
        Self {
            child,
            keyboard,
            terminal,
            before,
            shown,
            screen: String::new(),
            _slot: slot,
        }
    }

    /// Gives the terminal another size, as a window manager does.
    pub(crate) fn resize(&self, rows: u16, columns: u16) {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&self.terminal, size).unwrap();
        // It is told to those who have it as their controlling terminal, which nobody has here.
        kill_process(Pid::from_child(&self.child), Signal::WINCH).unwrap();
    }

    pub(crate) fn type_keys(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).unwrap();
    }

    /// Reads until `text` is shown; gives all that was shown since the last call.
    #[track_caller]
    pub(crate) fn wait_for(&mut self, text: &str) -> String {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(at) = self.screen.find(text) {
                let rest = self.screen.split_off(at + text.len());
                return std::mem::replace(&mut self.screen, rest);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match self.shown.recv_timeout(left) {
                Ok(bytes) => self.screen += &String::from_utf8_lossy(&bytes),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    panic!("{text:?} is not shown after:\n{}", self.screen)
                }
            }
        }
    }

    /// Waits until every key goes to the guest: no line editing, no echo, no signals, no
    /// flow control, and Return is not Ctrl-J.
    #[track_caller]
    pub(crate) fn wait_until_raw(&self) {
        self.wait_for_mode("raw", |mode| {
            let cooked = LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
            let mangled = InputModes::IXON | InputModes::ICRNL;
            !mode.local_modes.intersects(cooked) && !mode.input_modes.intersects(mangled)
        });
    }

    /// Waits until the terminal's mode is exactly what it was before the program started.
    #[track_caller]
    pub(crate) fn wait_until_restored(&self) {
        self.wait_for_mode(&self.before, |mode| all_of(mode) == self.before);
    }

    #[track_caller]
    fn wait_for_mode(&self, what: &str, is_reached: impl Fn(&Termios) -> bool) {
        let deadline = Instant::now() + LIMIT;
        loop {
            let mode = tcgetattr(&self.terminal).unwrap();
            if is_reached(&mode) {
                return;
            }
            assert!(Instant::now() < deadline, "{mode:?}\nis not {what}");
            thread::sleep(PAUSE);
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Waits until the program is stopped, as a shell does that then shows its prompt.
    pub(crate) fn wait_until_stopped(&self) {
        waitid(WaitId::Pid(self.pid()), WaitIdOptions::STOPPED).unwrap();
    }

    /// Kills the second process that restores the terminal where the first cannot, so that
    /// the first is on its own.
    pub(crate) fn kill_guard(&self) {
        let pid = self.child.id();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        let guard = children.trim().parse().expect("one child, the guard");
        kill_process(Pid::from_raw(guard).unwrap(), Signal::KILL).unwrap();
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap()
    }

    /// Waits for the program's end: its exit status, or 128 + n after signal n, as shells
    /// have it. The terminal must be as it was before.
    #[track_caller]
    pub(crate) fn end(mut self) -> i32 {
        let status = self.wait();
        let mode = tcgetattr(&self.terminal).unwrap();
        assert_eq!(all_of(&mode), self.before);
        shell_status(status)
    }

    /// As [`Self::end`], but somebody else restores the terminal, maybe a moment later.
    #[track_caller]
    pub(crate) fn end_and_restored_later(mut self) -> i32 {
        let status = self.wait();
        self.wait_until_restored();
        shell_status(status)
    }

    #[track_caller]
    fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            let shown = self.shown.try_iter().flatten().collect::<Vec<u8>>();
            self.screen += &String::from_utf8_lossy(&shown);
            assert!(Instant::now() < deadline, "no end after:\n{}", self.screen);
            thread::sleep(PAUSE);
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // It has gone already unless a test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn shell_status(status: ExitStatus) -> i32 {
    status
        .code()
        .or_else(|| status.signal().map(|number| 128 + number))
        .unwrap()
}

/// Both ends of a new pseudo-terminal.
fn open() -> (OwnedFd, OwnedFd) {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap();
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let name: &CStr = &name;
    (
        master,
        rustix::fs::open(name, flags, Mode::empty()).unwrap(),
    )
}

/// A mode that somebody has chosen, so that restoring a default is not enough.
fn set_up(terminal: &OwnedFd) -> Termios {
    let mut mode = tcgetattr(terminal).unwrap();
    mode.local_modes.remove(LocalModes::ECHOE);
    mode.input_modes.insert(InputModes::IXANY);
    mode.special_codes[SpecialCodeIndex::VINTR] = 0x07;
    tcsetattr(terminal, OptionalActions::Now, &mode).unwrap();
    let size = Winsize {
        ws_row: ROWS,
        ws_col: COLUMNS,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(terminal, size).unwrap();
    tcgetattr(terminal).unwrap()
}

/// Every flag, character and speed of a mode.
fn all_of(mode: &Termios) -> String {
    format!("{mode:?}")
}

/// Takes what the program shows off the terminal, so that it never waits for a reader.
fn read_all(mut screen: File) -> Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        // An error is how a pseudo-terminal ends.
        while let Ok(count @ 1..) = screen.read(&mut buffer) {
            if sender.send(buffer[..count].to_vec()).is_err() {
                return;
            }
        }
    });
    receiver
}
