//! Disk images: `strata disk convert` and Debian's `qemu-img convert`, in turn, on the same images; and
//! how long `strata disk clone` takes.
//!
//! Both leave it to the host when the copy becomes durable: for qemu-img that is `-t unsafe`, what it
//! does if nothing is said, and for Strata what it always does with a copy, which can be made again.
//! Both read through the host's cache, where the images are from the first, unmeasured runs on. The
//! copies of those are compared with what they are copies of.

use std::fmt;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Serialize;
use tempfile::TempDir;

use super::guests::LIMITS;
use crate::{Error, packages, process};

/// Bytes of the disk that is copied, and of the one that is compressed.
const SIZE: u64 = 4 << 30;
const SMALL: u64 = 512 << 20;
/// Data and holes take turns, in stretches of so many bytes.
const STRETCH: u64 = 16 << 20;
/// Clock ticks of Linux's /proc in a second (`USER_HZ`).
const TICKS: f64 = 100.0;

/// Who converts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Strata,
    Qemu,
}

/// What a run took, in seconds: of the clock, and of all CPUs.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Took {
    wall: f64,
    cpu: f64,
}

/// One conversion: medians.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    name: &'static str,
    strata: Took,
    qemu: Took,
}

/// All that was measured.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Disk {
    rows: Vec<Row>,
    /// Seconds that a clone took, the whole process.
    clone: Option<f64>,
}

impl fmt::Display for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let heads = ["Strata s", "qemu-img s", "ratio", "CPU s", "CPU s", "ratio"];
        write!(f, "{:<24}", "disk convert")?;
        for head in heads {
            write!(f, "{head:>11}")?;
        }
        writeln!(f)?;
        for Row { name, strata, qemu } in &self.rows {
            write!(f, "{name:<24}")?;
            for (strata, qemu) in [(strata.wall, qemu.wall), (strata.cpu, qemu.cpu)] {
                write!(f, "{strata:>11.2}{qemu:>11.2}{:>11.2}", strata / qemu)?;
            }
            writeln!(f)?;
        }
        match self.clone {
            Some(seconds) => writeln!(f, "a clone takes {:.1} ms", seconds * 1000.0),
            None => Ok(()),
        }
    }
}

/// One thing to measure.
struct Conversion {
    name: &'static str,
    /// Names of files.
    from: &'static str,
    to: &'static str,
    /// How it is compressed, if at all.
    packing: Option<&'static str>,
}

const fn plain(name: &'static str, from: &'static str, to: &'static str) -> Conversion {
    Conversion {
        name,
        from,
        to,
        packing: None,
    }
}

const fn packed(name: &'static str, packing: &'static str) -> Conversion {
    Conversion {
        name,
        from: "small.raw",
        to: "copy.qcow2",
        packing: Some(packing),
    }
}

const CONVERSIONS: [Conversion; 7] = [
    plain("raw to qcow2", "disk.raw", "copy.qcow2"),
    plain("qcow2 to raw", "disk.qcow2", "copy.raw"),
    plain("qcow2 to qcow2", "disk.qcow2", "copy.qcow2"),
    packed("raw to qcow2, zlib", "zlib"),
    packed("raw to qcow2, zstd", "zstd"),
    plain("qcow2, zlib, to raw", "zlib.qcow2", "copy.raw"),
    plain("qcow2, zstd, to raw", "zstd.qcow2", "copy.raw"),
];

/// Measures all conversions `runs` times on both sides, or once more, in turn.
pub(crate) fn measure(strata: &Path, runs: u32) -> Result<Disk, Error> {
    packages::provide(&[packages::QEMU_IMG])?;
    // on hosts that take freed memory away, every other run may find none: as many of each side
    let runs = runs.next_multiple_of(2);
    let bench = Bench::make(strata)?;
    let rows = CONVERSIONS.iter().map(|what| bench.row(what, runs));
    let rows = rows.collect::<Result<_, _>>()?;
    let mut clones = Vec::new();
    for _ in 0..runs.max(5) {
        let mut command = Command::new(strata);
        command.args(["disk", "clone"]);
        command.arg(bench.path("disk.qcow2"));
        command.arg(bench.path("clone.qcow2"));
        clones.push(process::measure("strata disk clone", &mut command, LIMITS)?);
        bench.remove("clone.qcow2")?;
    }
    Ok(Disk {
        rows,
        clone: median(clones.iter().map(|done| done.wall.as_secs_f64())),
    })
}

/// The programs, and where the images are.
struct Bench {
    strata: PathBuf,
    qemu_img: PathBuf,
    directory: TempDir,
}

impl Bench {
    fn make(strata: &Path) -> Result<Self, Error> {
        let directory = tempfile::tempdir()
            .map_err(Error::file("create a directory in", &std::env::temp_dir()))?;
        let bench = Self {
            strata: strata.to_owned(),
            qemu_img: packages::QEMU_IMG.require()?,
            directory,
        };
        eprintln!("making images");
        for (name, size) in [("disk.raw", SIZE), ("small.raw", SMALL)] {
            let path = bench.path(name);
            fill(&path, size).map_err(Error::file("write", &path))?;
        }
        let images = [
            ("disk.raw", "disk.qcow2", None),
            ("small.raw", "zlib.qcow2", Some("zlib")),
            ("small.raw", "zstd.qcow2", Some("zstd")),
        ];
        for (from, to, packing) in images {
            let what = Conversion {
                name: "",
                from,
                to,
                packing,
            };
            process::succeed("qemu-img", &mut bench.command(&what, Side::Qemu))?;
        }
        Ok(bench)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn remove(&self, name: &str) -> Result<(), Error> {
        let path = self.path(name);
        fs::remove_file(&path).map_err(Error::file("remove", &path))
    }

    fn command(&self, what: &Conversion, side: Side) -> Command {
        let format = |name: &str| {
            let extension = Path::new(name).extension();
            extension.unwrap_or_default().to_owned()
        };
        let mut command;
        match side {
            Side::Strata => {
                command = Command::new(&self.strata);
                command.args(["disk", "convert"]);
                if let Some(packing) = what.packing {
                    command.args(["--compress", "--compression", packing]);
                }
            }
            Side::Qemu => {
                command = Command::new(&self.qemu_img);
                command.args(["convert", "-t", "unsafe", "-T", "writeback", "-f"]);
                command
                    .arg(format(what.from))
                    .arg("-O")
                    .arg(format(what.to));
                if let Some(packing) = what.packing {
                    command.args(["-c", "-o", &format!("compression_type={packing}")]);
                }
            }
        }
        command.arg(self.path(what.from)).arg(self.path(what.to));
        command
    }

    /// Converts on both sides: once to see that it is done right, then to see how fast.
    fn row(&self, what: &Conversion, runs: u32) -> Result<Row, Error> {
        let mut sides = [Side::Strata, Side::Qemu];
        for side in sides {
            process::measure(what.name, &mut self.command(what, side), LIMITS)?;
            let mut compare = Command::new(&self.qemu_img);
            compare.args(["compare", "-q"]);
            compare.arg(self.path(what.from)).arg(self.path(what.to));
            process::succeed("qemu-img compare", &mut compare)?;
            self.remove(what.to)?;
        }
        let mut seen: [Vec<Took>; 2] = Default::default();
        for run in 1..=runs {
            // each side is first as often as second
            sides.reverse();
            for side in sides {
                let before = cpu_of_children()?;
                let done = process::measure(what.name, &mut self.command(what, side), LIMITS)?;
                let took = Took {
                    wall: done.wall.as_secs_f64(),
                    cpu: cpu_of_children()? - before,
                };
                eprintln!("{} {run}/{runs} {side:?}: {took:?}", what.name);
                seen[side as usize].push(took);
                self.remove(what.to)?;
            }
        }
        let of = |side: Side| Took {
            wall: median(seen[side as usize].iter().map(|took| took.wall)).unwrap_or_default(),
            cpu: median(seen[side as usize].iter().map(|took| took.cpu)).unwrap_or_default(),
        };
        Ok(Row {
            name: what.name,
            strata: of(Side::Strata),
            qemu: of(Side::Qemu),
        })
    }
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let last = values.len().checked_sub(1)?;
    Some(f64::midpoint(values[last / 2], values[last.div_ceil(2)]))
}

/// Seconds of CPUs that processes took which this one started, and which have ended: proc(5),
/// `/proc/pid/stat`, fields 16 and 17.
fn cpu_of_children() -> Result<f64, Error> {
    let path = Path::new("/proc/self/stat");
    let text = fs::read_to_string(path).map_err(Error::file("read", path))?;
    // the second field is a name in parentheses
    let rest = text.rsplit(')').next().unwrap_or_default();
    let fields = rest.split_whitespace().skip(13).take(2);
    let ticks: f64 = fields.filter_map(|field| field.parse::<f64>().ok()).sum();
    Ok(ticks / TICKS)
}

/// Writes a disk half of which is holes. Of what is between them every other stretch is noise, and
/// the rest text.
fn fill(path: &Path, size: u64) -> std::io::Result<()> {
    let file = File::create(path)?;
    file.set_len(size)?;
    let mut noise = Noise(1);
    let mut bytes = Vec::with_capacity(STRETCH as usize);
    for (number, at) in (0..size).step_by(STRETCH as usize).enumerate() {
        bytes.clear();
        match number % 4 {
            0 => {
                while bytes.len() < STRETCH as usize {
                    bytes.extend(noise.next().to_le_bytes());
                }
            }
            2 => {
                while bytes.len() < STRETCH as usize {
                    let word = noise.next() % 1_000_000;
                    bytes.extend(format!("line {word:06} of a text that packs well\n").bytes());
                }
                bytes.truncate(STRETCH as usize);
            }
            _ => {}
        }
        file.write_all_at(&bytes, at)?;
    }
    Ok(())
}

/// George Marsaglia's xorshift64: the same numbers in each run.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_is_between_the_two_in_the_middle() {
        assert_eq!(median([4.0, 1.0, 2.0, 9.0].into_iter()), Some(3.0));
        assert_eq!(median([4.0, 1.0, 2.0].into_iter()), Some(2.0));
        assert_eq!(median(std::iter::empty()), None);
    }

    #[test]
    fn half_of_the_disk_is_holes() {
        use std::os::unix::fs::MetadataExt;

        let file = tempfile::NamedTempFile::new().unwrap();
        fill(file.path(), 8 * STRETCH).unwrap();

        let found = file.as_file().metadata().unwrap();
        assert_eq!(found.len(), 8 * STRETCH);
        assert!(found.blocks() * 512 <= 5 * STRETCH);
        let mut noise = [0; 8];
        file.as_file().read_exact_at(&mut noise, 0).unwrap();
        assert_eq!(u64::from_le_bytes(noise), 1_082_269_761);
    }
}
