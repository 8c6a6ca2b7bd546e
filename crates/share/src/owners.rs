//! Whose files are, on either side. Without privileges every file that is made belongs to the
//! user who serves it, so that user is shown as root, as in a user namespace with one user.

use std::io;

use fuse_backend_rs::api::filesystem::{Context, Entry, SetattrValid};
use libc::stat64;

/// What a file's owner is shown as who is not the user who serves it (`kernel.overflowuid`).
const NOBODY: u32 = 65534;

/// How the host's users and groups are those of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owners {
    /// They are the same, and the guest may change them. For a server that is root.
    Same,
    /// This user and group of the host are the guest's root, all others nobody.
    Root {
        /// The user.
        user: u32,
        /// The group.
        group: u32,
    },
}

impl Owners {
    /// What a server of this process's user can do.
    pub fn of_this_process() -> Self {
        let user = rustix::process::geteuid().as_raw();
        let group = rustix::process::getegid().as_raw();
        if user == 0 {
            Self::Same
        } else {
            Self::Root { user, group }
        }
    }

    /// `attributes` as the guest sees them.
    pub(crate) fn show(self, attributes: stat64) -> stat64 {
        let mut shown = attributes;
        if let Self::Root { user, group } = self {
            let id = |id, root| if id == root { 0 } else { NOBODY };
            shown.st_uid = id(attributes.st_uid, user);
            shown.st_gid = id(attributes.st_gid, group);
        }
        shown
    }

    /// An entry as the guest sees it.
    pub(crate) fn show_entry(self, entry: Entry) -> Entry {
        Entry {
            attr: self.show(entry.attr),
            ..entry
        }
    }

    /// In whose name a request is carried out.
    pub(crate) fn act_as(self, context: &mut Context) {
        if let Self::Root { .. } = self {
            // The user who serves; 0 tells the library to stay who it is.
            (context.uid, context.gid) = (0, 0);
        }
    }

    /// What is left to do of a request to change owners to those in `wanted`, where the guest sees
    /// `shown` now.
    pub(crate) fn change(
        self,
        shown: &stat64,
        wanted: &stat64,
        valid: SetattrValid,
    ) -> io::Result<SetattrValid> {
        if self == Self::Same {
            return Ok(valid);
        }
        let user = valid.contains(SetattrValid::UID) && wanted.st_uid != shown.st_uid;
        let group = valid.contains(SetattrValid::GID) && wanted.st_gid != shown.st_gid;
        if user || group {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        Ok(valid - (SetattrValid::UID | SetattrValid::GID))
    }
}
