//! `strata cp`: files between this host and a guest.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use clap::Args;
use strata_protocol::{Copy, Error, Input, Joined, Pieces, Reply, Request, pack, unpack, write};

use super::agent::Agent;
use super::{Fault, find};

/// Arguments of `strata cp`.
#[derive(Debug, Args)]
pub(crate) struct CopyArgs {
    /// Keep users and groups of files that go into the guest; they are root's otherwise
    #[arg(short, long)]
    archive: bool,

    /// A path here, or MACHINE:PATH in a guest. A directory comes with all that is in it; with /. at
    /// the end only what is in it comes
    #[arg(value_name = "SOURCE")]
    source: OsString,

    /// A path in the other place. What exists as a directory is copied into
    #[arg(value_name = "TARGET")]
    target: OsString,
}

/// Copies.
pub(crate) fn copy(args: &CopyArgs) -> Result<(), Fault> {
    match (in_guest(&args.source), in_guest(&args.target)) {
        (Some((machine, path)), None) => fetch(&machine, path, Path::new(&args.target)),
        (None, Some((machine, path))) => put(&machine, Path::new(&args.source), path, args.archive),
        _ => Err(Fault::Usage(
            "one of both has to be in a guest, written as MACHINE:PATH, and the other here"
                .to_owned(),
        )),
    }
}

/// Takes `MACHINE:PATH` apart. What has a slash before its colon is a path of this host's.
fn in_guest(text: &OsStr) -> Option<(String, &OsStr)> {
    let bytes = text.as_bytes();
    let at = bytes.iter().position(|byte| matches!(byte, b':' | b'/'))?;
    if bytes[at] != b':' || at == 0 {
        return None;
    }
    let machine = std::str::from_utf8(&bytes[..at]).ok()?;
    Some((machine.to_owned(), OsStr::from_bytes(&bytes[at + 1..])))
}

fn broken(error: Error) -> io::Error {
    match error {
        Error::Io(error) => error,
        other => io::Error::other(other),
    }
}

fn fetch(machine: &str, path: &OsStr, to: &Path) -> Result<(), Fault> {
    let request = Request::CopyOut {
        path: path.as_bytes().to_vec(),
    };
    let mut agent = Agent::ask(&find(machine)?, &request)?;
    let mut refused = None;
    let mut pieces = Joined::new(|| match agent.reply() {
        Ok(Reply::Data(piece)) => Ok(Some(piece)),
        Ok(_) => Ok(None),
        Err(fault) => {
            refused = Some(fault);
            Err(io::ErrorKind::UnexpectedEof.into())
        }
    });
    let result = unpack(&mut pieces, to, false);
    drop(pieces);
    // What the guest said counts, not what it led to here.
    match (refused, result) {
        (Some(fault), _) => Err(fault),
        (None, result) => result.map_err(Fault::host(format!("write '{}'", to.display()))),
    }
}

fn put(machine: &str, from: &Path, path: &OsStr, keep_owner: bool) -> Result<(), Fault> {
    let request = Request::CopyIn(Copy {
        path: path.as_bytes().to_vec(),
        keep_owner,
    });
    // Before the guest is asked for anything.
    std::fs::symlink_metadata(from).map_err(Fault::host(format!("read '{}'", from.display())))?;
    let mut agent = Agent::ask(&find(machine)?, &request)?;
    let mut to = agent.writer()?;
    let mut pieces = Pieces::new(|piece| write(&mut to, &Input::Data(piece)).map_err(broken));
    let packed = pack(from, &mut pieces);
    drop(pieces);
    packed.map_err(Fault::host(format!("send '{}'", from.display())))?;
    write(&mut to, &Input::End).map_err(Fault::Broken)?;
    agent.reply().map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_colon_before_any_slash_names_a_machine() {
        let parse =
            |text| in_guest(OsStr::new(text)).map(|(m, p)| (m, p.to_str().unwrap().to_owned()));
        let some = |machine: &str, path: &str| Some((machine.to_owned(), path.to_owned()));
        assert_eq!(parse("web:/etc/hostname"), some("web", "/etc/hostname"));
        assert_eq!(parse("web:a:b"), some("web", "a:b"));
        assert_eq!(parse("./web:a"), None);
        assert_eq!(parse("/a:b"), None);
        assert_eq!(parse(":a"), None);
        assert_eq!(parse("."), None);
    }
}
