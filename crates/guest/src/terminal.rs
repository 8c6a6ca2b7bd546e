//! Terminals for programs: pairs of which one end is a terminal. Called by `init` and by the agent.

use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use strata_protocol::Size;

/// A terminal of this size: the end that shows and types, and the program's.
pub(crate) fn open(size: Size) -> Result<(OwnedFd, OwnedFd), Errno> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let terminal = ioctl_tiocgptpeer(&master, flags)?;
    set_size(&master, size);
    Ok((master, terminal))
}

/// Tells a terminal, by either of its ends, how large it is, and what runs on it if that is new.
pub(crate) fn set_size(terminal: &impl AsFd, size: Size) {
    let size = Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // A terminal that has gone needs no size.
    let _ = tcsetwinsize(terminal, size);
}
