//! What a machine held of its host, for `strata run --stats`: memory by kind, and what was
//! translated. Called by `run` when the machine has ended and all of it is still there.
//!
//! What the kernel tells of the process's mappings counts; what vCPUs tell of their tables
//! only says which part of it is theirs.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};

use serde::Serialize;
use strata_vmm::Statistics;

use crate::cli::OutputForm;
use crate::report::{self, Stderr};

/// The names of the memfds that guest memory, translated code, and soft TLBs with jump caches are
/// in, as the kernel tells them (memfd_create(2)).
const GUEST: &str = "/memfd:strata-guest-memory";
const CODE: &str = "/memfd:strata-code";
const TABLES: &str = "/memfd:strata-tlb";

/// This process's mappings, opened before it is locked up.
pub(crate) struct Maps(File);

impl Maps {
    pub(crate) fn open() -> io::Result<Self> {
        File::open("/proc/self/smaps").map(Self)
    }

    fn read(mut self) -> io::Result<String> {
        let mut bytes = Vec::new();
        let mut part = [0; 4096];
        loop {
            match self.0.read(&mut part)? {
                0 => return Ok(String::from_utf8_lossy(&bytes).into_owned()),
                count => bytes.extend_from_slice(&part[..count]),
            }
        }
    }
}

/// Memory in KiB that is in use now.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize)]
struct Memory {
    /// The guest's own, as far as it was touched. Not in the total.
    guest: u64,
    /// Translated code.
    code_cache: u64,
    /// Tables about translated code.
    block_tables: u64,
    /// Soft TLBs and jump caches.
    address_spaces: u64,
    /// Devices, buffers, stacks, and what was freed but not given back.
    other: u64,
    /// The program and its libraries, which machines on the same host share.
    program: u64,
    /// All but the guest's own.
    total: u64,
}

/// What the vCPUs translated, in all.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize)]
struct Translation {
    blocks: u64,
    guest_bytes: u64,
    host_bytes: u64,
    cache_flushes: u64,
    departures: u64,
}

/// All that is told.
#[derive(Debug, Serialize)]
pub(crate) struct Stats {
    /// `None` where the kernel does not tell.
    memory_kib: Option<Memory>,
    translation: Translation,
}

impl Stats {
    /// Looks at the process, whose vCPUs gave these.
    pub(crate) fn take(maps: Maps, cpus: &[Statistics]) -> Self {
        let memory = maps.read().map(|text| Memory::of(&text, cpus));
        let memory = memory.inspect_err(|error| {
            report::say(&format!("cannot read /proc/self/smaps: {error}"));
        });
        let mut translation = Translation::default();
        for cpu in cpus {
            translation.blocks += cpu.blocks;
            translation.guest_bytes += cpu.guest_bytes;
            translation.host_bytes += cpu.host_bytes;
            translation.cache_flushes += cpu.flushes;
            translation.departures += cpu.departures;
        }
        Self {
            memory_kib: memory.ok(),
            translation,
        }
    }

    /// Writes them to standard error, as one line if it is for programs.
    pub(crate) fn tell(&self, form: OutputForm) {
        let text = match form {
            OutputForm::Text => self.to_string(),
            OutputForm::Json => serde_json::json!(self).to_string(),
        };
        let _ = writeln!(Stderr, "{}", text.trim_end());
    }
}

impl Memory {
    /// From the text of `/proc/PID/smaps` (proc(5)). Pages that this process maps twice count
    /// once, as in `Pss`; those it shares with other processes count whole, as in `Rss`.
    fn of(smaps: &str, cpus: &[Statistics]) -> Self {
        let mut memory = Self::default();
        let mut name = "";
        for line in smaps.lines() {
            let mut words = line.split_ascii_whitespace();
            let first = words.next().unwrap_or_default();
            let Some(field) = first.strip_suffix(':') else {
                // address, permissions, offset, device, inode, and perhaps a name
                name = words.nth(4).unwrap_or_default();
                continue;
            };
            let size: u64 = words.next().and_then(|n| n.parse().ok()).unwrap_or(0);
            match (field, name) {
                ("Pss", GUEST) => memory.guest += size,
                ("Pss", CODE) => memory.code_cache += size,
                ("Pss", TABLES) => memory.address_spaces += size,
                ("Rss", GUEST | CODE | TABLES) => {}
                ("Rss", _) if name.starts_with('/') => memory.program += size,
                ("Rss", _) => memory.other += size,
                _ => {}
            }
        }
        let kib = |bytes: usize| bytes as u64 / 1024;
        for cpu in cpus {
            memory.block_tables += kib(cpu.table_bytes);
        }
        memory.total = memory.code_cache + memory.address_spaces + memory.other + memory.program;
        memory.other = memory.other.saturating_sub(memory.block_tables);
        memory
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(memory) = &self.memory_kib {
            writeln!(f, "host memory beyond the guest's, KiB")?;
            for (name, size) in [
                ("code cache", memory.code_cache),
                ("block tables", memory.block_tables),
                ("TLBs and jump caches", memory.address_spaces),
                ("devices and other", memory.other),
                ("program, libraries", memory.program),
                ("total", memory.total),
            ] {
                writeln!(f, "  {name:<22}{size:>10}")?;
            }
            writeln!(f, "guest memory touched, KiB {:>8}", memory.guest)?;
        }
        let Translation {
            blocks,
            guest_bytes,
            host_bytes,
            cache_flushes,
            departures,
        } = self.translation;
        writeln!(f, "translated")?;
        for (name, count) in [
            ("blocks", blocks),
            ("guest bytes", guest_bytes),
            ("host bytes", host_bytes),
            ("cache flushes", cache_flushes),
            ("departures", departures),
        ] {
            writeln!(f, "  {name:<22}{count:>10}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
55d0-55d1 r-xp 00000000 08:01 42   /usr/bin/strata
Size:                900 kB
Rss:                 800 kB
Pss:                 400 kB
7f00-7f01 rw-p 00000000 00:00 0
Rss:                1000 kB
Pss:                1000 kB
7f02-7f03 rw-s 00000000 00:01 7    /memfd:strata-code (deleted)
Rss:                 300 kB
Pss:                 150 kB
7f04-7f05 r-xs 00000000 00:01 7    /memfd:strata-code (deleted)
Rss:                 300 kB
Pss:                 150 kB
7f05-7f06 rw-s 00000000 00:01 9    /memfd:strata-tlb (deleted)
Rss:                 200 kB
Pss:                 200 kB
7f06-7f07 rw-s 00000000 00:01 8    /memfd:strata-guest-memory (deleted)
Rss:               70000 kB
Pss:               70000 kB
7ffc-7ffd rw-p 00000000 00:00 0    [stack]
Rss:                  20 kB
Pss:                  20 kB
";

    #[test]
    fn memory_is_told_by_kind_and_the_guests_own_is_not_in_the_total() {
        let cpu = Statistics {
            table_bytes: 100 << 10,
            ..Statistics::default()
        };

        let memory = Memory::of(SMAPS, &[cpu]);

        let expected = Memory {
            guest: 70_000,
            code_cache: 300,
            block_tables: 100,
            address_spaces: 200,
            other: 920,
            program: 800,
            total: 2320,
        };
        assert_eq!(memory, expected);
    }

    #[test]
    fn the_form_for_programs_is_one_line() {
        let stats = Stats {
            memory_kib: Some(Memory::default()),
            translation: Translation::default(),
        };
        let line = serde_json::json!(stats).to_string();
        assert!(line.contains("\"total\":0") && !line.contains('\n'));
    }
}
