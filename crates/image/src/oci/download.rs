//! The bytes of a layer from its source, kept in a file while they come, so that what a broken
//! connection or a killed process has fetched is not fetched again.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::oci::error::Error;
use crate::oci::source::{FoundLayer, Origin};
use crate::progress::Progress;

/// How often a source is asked again before any more bytes have come.
const ATTEMPTS: u32 = 5;

/// How long the first of those waits; each next one waits twice as long.
const FIRST_WAIT: Duration = Duration::from_millis(250);

/// Reads a layer: first what the file has of it, then what the source has.
pub(crate) struct Download<'a> {
    origin: &'a dyn Origin,
    layer: &'a FoundLayer,
    kept: Option<Kept>,
    stream: Option<Box<dyn Read + Send + 'a>>,
    position: u64,
    /// Failures since bytes came last.
    failures: u32,
    stop: &'a AtomicBool,
    progress: &'a mut (dyn Progress + Send),
}

/// The file that keeps what was fetched.
struct Kept {
    file: File,
    /// What of it has yet to be read.
    left: u64,
}

impl<'a> Download<'a> {
    /// `file` keeps what a remote source gives. `stop` ends the download when it is set.
    pub(crate) fn new(
        origin: &'a dyn Origin,
        layer: &'a FoundLayer,
        file: &Path,
        stop: &'a AtomicBool,
        progress: &'a mut (dyn Progress + Send),
    ) -> Result<Self, Error> {
        let kept = if origin.is_remote() {
            let open = OpenOptions::new()
                .read(true)
                .append(true)
                .create(true)
                .open(file);
            let file = open.map_err(Error::io("create the file", file))?;
            let mut left = file.metadata().map_err(Error::Data)?.len();
            if left > layer.size {
                file.set_len(0).map_err(Error::Data)?;
                left = 0;
            }
            Some(Kept { file, left })
        } else {
            None
        };
        Ok(Self {
            origin,
            layer,
            kept,
            stream: None,
            position: 0,
            failures: 0,
            stop,
            progress,
        })
    }

    fn read_kept(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(kept) = &mut self.kept else {
            return Ok(0);
        };
        let count = (&kept.file).take(kept.left).read(buffer)?;
        kept.left -= count as u64;
        Ok(count)
    }

    fn read_source(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let stream = match &mut self.stream {
            Some(stream) => stream,
            none => none.insert(
                self.origin
                    .layer(self.layer, self.position)
                    .map_err(io::Error::other)?,
            ),
        };
        let count = stream.read(buffer)?;
        if count == 0 && self.position < self.layer.size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let Some(kept) = &mut self.kept {
            kept.file.write_all(&buffer[..count])?;
        }
        Ok(count)
    }

    /// Whether to ask once more after `error`.
    fn try_again(&mut self, error: &io::Error) -> bool {
        self.stream = None;
        self.failures += 1;
        let inner = error.get_ref().and_then(|inner| inner.downcast_ref());
        let is_final = matches!(
            inner,
            Some(Error::NotFound { .. } | Error::Denied { .. } | Error::Credentials { .. })
        );
        if !self.origin.is_remote() || is_final || self.failures >= ATTEMPTS {
            return false;
        }
        tracing::info!(layer = %self.layer.diff_id, %error, "asking again");
        thread::sleep(FIRST_WAIT * (1 << self.failures));
        true
    }
}

impl Read for Download<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut count = self.read_kept(buffer)?;
        while count == 0 && self.position < self.layer.size {
            if self.stop.load(Ordering::Relaxed) {
                return Err(io::Error::other(Error::GivenUp));
            }
            match self.read_source(buffer) {
                Ok(read) => {
                    count = read;
                    self.failures = 0;
                }
                Err(error) if self.try_again(&error) => {}
                Err(error) => return Err(error),
            }
        }
        self.position += count as u64;
        self.progress.advance(self.position);
        Ok(count)
    }
}
