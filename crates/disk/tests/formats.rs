//! VHD, VHDX and VMDK images both ways against `qemu-img`.

mod common;

use std::fs::{self, File};
use std::path::Path;

use common::{Random, new_file, qemu_img, read_in_pieces};
use strata_disk::{Buffers, Disk, Format, export, open};
use tempfile::TempDir;

/// What is on a disk, read in pieces that end anywhere.
fn read(disk: &dyn Disk) -> Vec<u8> {
    read_in_pieces(disk, 777_777)
}

/// Numbers here and there, with holes between, and at the very end.
fn content(size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    for start in (0..size).step_by(1_300_000) {
        let end = (start + 200_001).min(size);
        for (at, byte) in bytes[start..end].iter_mut().enumerate() {
            *byte = (at / 7 + start) as u8;
        }
    }
    bytes[size - 1] = 1;
    bytes
}

fn path(folder: &TempDir, name: &str) -> String {
    folder.path().join(name).to_str().unwrap().to_owned()
}

/// 70 MiB less a sector: no multiple of any block.
const SIZE: usize = (70 << 20) - 512;

#[test]
fn what_qemu_writes_is_read() {
    let folder = TempDir::new().unwrap();
    let raw = path(&folder, "source.raw");
    let bytes = content(SIZE);
    fs::write(&raw, &bytes).unwrap();
    for (name, theirs, options) in [
        ("dynamic.vhd", "vpc", "subformat=dynamic,force_size=on"),
        ("rounded.vhd", "vpc", "subformat=dynamic"),
        ("fixed.vhd", "vpc", "subformat=fixed,force_size=on"),
        ("dynamic.vhdx", "vhdx", "subformat=dynamic"),
        ("small.vhdx", "vhdx", "subformat=dynamic,block_size=1M"),
        ("fixed.vhdx", "vhdx", "subformat=fixed"),
        ("sparse.vmdk", "vmdk", "subformat=monolithicSparse"),
        (
            "zeroes.vmdk",
            "vmdk",
            "subformat=monolithicSparse,zeroed_grain=on",
        ),
        ("stream.vmdk", "vmdk", "subformat=streamOptimized"),
    ] {
        let image = path(&folder, name);
        qemu_img(&["convert", "-O", theirs, "-o", options, &raw, &image]);
        let disk = open(Path::new(&image), None, false).unwrap();
        let mut expected = bytes.clone();
        // QEMU rounds some sizes up
        assert!(disk.size() >= SIZE as u64, "{name}: {}", disk.size());
        assert!(
            name == "rounded.vhd" || disk.size() == SIZE as u64,
            "{name}"
        );
        expected.resize(disk.size() as usize, 0);
        assert!(read(&*disk) == expected, "{name}");
        let error = disk.write(0, Buffers::from(&mut [0_u8; 512][..]));
        assert!(error.is_err());
    }
}

#[test]
fn what_is_exported_is_read_by_qemu_and_again_here() {
    let folder = TempDir::new().unwrap();
    let raw = path(&folder, "source.raw");
    let bytes = content(SIZE);
    fs::write(&raw, &bytes).unwrap();
    let from = open(Path::new(&raw), None, false).unwrap();
    for (format, name, theirs) in [
        (Format::Vhd, "disk.vhd", "vpc"),
        (Format::Vhdx, "disk.vhdx", "vhdx"),
        (Format::Vmdk, "disk.vmdk", "vmdk"),
        (Format::VmdkStream, "stream.vmdk", "vmdk"),
    ] {
        let image = path(&folder, name);
        export(&*from, &new_file(image.as_ref()), format, &|_| {}).unwrap();

        let disk = open(Path::new(&image), None, false).unwrap();
        assert!(read(&*disk) == bytes, "{name}");
        drop(disk);
        let back = path(&folder, "back.raw");
        qemu_img(&["convert", "-f", theirs, "-O", "raw", &image, &back]);
        assert!(fs::read(&back).unwrap() == bytes, "{name}");
        if theirs == "vhdx" || theirs == "vmdk" {
            qemu_img(&["check", "-f", theirs, &image]);
        }
        let took = fs::metadata(&image).unwrap().len();
        // blocks of the others are larger than the holes
        assert!(theirs != "vmdk" || took < SIZE as u64 / 2, "{name}: {took}");
    }
}

#[test]
fn an_empty_disk_is_exported_too() {
    let folder = TempDir::new().unwrap();
    let raw = path(&folder, "source.raw");
    File::create(&raw).unwrap().set_len(3 << 20).unwrap();
    let from = open(Path::new(&raw), None, false).unwrap();
    for format in [Format::Vhd, Format::Vhdx, Format::Vmdk, Format::VmdkStream] {
        let image = path(&folder, format.name());
        export(&*from, &new_file(image.as_ref()), format, &|_| {}).unwrap();
        let disk = open(Path::new(&image), Some(format), false).unwrap();
        assert!(read(&*disk) == vec![0; 3 << 20], "{format:?}");
    }
}

#[test]
fn an_image_that_is_not_whole_is_refused_and_nothing_panics() {
    let folder = TempDir::new().unwrap();
    let raw = path(&folder, "source.raw");
    fs::write(&raw, content(4 << 20)).unwrap();
    let from = open(Path::new(&raw), None, false).unwrap();
    let mut numbers = Random(1);
    let mut random = |end: usize| numbers.below(end as u64) as usize;
    for format in [Format::Vhd, Format::Vhdx, Format::Vmdk, Format::VmdkStream] {
        let image = path(&folder, format.name());
        export(&*from, &new_file(image.as_ref()), format, &|_| {}).unwrap();
        // its tables, which are at both ends
        let mut good = fs::read(&image).unwrap();
        good.truncate(if format == Format::Vhdx {
            3 << 20 | 4096
        } else {
            good.len()
        });
        let spoiled = path(&folder, "spoiled");
        for _ in 0..300 {
            let mut bad = good.clone();
            for _ in 0..=random(3) {
                let length = bad.len();
                let at = match random(3) {
                    0 => random(4096.min(length)),
                    1 => length - 1 - random(2048.min(length)),
                    _ => random(length),
                };
                bad[at] = random(256) as u8;
            }
            fs::write(&spoiled, &bad).unwrap();
            let Ok(disk) = open(Path::new(&spoiled), Some(format), false) else {
                continue;
            };
            let mut data = vec![0; disk.size().min(1 << 20) as usize];
            let _ = disk.read(0, Buffers::from(&mut data[..]));
            let _ = disk.extent(0, disk.size());
        }
    }
}
