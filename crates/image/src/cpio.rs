//! Writer for the cpio "newc" format, the one that Linux unpacks as an initramfs.
//!
//! Source: Linux `Documentation/driver-api/early-userspace/buffer-format.rst`.
//! Everything belongs to root and has time 0, so equal input gives equal bytes.

/// File type bits of `st_mode`, as in `stat(2)`.
const TYPE_DIRECTORY: u32 = 0o040_000;
const TYPE_FILE: u32 = 0o100_000;
const TYPE_SYMLINK: u32 = 0o120_000;
const TYPE_CHARACTER_DEVICE: u32 = 0o020_000;

/// Name of the entry that ends an archive.
const TRAILER: &str = "TRAILER!!!";

/// An archive in memory, grown entry by entry. A directory must come before what is in it.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    last_inode: u32,
}

impl Archive {
    /// An archive without entries.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory with the permission bits `mode`.
    pub fn directory(&mut self, path: &str, mode: u32) {
        self.entry(path, TYPE_DIRECTORY | mode, &[], (0, 0));
    }

    /// Adds a regular file with the permission bits `mode`; at most 4 GiB less one byte.
    pub fn file(&mut self, path: &str, mode: u32, data: &[u8]) {
        self.entry(path, TYPE_FILE | mode, data, (0, 0));
    }

    /// Adds a symbolic link that points to `target`.
    pub fn symlink(&mut self, path: &str, target: &str) {
        self.entry(path, TYPE_SYMLINK | 0o777, target.as_bytes(), (0, 0));
    }

    /// Adds a character device node.
    pub fn character_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) {
        self.entry(path, TYPE_CHARACTER_DEVICE | mode, &[], (major, minor));
    }

    /// Ends the archive and gives its bytes, a multiple of 4 long.
    pub fn finish(mut self) -> Vec<u8> {
        self.last_inode = 0;
        self.entry(TRAILER, 0, &[], (0, 0));
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, data: &[u8], device: (u32, u32)) {
        let path = path.trim_start_matches('/');
        let size = u32::try_from(data.len()).expect("an initramfs file is smaller than 4 GiB");
        self.last_inode += 1;
        let links = if mode & TYPE_DIRECTORY == TYPE_DIRECTORY {
            2
        } else {
            1
        };
        let fields = [
            self.last_inode,
            mode,
            0, // uid
            0, // gid
            links,
            0, // mtime
            size,
            0, // major and minor of the device that holds the file
            0,
            device.0,
            device.1,
            path.len() as u32 + 1,
            0, // checksum, used by another variant of the format
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// One entry as read back: path, mode, data, device numbers.
    pub(crate) type Entry = (String, u32, Vec<u8>, (u32, u32));

    /// Reads an archive back, independently of the writer's layout code.
    pub(crate) fn read(bytes: &[u8]) -> Vec<Entry> {
        let mut entries = Vec::new();
        let mut at = 0;
        loop {
            assert_eq!(&bytes[at..at + 6], b"070701", "magic at {at}");
            let field = |n: usize| {
                let start = at + 6 + 8 * n;
                let text = std::str::from_utf8(&bytes[start..start + 8]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            let device = (field(9), field(10));
            let name_at = at + 110;
            let name = &bytes[name_at..name_at + name_size - 1];
            assert_eq!(bytes[name_at + name_size - 1], 0, "name ends with NUL");
            let data_at = (name_at + name_size).div_ceil(4) * 4;
            let name = String::from_utf8(name.to_vec()).unwrap();
            if name == "TRAILER!!!" {
                return entries;
            }
            entries.push((name, mode, bytes[data_at..data_at + size].to_vec(), device));
            at = (data_at + size).div_ceil(4) * 4;
        }
    }

    #[test]
    fn entries_read_back_as_written() {
        let mut archive = Archive::new();
        archive.directory("etc", 0o755);
        archive.file("/etc/name", 0o644, b"strata");
        archive.symlink("init", "bin/busybox");
        archive.character_device("dev/console", 0o600, 5, 1);

        let entries = read(&archive.finish());

        assert_eq!(
            entries,
            [
                ("etc".into(), 0o40755, vec![], (0, 0)),
                ("etc/name".into(), 0o100_644, b"strata".to_vec(), (0, 0)),
                ("init".into(), 0o120_777, b"bin/busybox".to_vec(), (0, 0)),
                ("dev/console".into(), 0o20600, vec![], (5, 1)),
            ]
        );
    }

    #[test]
    fn length_is_a_multiple_of_four_for_any_name_and_size() {
        for length in 0..9 {
            let mut archive = Archive::new();
            archive.file(&"n".repeat(length + 1), 0o644, &vec![7; length]);
            assert_eq!(archive.finish().len() % 4, 0);
        }
    }

    #[test]
    fn equal_input_gives_equal_bytes() {
        let build = || {
            let mut archive = Archive::new();
            archive.directory("a", 0o755);
            archive.file("a/b", 0o600, b"c");
            archive.finish()
        };
        assert_eq!(build(), build());
    }
}
