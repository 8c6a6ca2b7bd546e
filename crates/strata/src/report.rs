//! What `strata` says on standard error, and its log.

use std::error::Error;
use std::io::{self, Write};

use serde::Serialize;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::streams::Stream;
use crate::terminal;

/// Writes one message to standard error, with the program's name before it.
pub(crate) fn say(message: &str) {
    let _ = writeln!(Stderr, "strata: {message}");
}

/// Writes an error with all its causes, each once.
pub(crate) fn say_error(error: &dyn Error) {
    say(&chain(error));
}

/// An error with its causes.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Some errors already repeat their cause in their own text.
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// Begins logging to standard error: warnings, or more with `--verbose`, or what `STRATA_LOG` says.
pub(crate) fn start_log(verbosity: u8) {
    let level = match verbosity {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_env("STRATA_LOG").unwrap_or_else(|_| EnvFilter::new(level));
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(|| Stderr)
        .with_ansi(false)
        .without_time()
        .try_init();
}

/// A value for programs to read.
pub(crate) fn json(value: &impl Serialize) -> String {
    serde_json::to_string_pretty(value).map_or_else(|error| error.to_string(), |text| text + "\n")
}

/// Rows as a table with a head, the columns as wide as they have to be.
pub(crate) fn table<const N: usize>(head: [&str; N], rows: &[[String; N]]) -> String {
    let mut widths = head.map(|text| text.chars().count());
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut text = String::new();
    for row in std::iter::once(&head.map(str::to_owned)).chain(rows) {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            let padding = width.saturating_sub(cell.chars().count()) + 2;
            line.push_str(cell);
            line.extend(std::iter::repeat_n(' ', padding));
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

/// Standard error, also right on a terminal in raw mode.
pub(crate) struct Stderr;

impl Write for Stderr {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if terminal::is_raw() {
            let mut text = Vec::with_capacity(bytes.len() + 16);
            for byte in bytes {
                if *byte == b'\n' {
                    text.push(b'\r');
                }
                text.push(*byte);
            }
            Stream::Stderr.write(&text)?;
        } else {
            Stream::Stderr.write(bytes)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Stderr {
    type Writer = Self;
    fn make_writer(&'a self) -> Self {
        Self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Fault {
        text: &'static str,
        #[source]
        cause: Option<Box<Fault>>,
    }

    fn fault(text: &'static str, cause: Option<Fault>) -> Fault {
        Fault {
            text,
            cause: cause.map(Box::new),
        }
    }

    #[test]
    fn an_error_is_told_with_its_causes() {
        let error = fault(
            "no disk",
            Some(fault("cannot open", Some(fault("denied", None)))),
        );
        assert_eq!(chain(&error), "no disk: cannot open: denied");
    }

    #[test]
    fn a_cause_is_told_once() {
        let error = fault("a.img: denied", Some(fault("denied", None)));
        assert_eq!(chain(&error), "a.img: denied");
    }
}
