//! Frames on a stream, and the greeting before them.

use std::io::{self, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{Session, VERSION};

/// Longest message, bytes: more than a command line and an environment may take together, as
/// Linux limits a single argument to 128 KiB.
pub const MAX_FRAME: usize = 4 << 20;

/// What the first bytes of a connection and of a session are.
const MAGIC: [u8; 6] = *b"strata";

/// Why nothing, or nothing that makes sense, came from the other side.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The connection failed or ended in the middle.
    #[error("the connection broke")]
    Io(#[from] io::Error),

    /// The other side is not Strata.
    #[error("this is not Strata's protocol")]
    Foreign,

    /// It is an older or newer Strata.
    #[error("the other side speaks version {0} of the protocol, this one version {VERSION}")]
    Version(u16),

    /// A message is too long to be one.
    #[error("a message of {0} bytes")]
    Size(usize),

    /// A message cannot be read.
    #[error("a message that cannot be read")]
    Message(#[from] postcard::Error),
}

/// The first bytes on a connection, in both directions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Greeting {
    /// The version that the sender speaks.
    pub version: u16,
}

impl Greeting {
    /// What this side says.
    pub const OURS: Self = Self { version: VERSION };

    fn bytes(self) -> [u8; 8] {
        let mut bytes = [0; 8];
        bytes[..6].copy_from_slice(&MAGIC);
        bytes[6..].copy_from_slice(&self.version.to_le_bytes());
        bytes
    }

    /// Greets the other side.
    pub fn send(self, to: &mut impl Write) -> io::Result<()> {
        to.write_all(&self.bytes())?;
        to.flush()
    }

    /// Takes the other side's greeting; an error if it speaks another version.
    pub fn receive(from: &mut impl Read) -> Result<Self, Error> {
        let mut bytes = [0; 8];
        from.read_exact(&mut bytes)?;
        let [magic @ .., low, high] = bytes;
        let version = u16::from_le_bytes([low, high]);
        if magic != MAGIC {
            Err(Error::Foreign)
        } else if version != VERSION {
            Err(Error::Version(version))
        } else {
            Ok(Self { version })
        }
    }
}

/// Sends a message in one write.
pub fn write(to: &mut impl Write, message: &impl Serialize) -> Result<(), Error> {
    let mut frame = postcard::to_extend(message, vec![0; 4])?;
    let length = frame.len() - 4;
    if length > MAX_FRAME {
        return Err(Error::Size(length));
    }
    frame[..4].copy_from_slice(&(length as u32).to_le_bytes());
    to.write_all(&frame)?;
    to.flush()?;
    Ok(())
}

/// Takes the next message; `None` where the stream ends before one.
pub fn read<M: DeserializeOwned>(from: &mut impl Read) -> Result<Option<M>, Error> {
    let mut length = [0; 4];
    let mut filled = 0;
    while filled < length.len() {
        match from.read(&mut length[filled..]) {
            Ok(0) if filled == 0 => return Ok(None),
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    let length = u32::from_le_bytes(length) as usize;
    if length > MAX_FRAME {
        return Err(Error::Size(length));
    }
    // It grows with what comes, not with what was said.
    let mut frame = Vec::new();
    from.take(length as u64).read_to_end(&mut frame)?;
    if frame.len() < length {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    Ok(Some(postcard::from_bytes(&frame)?))
}

/// A session as the bytes of a file.
pub fn write_session(session: &Session) -> Result<Vec<u8>, Error> {
    let start = Greeting::OURS.bytes().to_vec();
    Ok(postcard::to_extend(session, start)?)
}

/// A session from the bytes of a file.
pub fn read_session(mut bytes: &[u8]) -> Result<Session, Error> {
    Greeting::receive(&mut bytes)?;
    Ok(postcard::from_bytes(bytes)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Input, Reply, Request, Run, Status, Stream, Streams};

    #[test]
    fn messages_come_back_one_by_one() {
        let sent = [
            Reply::Started { pid: 7 },
            Reply::Output(Stream::Stderr, b"\0\xff".to_vec()),
            Reply::Ended(Status::Signal(9)),
        ];
        let mut stream = Vec::new();
        for message in &sent {
            write(&mut stream, message).unwrap();
        }
        let mut from = stream.as_slice();
        for message in sent {
            assert_eq!(read::<Reply>(&mut from).unwrap(), Some(message));
        }
        assert_eq!(read::<Reply>(&mut from).unwrap(), None);
    }

    #[test]
    fn what_breaks_off_or_is_too_long_is_an_error() {
        let mut stream = Vec::new();
        write(&mut stream, &Input::Data(vec![1; 100])).unwrap();
        for length in 1..stream.len() {
            let result = read::<Input>(&mut &stream[..length]);
            assert!(matches!(result, Err(Error::Io(_))), "{length}");
        }
        let huge = u32::MAX.to_le_bytes();
        let result = read::<Input>(&mut huge.as_slice());
        assert!(matches!(result, Err(Error::Size(_))));
        let result = write(&mut Vec::new(), &Input::Data(vec![0; MAX_FRAME]));
        assert!(matches!(result, Err(Error::Size(_))));
    }

    #[test]
    fn any_bytes_are_a_message_or_an_error() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..20_000 {
            let mut frame = vec![0; 4];
            for _ in 0..state % 40 {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .rotate_left(17)
                    ^ 1;
                frame.push((state >> 56) as u8 & if state & 64 == 0 { 0xff } else { 7 });
            }
            state = state.wrapping_add(0x1234_5678_9abc_def1);
            let length = frame.len() as u32 - 4;
            frame[..4].copy_from_slice(&length.to_le_bytes());
            // Whatever is read can be sent, and is then read as the same.
            if let Ok(Some(request)) = read::<Request>(&mut frame.as_slice()) {
                let mut again = Vec::new();
                write(&mut again, &request).unwrap();
                assert_eq!(read(&mut again.as_slice()).unwrap(), Some(request));
            }
        }
    }

    #[test]
    fn another_version_is_told_from_another_protocol() {
        let newer = Greeting { version: 77 }.bytes();
        let result = Greeting::receive(&mut newer.as_slice());
        assert!(matches!(result, Err(Error::Version(77))));
        let result = Greeting::receive(&mut b"HTTP/1.1 200".as_slice());
        assert!(matches!(result, Err(Error::Foreign)));
        let mut ours = Vec::new();
        Greeting::OURS.send(&mut ours).unwrap();
        assert_eq!(
            Greeting::receive(&mut ours.as_slice()).unwrap(),
            Greeting::OURS
        );
    }

    #[test]
    fn a_session_is_the_same_in_the_guest() {
        let session = Session {
            name: Some("web".to_owned()),
            run: Run::Command {
                words: vec![b"cat".to_vec(), b"\xff".to_vec()],
                streams: Streams::Attached,
            },
            ..Session::default()
        };
        let bytes = write_session(&session).unwrap();
        assert_eq!(read_session(&bytes).unwrap(), session);
        assert!(read_session(&bytes[..bytes.len() - 1]).is_err());
    }
}
