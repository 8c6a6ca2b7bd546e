//! A process that writes to an image is killed at any moment: what it was told is durable is there,
//! and the image is whole. `STRATA_DISK_KILLS` says how often.

use std::env;
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use strata_disk::qcow2::{self, Options, Qcow2, Repair};
use strata_disk::{Buffers, Disk, HostFile};
use tempfile::TempDir;

/// Tells the other process which image to write to, and where it begins.
const WORK: &str = "STRATA_DISK_CRASH";
const SIZE: u64 = 24 << 20;

fn open(path: &Path) -> Qcow2 {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    Qcow2::open(HostFile::new(file), None, None, true).unwrap()
}

/// What is done as the `number`th: where, how many bytes, and which; 0 is a discard.
fn deed(number: u64) -> (u64, u64, u8) {
    let mut z = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
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
            let mut data = vec![value; length as usize];
            disk.write(offset, Buffers::from(&mut data[..])).unwrap();
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
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path);
        qcow2::create(&HostFile::new(file.unwrap()), &options).unwrap();
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

            unclean += u32::from(!is_clean_to_qemu(&path));
            let mut disk = open(&path);
            assert!(disk.check(Repair::Nothing).unwrap().is_clean());
            let mut now = vec![0; SIZE as usize];
            disk.read(0, Buffers::from(&mut now[..])).unwrap();
            drop(disk);
            assert!(is_clean_to_qemu(&path));
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

fn is_clean_to_qemu(path: &Path) -> bool {
    let output = Command::new("qemu-img")
        .arg("check")
        .arg(path)
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout).contains("No errors were found")
}
