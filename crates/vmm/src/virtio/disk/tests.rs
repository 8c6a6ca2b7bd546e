use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use strata_devices::virtio::SectorRange;
use strata_memory::{Bytes, GuestMemory};
use tempfile::{NamedTempFile, TempDir};

use super::*;

fn image(size: usize) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(&vec![0xaa; size]).unwrap();
    file
}

fn error(path: &Path, read_only: bool) -> OpenError {
    Disk::open(&DiskConfig::image(path, None, read_only)).unwrap_err()
}

fn segments(parts: &[(u64, u32)]) -> Vec<Segment> {
    parts
        .iter()
        .map(|&(address, length)| Segment { address, length })
        .collect()
}

fn range(offset: u64, length: u64, may_unmap: bool) -> SectorRange {
    SectorRange {
        offset,
        length,
        may_unmap,
    }
}

#[test]
fn a_missing_disk_is_named_with_what_to_do() {
    let error = error(Path::new("/nowhere/data.img"), false);

    assert!(matches!(error, OpenError::Missing { .. }));
    let text = "disk /nowhere/data.img does not exist; check the path, or make it: \
                strata disk create /nowhere/data.img 1G";
    assert_eq!(error.to_string(), text);
}

#[test]
fn a_directory_and_a_character_device_are_no_disks() {
    let directory = TempDir::new().unwrap();
    let text = error(directory.path(), false).to_string();
    assert!(text.contains("is a directory"), "{text}");
    let text = error(Path::new("/dev/null"), false).to_string();
    assert!(text.contains("is a character device"), "{text}");
}

#[test]
fn odd_and_empty_files_are_refused_with_how_to_pad_them() {
    let odd = image(513);
    let error_text = error(odd.path(), true).to_string();
    assert!(error_text.contains("513 bytes"), "{error_text}");
    assert!(error_text.contains("truncate -s %512"), "{error_text}");

    assert!(matches!(
        error(image(0).path(), false),
        OpenError::Empty { .. }
    ));
}

#[test]
fn a_disk_in_use_is_refused_until_it_is_free() {
    let image = image(512);
    let first = Disk::open(&DiskConfig::image(image.path(), None, false)).unwrap();

    assert!(matches!(
        error(image.path(), false),
        OpenError::InUse { .. }
    ));
    assert!(matches!(error(image.path(), true), OpenError::InUse { .. }));

    drop(first);
    Disk::open(&DiskConfig::image(image.path(), None, false)).unwrap();
}

#[test]
fn readers_share_a_disk_and_keep_writers_out() {
    let image = image(512);
    let _first = Disk::open(&DiskConfig::image(image.path(), None, true)).unwrap();
    let _second = Disk::open(&DiskConfig::image(image.path(), None, true)).unwrap();

    assert!(matches!(
        error(image.path(), false),
        OpenError::InUse { .. }
    ));
}

#[test]
fn permissions_tell_whether_reading_would_work() {
    if rustix::process::geteuid().is_root() {
        return; // Root may do all.
    }
    let image = image(512);
    let allow = |mode| {
        fs::set_permissions(image.path(), fs::Permissions::from_mode(mode)).unwrap();
    };

    allow(0o400);
    assert!(matches!(
        error(image.path(), false),
        OpenError::NotWritable { .. }
    ));
    Disk::open(&DiskConfig::image(image.path(), None, true)).unwrap();
    allow(0);
    assert!(matches!(
        error(image.path(), true),
        OpenError::NotReadable { .. }
    ));
}

#[test]
fn what_is_written_is_read_back_across_scattered_buffers() {
    let image = image(4096);
    let disk = Disk::open(&DiskConfig::image(image.path(), None, false)).unwrap();
    let memory = GuestMemory::new(0x10000).unwrap();
    let data: Vec<u8> = (0..1024).map(|i| i as u8).collect();
    memory
        .ram()
        .write_slice(&data, GuestAddress(0x1000))
        .unwrap();

    let buffers = segments(&[(0x1000, 100), (0x1064, 924)]);
    let write = Action::Write {
        offset: 512,
        buffers,
        durable: true,
    };
    assert_eq!(disk.perform(memory.ram(), &write), Status::Ok);
    let buffers = segments(&[(0x2000, 1000), (0x5000, 24)]);
    let read = Action::Read {
        offset: 512,
        buffers,
    };
    assert_eq!(disk.perform(memory.ram(), &read), Status::Ok);

    assert_eq!(fs::read(image.path()).unwrap()[512..1536], data);
    let mut back = vec![0; 1024];
    memory
        .ram()
        .read_slice(&mut back[..1000], GuestAddress(0x2000))
        .unwrap();
    memory
        .ram()
        .read_slice(&mut back[1000..], GuestAddress(0x5000))
        .unwrap();
    assert_eq!(back, data);
}

#[test]
fn a_request_with_more_buffers_than_the_kernel_takes_at_once_is_done_whole() {
    let image = image(512 * 4096);
    let disk = Disk::open(&DiskConfig::image(image.path(), None, false)).unwrap();
    let memory = GuestMemory::new(0x40_0000).unwrap();
    let buffers: Vec<_> = (0..4096)
        .map(|i| Segment {
            address: 0x10_0000 + i * 512,
            length: 512,
        })
        .collect();

    let status = disk.perform(memory.ram(), &Action::Read { offset: 0, buffers });

    assert_eq!(status, Status::Ok);
    let last: u8 = memory
        .ram()
        .read_obj(GuestAddress(0x10_0000 + 4096 * 512 - 1))
        .unwrap();
    assert_eq!(last, 0xaa);
}

#[test]
fn reads_into_translated_code_are_told() {
    use std::sync::{Arc, Mutex};
    struct Log(Arc<Mutex<Vec<u64>>>);
    impl strata_memory::CodeWriteListener for Log {
        fn code_written(&self, _holders: strata_memory::CpuSet, address: u64, length: u64) {
            self.0.lock().unwrap().push(address + length);
        }
    }
    let image = image(4096);
    let disk = Disk::open(&DiskConfig::image(image.path(), None, false)).unwrap();
    let memory = GuestMemory::new(0x10000).unwrap();
    let log = Arc::default();
    memory.code().set_listener(Box::new(Log(Arc::clone(&log))));
    memory.code().mark(0, 0x2000, 64);

    let buffers = segments(&[(0x1000, 512), (0x2000, 512)]);
    disk.perform(memory.ram(), &Action::Read { offset: 0, buffers });

    assert_eq!(*log.lock().unwrap(), [0x2200]);
}

#[test]
fn discarded_and_zeroed_ranges_read_zero_and_the_size_stays() {
    let image = image(3 * 65536);
    let disk = Disk::open(&DiskConfig::image(image.path(), None, false)).unwrap();
    let memory = GuestMemory::new(0x1000).unwrap();
    let discard = Action::Discard(vec![range(0, 4096, false)]);
    let ranges = vec![
        range(65536, 512, true),
        range(131072 + 512, 4096 - 512, false),
    ];
    let zero = Action::WriteZeroes {
        ranges,
        durable: false,
    };

    assert_eq!(disk.perform(memory.ram(), &discard), Status::Ok);
    assert_eq!(disk.perform(memory.ram(), &zero), Status::Ok);
    assert_eq!(disk.perform(memory.ram(), &Action::Flush), Status::Ok);

    let bytes = fs::read(image.path()).unwrap();
    assert_eq!(bytes.len(), 3 * 65536);
    assert!(bytes[65536..66048].iter().all(|&b| b == 0));
    assert_eq!(bytes[66048], 0xaa);
    assert_eq!(bytes[131072 + 511], 0xaa);
    assert!(bytes[131072 + 512..131072 + 4096].iter().all(|&b| b == 0));
    assert_eq!(bytes[131072 + 4096], 0xaa);
}

#[test]
fn a_file_that_has_shrunk_gives_io_errors() {
    let image = image(4096);
    let disk = Disk::open(&DiskConfig::image(image.path(), None, false)).unwrap();
    let memory = GuestMemory::new(0x10000).unwrap();
    image.as_file().set_len(512).unwrap();

    let buffers = segments(&[(0x1000, 4096)]);
    let status = disk.perform(memory.ram(), &Action::Read { offset: 0, buffers });

    assert_eq!(status, Status::IoError);
}

#[test]
fn images_are_the_partitions_of_one_disk_and_are_only_read() {
    let images = [image(0x1000), image(0x2000)];
    let named = images
        .iter()
        .zip(["a", "b"])
        .map(|(image, name)| (name.to_owned(), DiskImage::new(image.path(), None)));
    let disk = Disk::open(&DiskConfig {
        content: DiskContent::Partitions(named.collect()),
        read_only: false,
    });
    let disk = disk.unwrap();

    assert!(disk.is_read_only());
    let memory = GuestMemory::new(1 << 20).unwrap();
    let read = Action::Read {
        offset: 2 << 20,
        buffers: segments(&[(0x1000, 0x3000)]),
    };
    assert_eq!(disk.perform(memory.ram(), &read), Status::Ok);
    let mut seen = [1; 0x3000];
    let start = GuestAddress(0x1000);
    memory.ram().read_slice(&mut seen, start).unwrap();
    assert!(seen[..0x2000].iter().all(|byte| *byte == 0xaa));
    assert!(seen[0x2000..].iter().all(|byte| *byte == 0));
}
