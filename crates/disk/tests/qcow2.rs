//! Images against a model in memory, and against `qemu-img` both ways.

mod common;

use std::fmt::Debug;
use std::path::Path;
use std::sync::Arc;

use common::{Random, check, content, file, qemu_img, read_all};
use strata_disk::qcow2::{self, Compression, Options, Qcow2, Repair};
use strata_disk::{Buffers, Disk};
use tempfile::TempDir;

fn open(path: &Path, backing: Option<Arc<dyn Disk>>) -> Qcow2 {
    let folder = path.parent().unwrap();
    let references = qcow2::references(&file(path, false)).unwrap();
    let data = references
        .data_file
        .map(|name| file(&folder.join(name), true));
    Qcow2::open(file(path, true), backing, data, true).unwrap()
}

/// Does something to both the disk and its model.
fn act(disk: &dyn Disk, model: &mut [u8], random: &mut Random) {
    let size = model.len() as u64;
    let offset = random.below(size);
    let most = if random.below(4) == 0 { 300_000 } else { 9000 };
    let length = (1 + random.below(most)).min(size - offset);
    let range = offset as usize..(offset + length) as usize;
    match random.below(10) {
        0..6 => {
            let mut data = vec![random.below(256) as u8; length as usize];
            model[range].copy_from_slice(&data);
            disk.write(offset, Buffers::from(&mut data[..])).unwrap();
        }
        what @ 6..8 => {
            model[range].fill(0);
            disk.write_zeroes(offset, length, what == 6).unwrap();
        }
        8 => {
            disk.discard(offset, length).unwrap();
            let mut now = vec![0; length as usize];
            disk.read(offset, Buffers::from(&mut now[..])).unwrap();
            let kept = now.iter().zip(&model[range.clone()]);
            assert!(kept.clone().all(|(now, old)| *now == 0 || now == old));
            model[range].copy_from_slice(&now);
        }
        _ => disk.flush().unwrap(),
    }
}

/// Does so much to both the disk, which is then closed, and its model: both stay the same, and QEMU
/// finds the image whole.
fn change(
    disk: Qcow2,
    path: &Path,
    model: &mut [u8],
    random: &mut Random,
    deeds: u32,
    what: &dyn Debug,
) {
    for _ in 0..deeds {
        act(&disk, model, random);
    }
    assert!(read_all(&disk) == model, "{what:?}");
    drop(disk);
    check(path);
    assert!(content(path) == model, "qemu-img, {what:?}");
}

fn layouts() -> Vec<Options> {
    let usual = || Options::new(3_000_000 / 512 * 512);
    vec![
        usual(),
        Options {
            cluster_size: 512,
            ..usual()
        },
        Options {
            cluster_size: 2 << 20,
            ..usual()
        },
        Options {
            version: 2,
            cluster_size: 4096,
            ..usual()
        },
        Options {
            extended_l2: true,
            ..usual()
        },
        Options {
            extended_l2: true,
            cluster_size: 16 << 10,
            lazy_refcounts: true,
            ..usual()
        },
        Options {
            refcount_bits: 1,
            cluster_size: 1024,
            ..usual()
        },
        Options {
            refcount_bits: 64,
            cluster_size: 512,
            ..usual()
        },
        Options {
            data_file: Some("data.bin".to_owned()),
            ..usual()
        },
    ]
}

#[test]
fn images_hold_what_was_written_and_qemu_finds_them_whole() {
    for (number, mut options) in layouts().into_iter().enumerate() {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("disk.qcow2");
        // QEMU looks for a relative name where it runs
        if let Some(name) = &mut options.data_file {
            *name = folder.path().join(&*name).display().to_string();
            file(Path::new(name), true);
        }
        qcow2::create(&file(&path, true), &options).unwrap();
        check(&path);
        let mut model = vec![0; options.size as usize];
        let mut random = Random(number as u64);

        for _ in 0..4 {
            let disk = open(&path, None);
            change(disk, &path, &mut model, &mut random, 60, &options);
        }
    }
}

#[test]
fn an_image_shows_what_it_is_based_on_where_it_was_not_written() {
    for (number, mut options) in layouts().into_iter().enumerate() {
        if options.data_file.is_some() {
            continue;
        }
        let folder = TempDir::new().unwrap();
        let base = folder.path().join("base.qcow2");
        let path = folder.path().join("disk.qcow2");
        let mut random = Random(100 + number as u64);
        // shorter than what is based on it
        let below = Options::new(options.size / 2 / 512 * 512);
        qcow2::create(&file(&base, true), &below).unwrap();
        let mut model = vec![0; below.size as usize];
        {
            let disk = open(&base, None);
            for _ in 0..40 {
                act(&disk, &mut model, &mut random);
            }
        }
        options.backing = Some(("base.qcow2".to_owned(), "qcow2".to_owned()));
        qcow2::create(&file(&path, true), &options).unwrap();
        model.resize(options.size as usize, 0);

        for _ in 0..3 {
            let below: Arc<dyn Disk> =
                Arc::new(Qcow2::open(file(&base, false), None, None, false).unwrap());
            let disk = open(&path, Some(below));
            assert!(read_all(&disk) == model);
            change(disk, &path, &mut model, &mut random, 40, &options);
        }
    }
}

#[test]
fn compressed_images_are_read_and_written_both_ways() {
    let folder = TempDir::new().unwrap();
    let raw = folder.path().join("source.raw");
    let mut random = Random(7);
    let mut bytes = vec![0_u8; 2_000_000 / 512 * 512];
    for chunk in bytes.chunks_mut(5000).step_by(2) {
        let value = random.below(4) as u8;
        for byte in chunk {
            *byte = value + random.below(8) as u8;
        }
    }
    std::fs::write(&raw, &bytes).unwrap();
    for (name, kind) in [("zlib", Compression::Zlib), ("zstd", Compression::Zstd)] {
        let theirs = folder.path().join(format!("theirs-{name}.qcow2"));
        let option = format!("compression_type={name}");
        let (from, to) = (raw.to_str().unwrap(), theirs.to_str().unwrap());
        qemu_img(&["convert", "-c", "-O", "qcow2", "-o", &option, from, to]);
        let mut model = bytes.clone();
        let disk = open(&theirs, None);
        assert!(read_all(&disk) == model, "{name}");
        change(disk, &theirs, &mut model, &mut random, 50, &name);

        let ours = folder.path().join(format!("ours-{name}.qcow2"));
        let options = Options {
            compression: kind,
            ..Options::new(bytes.len() as u64)
        };
        qcow2::create(&file(&ours, true), &options).unwrap();
        let disk = open(&ours, None);
        for (number, chunk) in bytes.clone().chunks_mut(64 << 10).enumerate() {
            disk.write_compressed(number as u64 * (64 << 10), chunk)
                .unwrap();
        }
        assert!(read_all(&disk) == bytes, "{name}");
        drop(disk);
        check(&ours);
        assert!(content(&ours) == bytes, "{name}");
        let size = |path: &Path| std::fs::metadata(path).unwrap().len();
        assert!(size(&ours) < bytes.len() as u64 * 3 / 4, "{}", size(&ours));
    }
}

#[test]
fn several_threads_write_at_once() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("disk.qcow2");
    let options = Options {
        cluster_size: 4096,
        ..Options::new(16 << 20)
    };
    qcow2::create(&file(&path, true), &options).unwrap();
    let disk = open(&path, None);
    // each has every fourth piece of 1,000 bytes: neighbours share clusters
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let disk = &disk;
            scope.spawn(move || {
                let mut random = Random(thread);
                for piece in (thread..16_000).step_by(4) {
                    let mut data = [thread as u8 + 1; 1000];
                    disk.write(piece * 1000, Buffers::from(&mut data[..]))
                        .unwrap();
                    if random.below(500) == 0 {
                        disk.flush().unwrap();
                    }
                }
            });
        }
    });
    let all = read_all(&disk);
    for piece in 0..16_000_usize {
        let bytes = &all[piece * 1000..][..1000];
        assert!(bytes.iter().all(|b| *b == piece as u8 % 4 + 1), "{piece}");
    }
    drop(disk);
    check(&path);
    assert!(content(&path) == all);
}

#[test]
fn an_image_that_is_not_whole_is_refused_and_nothing_panics() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("disk.qcow2");
    let options = Options {
        cluster_size: 512,
        ..Options::new(1 << 20)
    };
    qcow2::create(&file(&path, true), &options).unwrap();
    {
        let disk = open(&path, None);
        let mut data = vec![1; 100_000];
        disk.write(5000, Buffers::from(&mut data[..])).unwrap();
    }
    let good = std::fs::read(&path).unwrap();
    let mut random = Random(3);
    for _ in 0..2000 {
        let mut bad = good.clone();
        random.spoil(&mut bad, 4, 6000);
        let spoiled = folder.path().join("spoiled.qcow2");
        std::fs::write(&spoiled, &bad).unwrap();
        let Ok(disk) = Qcow2::open(file(&spoiled, true), None, None, true) else {
            continue;
        };
        let mut model = vec![0; disk.size().min(1 << 20) as usize];
        let _ = disk.read(0, Buffers::from(&mut model[..]));
        let mut data = vec![2; 3000.min(model.len())];
        let _ = disk.write(0, Buffers::from(&mut data[..]));
        let _ = disk.discard(0, data.len() as u64);
        let _ = disk.flush();
    }
}

#[test]
fn leaks_and_wrong_refcounts_are_found_and_mended() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("disk.qcow2");
    for refcount_bits in [1, 4, 16, 32] {
        let options = Options {
            refcount_bits,
            cluster_size: 4096,
            ..Options::new(1 << 20)
        };
        let _ = std::fs::remove_file(&path);
        qcow2::create(&file(&path, true), &options).unwrap();
        let mut model = vec![0; 1 << 20];
        {
            let disk = open(&path, None);
            let mut random = Random(1);
            for _ in 0..30 {
                act(&disk, &mut model, &mut random);
            }
        }
        assert!(open(&path, None).check(Repair::Nothing).unwrap().is_clean());

        // the block of refcounts is behind header and table
        let image = file(&path, true);
        let mut block = vec![0; 4096];
        image.read_bytes(2 * 4096, &mut block).unwrap();
        // the cluster after the tables, and one that is far off
        let bytes = |cluster: usize| cluster * refcount_bits as usize / 8;
        block[bytes(8)..=bytes(9)].fill(0);
        block[4095] = 1;
        image.write_bytes(2 * 4096, &block).unwrap();

        let mut disk = open(&path, None);
        let report = disk.check(Repair::Nothing).unwrap();
        assert!(report.damages > 0 && report.leaks > 0, "{report:?}");
        assert!(!report.is_clean());
        assert!(disk.check(Repair::References).unwrap().is_clean());
        assert_eq!(disk.check(Repair::Nothing).unwrap().findings, [""; 0]);
        assert!(read_all(&disk) == model);
        drop(disk);
        check(&path);
    }
}

#[test]
fn snapshots_are_made_applied_and_forgotten_and_qemu_agrees() {
    for options in layouts() {
        if options.data_file.is_some() || options.refcount_bits == 1 {
            continue;
        }
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("disk.qcow2");
        let name = path.to_str().unwrap();
        qcow2::create(&file(&path, true), &options).unwrap();
        let mut random = Random(5);
        let mut model = vec![0; options.size as usize];
        let mut kept = Vec::new();

        for snapshot in ["one", "two", "three"] {
            let mut disk = open(&path, None);
            for _ in 0..25 {
                act(&disk, &mut model, &mut random);
            }
            disk.create_snapshot(snapshot).unwrap();
            kept.push((snapshot, model.clone()));
            drop(disk);
            check(&path);
        }
        let listed = qemu_img(&["snapshot", "-l", name]);
        assert!(
            ["one", "two", "three"].iter().all(|s| listed.contains(s)),
            "{listed}"
        );
        qemu_img(&["snapshot", "-c", "four", name]);
        kept.push(("four", model.clone()));

        let mut disk = open(&path, None);
        let names: Vec<_> = disk
            .snapshots()
            .unwrap()
            .into_iter()
            .map(|s| s.name)
            .collect();
        assert_eq!(names, ["one", "two", "three", "four"]);
        for (snapshot, model) in kept.iter().rev() {
            disk.apply_snapshot(snapshot).unwrap();
            assert!(read_all(&disk) == *model, "{snapshot}, {options:?}");
            let mut scratch = model.clone();
            for _ in 0..10 {
                act(&disk, &mut scratch, &mut random);
            }
        }
        drop(disk);
        check(&path);
        qemu_img(&["snapshot", "-a", "two", name]);
        let mut disk = open(&path, None);
        assert!(read_all(&disk) == kept[1].1);
        for (snapshot, _) in &kept {
            disk.delete_snapshot(snapshot).unwrap();
        }
        assert!(disk.snapshots().unwrap().is_empty());
        assert!(read_all(&disk) == kept[1].1);
        drop(disk);
        check(&path);
        assert!(content(&path) == kept[1].1);
    }
}

#[test]
fn images_with_every_option_that_qemu_has_are_opened_and_changed() {
    for options in [
        "compat=0.10",
        "compat=1.1,lazy_refcounts=on",
        "cluster_size=512",
        "cluster_size=2M,extended_l2=on",
        "refcount_bits=1",
        "refcount_bits=64",
        "preallocation=metadata",
        "preallocation=metadata,extended_l2=on,cluster_size=16k",
        "preallocation=falloc",
        "preallocation=full",
        "compression_type=zstd",
    ] {
        let folder = TempDir::new().unwrap();
        let path = folder.path().join("disk.qcow2");
        let name = path.to_str().unwrap();
        qemu_img(&["create", "-f", "qcow2", "-o", options, name, "3M"]);
        if !options.contains("0.10") {
            qemu_img(&["bitmap", "--add", name, "changes"]);
        }
        assert!(
            open(&path, None).check(Repair::Nothing).unwrap().is_clean(),
            "{options}"
        );
        let mut model = vec![0; 3 << 20];
        let mut random = Random(9);
        for _ in 0..3 {
            let disk = open(&path, None);
            assert!(read_all(&disk) == model, "{options}");
            change(disk, &path, &mut model, &mut random, 40, &options);
        }
    }
}
