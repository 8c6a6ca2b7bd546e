//! Files that go between the host and the guest, as tar streams.

use std::io::{self, Read};
use std::path::Path;

use strata_protocol::{Copy, Error, Input, Joined, Pieces, Reply, pack, read, unpack, write};
use vsock::VsockStream;

use super::{Answer, failed};
use crate::place::word;

/// Where paths of the host's are taken from if they are relative.
const ROOT: &str = "/";

fn broken(error: Error) -> io::Error {
    match error {
        Error::Io(error) => error,
        other => io::Error::other(other),
    }
}

/// Sends a file or directory.
pub(super) fn send(path: &[u8], to: &VsockStream) -> Answer {
    let path = Path::new(ROOT).join(word(path));
    let mut to = to;
    let mut pieces = Pieces::new(|piece| write(&mut to, &Reply::Data(piece)).map_err(broken));
    pack(&path, &mut pieces).map_err(failed("send it"))?;
    Ok(Reply::Done)
}

/// Takes what the host sends.
pub(super) fn receive(copy: &Copy, from: &mut impl Read) -> Answer {
    let path = Path::new(ROOT).join(word(&copy.path));
    let mut pieces = Joined::new(|| match read(&mut *from).map_err(broken)? {
        Some(Input::Data(piece)) => Ok(Some(piece)),
        Some(Input::End) => Ok(None),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    });
    let result = unpack(&mut pieces, &path, copy.keep_owner);
    // The host hears of it only when it has sent all.
    let rest = io::copy(&mut pieces, &mut io::sink());
    result
        .and(rest.map(drop))
        .map_err(failed(format!("write '{}'", path.display())))?;
    Ok(Reply::Done)
}
