//! Copies that take long: they go on where they were interrupted, and are compared in the end.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::copy::{Copied, Part, each_part};
use crate::error::Result;
use crate::pieces::Crew;
use crate::{Buffers, Disk};

/// Bytes between two notes of how far it has come.
const STEP: u64 = 256 << 20;
/// Bytes that are compared at once.
const PIECE: u64 = 1 << 20;

/// Where it is noted how far a copy has come.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    /// What tells this copy from others.
    copy: String,
}

impl Journal {
    /// The journal in a file, of the copy that `copy` describes in one line.
    pub fn new(path: PathBuf, copy: &str) -> Self {
        Self {
            path,
            copy: copy.replace('\n', " "),
        }
    }

    /// How many bytes are done: 0, if the file is of another copy or there is none.
    pub fn done(&self) -> u64 {
        let text = fs::read_to_string(&self.path).unwrap_or_default();
        let mut lines = text.lines();
        let same = lines.next() == Some(&*self.copy);
        let done = lines.next().and_then(|line| line.parse().ok());
        done.filter(|_| same).unwrap_or(0)
    }

    fn note(&self, done: u64) -> io::Result<()> {
        let new = self.path.with_extension("new");
        let mut file = File::create(&new)?;
        writeln!(file, "{}\n{done}", self.copy)?;
        file.sync_all()?;
        fs::rename(new, &self.path)
    }

    fn forget(&self) -> io::Result<()> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

/// Copies all of `from` to `to`, which is at least as large, from where the journal says that it was
/// interrupted. What is done is durable before it is noted. `progress` is told how many bytes are done.
pub fn copy_on(
    from: &dyn Disk,
    to: &dyn Disk,
    journal: &Journal,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Copied> {
    let mut at = journal.done().min(from.size());
    let mut all = Copied::default();
    while at < from.size() {
        let end = from.size().min(at + STEP);
        let copied = each_part(
            from,
            at..end,
            to.unit(),
            Crew::Two,
            &|done| progress(at + done),
            &|at, part| match part {
                Part::Zeroes(length) => to.write_zeroes(at, length, true),
                Part::Data(bytes) => to.write(at, Buffers::from(bytes)),
            },
        )?;
        to.flush()?;
        journal.note(end)?;
        all.data += copied.data;
        all.zeroes += copied.zeroes;
        at = end;
    }
    journal.forget()?;
    Ok(all)
}

/// The first byte that is not the same on both disks, as far as the first goes; none, if all are.
pub fn first_difference(
    one: &dyn Disk,
    other: &dyn Disk,
    progress: &dyn Fn(u64),
) -> Result<Option<u64>> {
    let (mut here, mut there) = (vec![0; PIECE as usize], vec![0; PIECE as usize]);
    let size = one.size().min(other.size());
    let mut at = 0;
    while at < size {
        let length = PIECE.min(size - at) as usize;
        one.read(at, Buffers::from(&mut here[..length]))?;
        other.read(at, Buffers::from(&mut there[..length]))?;
        if here[..length] != there[..length] {
            let same = here.iter().zip(&there).take_while(|(a, b)| a == b).count();
            return Ok(Some(at + same as u64));
        }
        at += length as u64;
        progress(at);
    }
    Ok((one.size() > other.size()).then_some(size))
}

/// The journal of a copy, by default: in a folder of the user's for what programs remember.
pub fn journal_path(folder: &Path, from: &Path, to: &Path) -> PathBuf {
    let name = format!("{}--{}", from.display(), to.display());
    let name: String = name
        .chars()
        .map(|c| {
            if c.is_alphanumeric() || c == '.' {
                c
            } else {
                '-'
            }
        })
        .collect();
    // names of files have 255 bytes at most
    let start = name.char_indices().rev().nth(200).map_or(0, |(at, _)| at);
    folder.join(format!("{}.copy", &name[start..]))
}
