//! Images that are based on others: opened by their paths, folded back, resized and copied; against
//! `qemu-img` where it has a word to say.

mod common;

use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::Arc;

use common::{check, new_file, read_all, write};
use strata_disk::qcow2::{self, Options, Qcow2};
use strata_disk::{
    Buffers, Disk, Error, Extent, ExtentKind, Format, Journal, OpenError, ReadOnlyDisk, copy,
    copy_on, first_difference, open, open_file,
};
use tempfile::TempDir;

const CLUSTER: u64 = 64 << 10;

/// A folder with `base.raw`, of 20 clusters that tell their numbers, and `disk.qcow2` based on it.
struct Scene {
    folder: TempDir,
}

impl Scene {
    fn new(size: u64) -> Self {
        let scene = Self {
            folder: TempDir::new().unwrap(),
        };
        let bytes: Vec<u8> = (0..20 * CLUSTER)
            .map(|at| (at / CLUSTER) as u8 + 1)
            .collect();
        fs::write(scene.path("base.raw"), bytes).unwrap();
        scene.make("disk.qcow2", size, Some(("base.raw", "raw")));
        scene
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn make(&self, name: &str, size: u64, backing: Option<(&str, &str)>) {
        let mut options = Options::new(size);
        options.backing = backing.map(|(name, format)| (name.to_owned(), format.to_owned()));
        qcow2::create(&new_file(&self.path(name)), &options).unwrap();
    }

    fn open(&self, name: &str) -> Arc<dyn Disk> {
        open(&self.path(name), None, true).unwrap()
    }

    /// The overlay itself, with what is below.
    fn overlay(&self) -> Qcow2 {
        let opened = open_file(&self.path("disk.qcow2"), None, true).unwrap();
        let (below, format) = opened.backing().unwrap().unwrap();
        let below = open(&below, format, false).unwrap();
        Qcow2::open(opened.file, Some(below), None, true).unwrap()
    }

    fn check(&self, name: &str) {
        check(&self.path(name));
    }
}

#[test]
fn a_chain_is_opened_by_the_path_of_its_top() {
    let scene = Scene::new(20 * CLUSTER);
    scene.make("top.qcow2", 20 * CLUSTER, Some(("disk.qcow2", "qcow2")));
    write(&*scene.open("disk.qcow2"), CLUSTER, 0xaa, 10);

    let top = scene.open("top.qcow2");

    let bytes = read_all(&*top);
    assert_eq!(
        (
            bytes[0],
            bytes[CLUSTER as usize + 9],
            bytes[CLUSTER as usize + 10]
        ),
        (1, 0xaa, 2)
    );
    let extent = top.extent(0, 20 * CLUSTER).unwrap();
    assert_eq!(
        (extent.length, extent.depth, extent.kind),
        (CLUSTER, 2, ExtentKind::Data(0))
    );
    assert_eq!(
        top.extent(CLUSTER, 20 * CLUSTER - CLUSTER).unwrap().depth,
        1
    );
}

#[test]
fn what_is_below_is_locked_for_reading_and_not_changed() {
    let scene = Scene::new(20 * CLUSTER);
    let before = fs::read(scene.path("base.raw")).unwrap();
    let disk = scene.open("disk.qcow2");
    write(&*disk, 5, 0xaa, 3 * CLUSTER);

    let error = open(&scene.path("base.raw"), None, true).unwrap_err();
    assert!(matches!(error, OpenError::InUse { .. }));
    open(&scene.path("base.raw"), None, false).unwrap();
    drop(disk);
    assert!(fs::read(scene.path("base.raw")).unwrap() == before);
}

#[test]
fn images_that_go_round_or_lead_nowhere_are_refused() {
    let scene = Scene::new(CLUSTER);
    scene.make("a.qcow2", CLUSTER, Some(("b.qcow2", "qcow2")));
    scene.make("b.qcow2", CLUSTER, Some(("a.qcow2", "qcow2")));
    let text = |name| {
        let mut error: &dyn std::error::Error = &open(&scene.path(name), None, false).unwrap_err();
        let mut causes = vec![error.to_string()];
        while let Some(source) = error.source() {
            causes.push(source.to_string());
            error = source;
        }
        causes.join(": ")
    };
    assert!(text("a.qcow2").contains("go round"), "{}", text("a.qcow2"));
    scene.make("c.qcow2", CLUSTER, Some(("gone.qcow2", "qcow2")));
    assert!(
        text("c.qcow2").contains("gone.qcow2 does not exist"),
        "{}",
        text("c.qcow2")
    );
    scene.make("d.qcow2", CLUSTER, Some(("nbd://host/disk", "raw")));
    assert!(
        text("d.qcow2").contains("not supported"),
        "{}",
        text("d.qcow2")
    );
}

#[test]
fn what_a_guest_writes_to_a_raw_disk_does_not_make_it_another_format() {
    let scene = Scene::new(CLUSTER);
    let image = fs::read(scene.path("disk.qcow2")).unwrap();
    fs::write(scene.path("guest.img"), image).unwrap();

    let error = open(&scene.path("guest.img"), None, false).unwrap_err();
    assert!(error.to_string().contains("format=raw"), "{error}");
    let raw = open(&scene.path("guest.img"), Some(Format::Raw), false).unwrap();
    assert!(read_all(&*raw).starts_with(b"QFI"));
    let qcow2 = open(&scene.path("guest.img"), Some(Format::Qcow2), false).unwrap();
    assert_eq!(qcow2.size(), CLUSTER);
}

#[test]
fn a_clone_is_folded_back_and_is_empty_then() {
    let scene = Scene::new(20 * CLUSTER);
    let mut overlay = scene.overlay();
    write(&overlay, CLUSTER / 2, 0xaa, 2 * CLUSTER);
    overlay
        .write_zeroes(7 * CLUSTER, 2 * CLUSTER, true)
        .unwrap();
    let expected = read_all(&overlay);
    let size = |name: &str| fs::metadata(scene.path(name)).unwrap().len();
    drop(overlay);

    let opened = open_file(&scene.path("disk.qcow2"), None, true).unwrap();
    let base = open(&scene.path("base.raw"), None, true).unwrap();
    overlay = Qcow2::open(opened.file, Some(Arc::clone(&base)), None, true).unwrap();
    let copied = overlay.commit_to(&*base, &|_| {}).unwrap();
    assert!(copied.data >= 2 * CLUSTER);
    drop((overlay, base));

    assert!(fs::read(scene.path("base.raw")).unwrap() == expected);
    assert_eq!(size("base.raw"), 20 * CLUSTER);
    let disk = scene.open("disk.qcow2");
    assert!(read_all(&*disk) == expected);
    assert_eq!(disk.extent(0, 20 * CLUSTER).unwrap().depth, 1);
    drop(disk);
    scene.check("disk.qcow2");
}

#[test]
fn what_a_disk_grows_by_is_zeroes_whatever_is_below() {
    // the base is longer, and must not show
    let scene = Scene::new(3 * CLUSTER + 512);
    let mut overlay = scene.overlay();
    overlay.resize(1000 * CLUSTER).unwrap();
    let bytes = read_all(&overlay);
    let end = 3 * CLUSTER as usize + 512;
    assert!(bytes[..end].iter().all(|byte| *byte != 0));
    assert!(bytes[end..].iter().all(|byte| *byte == 0));
    drop(overlay);
    scene.check("disk.qcow2");

    let mut overlay = scene.overlay();
    write(&overlay, 900 * CLUSTER, 7, 100);
    overlay.resize(CLUSTER).unwrap();
    overlay.resize(950 * CLUSTER).unwrap();
    assert!(
        read_all(&overlay)[CLUSTER as usize..]
            .iter()
            .all(|byte| *byte == 0)
    );
    drop(overlay);
    scene.check("disk.qcow2");
}

#[test]
fn copies_leave_out_what_is_zeroes() {
    let scene = Scene::new(30 * CLUSTER);
    let from = scene.open("disk.qcow2");
    write(&*from, 25 * CLUSTER + 4096, 9, 4096);
    from.write_zeroes(0, 5 * CLUSTER, true).unwrap();
    scene.make("copy.qcow2", 30 * CLUSTER, None);
    let to = scene.open("copy.qcow2");

    let copied = copy(&*from, &*to, true, &|_| {}).unwrap();

    assert!(read_all(&*from) == read_all(&*to));
    assert_eq!(copied.data, 15 * CLUSTER + 4096);
    assert_eq!(copied.data + copied.zeroes, 30 * CLUSTER);
    drop(to);
    scene.check("copy.qcow2");
}

#[test]
fn an_image_opened_to_be_read_is_never_changed() {
    let scene = Scene::new(20 * CLUSTER);
    let before = fs::read(scene.path("disk.qcow2")).unwrap();
    let disk = open(&scene.path("disk.qcow2"), None, false).unwrap();
    let mut data = [1; 512];
    let error = disk.write(0, Buffers::from(&mut data[..])).unwrap_err();
    assert!(matches!(error, Error::ReadOnly));
    assert!(disk.discard(0, 512).is_err() && disk.write_zeroes(0, 512, true).is_err());
    disk.flush().unwrap();
    drop(disk);
    assert!(fs::read(scene.path("disk.qcow2")).unwrap() == before);
}

#[test]
fn an_image_moves_to_another_base_and_shows_the_same() {
    let scene = Scene::new(20 * CLUSTER);
    let mut overlay = scene.overlay();
    write(&overlay, 3 * CLUSTER + 100, 0xaa, 2 * CLUSTER);
    let expected = read_all(&overlay);
    // the same as the old base up to the middle, and shorter
    let bytes: Vec<u8> = (0..15 * CLUSTER)
        .map(|at| {
            if at < 10 * CLUSTER {
                (at / CLUSTER) as u8 + 1
            } else {
                0x55
            }
        })
        .collect();
    fs::write(scene.path("other.raw"), bytes).unwrap();
    let other = open(&scene.path("other.raw"), None, false).unwrap();

    let got = overlay
        .rebase(Some((&*other, "other.raw", "raw")), &|_| {})
        .unwrap();
    assert!((10 * CLUSTER..14 * CLUSTER).contains(&got), "{got}");
    drop(overlay);
    fs::remove_file(scene.path("base.raw")).unwrap();
    assert!(read_all(&*scene.open("disk.qcow2")) == expected);
    scene.check("disk.qcow2");

    let mut overlay = scene.overlay();
    overlay.rebase(None, &|_| {}).unwrap();
    drop((overlay, other));
    fs::remove_file(scene.path("other.raw")).unwrap();
    assert!(read_all(&*scene.open("disk.qcow2")) == expected);
    scene.check("disk.qcow2");
}

/// A disk that can be read so far and no further, and notes where it was read first.
#[derive(Debug)]
struct Breaking {
    disk: Arc<dyn Disk>,
    until: u64,
    first: std::sync::Mutex<u64>,
}

impl ReadOnlyDisk for Breaking {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn read(&self, offset: u64, buffers: Buffers) -> strata_disk::Result<()> {
        let mut first = self.first.lock().unwrap();
        *first = offset.min(*first);
        if offset >= self.until {
            return Err(std::io::Error::other("the cable was pulled").into());
        }
        self.disk.read(offset, buffers)
    }

    fn extent(&self, offset: u64, length: u64) -> strata_disk::Result<Extent> {
        self.disk.extent(offset, length)
    }
}

#[test]
fn a_copy_goes_on_where_it_was_interrupted() {
    const MEBI: u64 = 1 << 20;
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name);
    for name in ["from.raw", "to.raw"] {
        File::create(path(name))
            .unwrap()
            .set_len(600 * MEBI)
            .unwrap();
    }
    let from = open(&path("from.raw"), None, true).unwrap();
    for place in [1, 300, 599] {
        write(&*from, place * MEBI, place as u8, 4096);
    }
    let to = open(&path("to.raw"), None, true).unwrap();
    let journal = Journal::new(path("journal"), "from here to there");
    let breaking = |until| Breaking {
        disk: Arc::clone(&from),
        until,
        first: u64::MAX.into(),
    };

    let first = breaking(400 * MEBI);
    let error = copy_on(&first, &*to, &journal, &|_| {}).unwrap_err();
    assert!(error.to_string().contains("cable"), "{error}");
    assert_eq!(journal.done(), 512 * MEBI);
    assert_eq!(Journal::new(path("journal"), "another copy").done(), 0);

    let second = breaking(u64::MAX);
    copy_on(&second, &*to, &journal, &|_| {}).unwrap();
    assert!(*second.first.lock().unwrap() >= 512 * MEBI);
    assert_eq!(journal.done(), 0);
    assert_eq!(first_difference(&*from, &*to, &|_| {}).unwrap(), None);
    write(&*to, 300 * MEBI + 5, 9, 1);
    assert_eq!(
        first_difference(&*from, &*to, &|_| {}).unwrap(),
        Some(300 * MEBI + 5)
    );
}
