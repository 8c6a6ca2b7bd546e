//! A process that writes to an image is killed at any moment: what it was told is durable is there,
//! and the image is whole. `STRATA_DISK_KILLS` says how often.

mod common;

use std::env;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use common::{STEP, check, file, new_file, read_all, scramble, verdict, write};
use strata_disk::Disk;
use strata_disk::qcow2::{self, Options, Qcow2, Repair};
use tempfile::TempDir;

/// Tells the other process which image to write to, and where it begins.
const WORK: &str = "STRATA_DISK_CRASH";
const SIZE: u64 = 24 << 20;

fn open(path: &Path) -> Qcow2 {
    Qcow2::open(file(path, true), None, None, true).unwrap()
}

/// What is done as the `number`th: where, how many bytes, and which; 0 is a discard.
fn deed(number: u64) -> (u64, u64, u8) {
    let z = scramble(number.wrapping_mul(STEP));
    let length = (1 + z % 64) * 512;
    let offset = (z >> 8) % ((SIZE - length) / 512) * 512;
    let value = if z >> 60 == 0 {
        0
    } else {
        1 + (z >> 40) as u8 % 255
    };
    (offset, length, value)
}

/// Not a test of its own.
#[test]
#[ignore = "the other process of the test below"]
fn writer() {
    let Ok(work) = env::var(WORK) else { return };
    let (first, path) = work.split_once(' ').unwrap();
    let disk = open(Path::new(path));
    let mut out = std::io::stdout();
    for number in first.parse::<u64>().unwrap().. {
        let (offset, length, value) = deed(number);
        if value == 0 {
            disk.write_zeroes(offset, length, true).unwrap();
        } else {
            write(&disk, offset, value, length);
        }
        disk.flush().unwrap();
        writeln!(out, "done {number}").unwrap();
    }
}

#[test]
fn what_was_flushed_survives_a_kill_and_the_image_is_whole() {
    let kills = env::var("STRATA_DISK_KILLS").map_or(20, |kills| kills.parse().unwrap());
    let (mut lost, mut unclean) = (0, 0);
    for (number, options) in [
        Options::new(SIZE),
        Options {
            cluster_size: 4096,
            ..Options::new(SIZE)
        },
        Options {
            extended_l2: true,
            ..Options::new(SIZE)
        },
    ]
    .into_iter()
    .enumerate()
    {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("disk.qcow2");
        qcow2::create(&new_file(&path), &options).unwrap();
        let mut model = vec![0; SIZE as usize];
        let mut next = 0;
        for _ in 0..(kills + number) / 3 {
            let begun = next;
            let mut child = Command::new(env::current_exe().unwrap())
                .args(["--exact", "writer", "--ignored", "--nocapture"])
                .env(WORK, format!("{next} {}", path.display()))
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
            // somewhere in the work, which began when the first line came
            let mut last = lines
                .by_ref()
                .map_while(Result::ok)
                .find(|line| line.contains("done"));
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
            let wait = u64::from(now.unwrap().subsec_nanos()) / 7 % 120_000;
            std::thread::sleep(Duration::from_micros(wait));
            child.kill().unwrap();
            for line in lines.map_while(Result::ok) {
                last = Some(line);
            }
            child.wait().unwrap();
            let last = last.and_then(|line| line.rsplit(' ').next()?.parse::<u64>().ok());
            next = last.unwrap() + 1;
            for number in begun..next {
                let (offset, length, value) = deed(number);
                model[offset as usize..][..length as usize].fill(value);
            }

            unclean += u32::from(!verdict(&path).0);
            let mut disk = open(&path);
            assert!(disk.check(Repair::Nothing).unwrap().is_clean());
            let now = read_all(&disk);
            drop(disk);
            check(&path);
            // what was under way may be there, in part or whole
            let (offset, length, _) = deed(next);
            let under_way = offset as usize..(offset + length) as usize;
            model[under_way.clone()].copy_from_slice(&now[under_way]);
            lost += u32::from(now != model);
            assert_eq!(lost, 0, "an acknowledged write is lost");
        }
        assert!(next > 20, "{next}");
    }
    eprintln!("{kills} kills, {unclean} of them with leaks until the image was opened");
}
