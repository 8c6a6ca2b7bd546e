//! A small reader of EROFS for these tests, written from the format's description alone: it
//! shares nothing with the writer.

use std::collections::BTreeMap;

const BLOCK: usize = 4096;

/// What is known of one name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) nid: u64,
    pub(crate) mode: u16,
    pub(crate) owner: (u32, u32),
    pub(crate) time: (i64, u32),
    pub(crate) links: u32,
    /// Device number, or first block, or size of chunks.
    pub(crate) place: u32,
    pub(crate) content: Vec<u8>,
    pub(crate) xattrs: BTreeMap<String, Vec<u8>>,
}

/// All names of an image, with the root as "".
pub(crate) fn read(image: &[u8]) -> BTreeMap<String, Found> {
    let image = Image(image);
    assert_eq!(image.u32(1024), 0xe0f5_e1e2);
    assert_eq!(image.0.len(), image.u32(1024 + 36) as usize * BLOCK);
    let mut found = BTreeMap::new();
    let root = u64::from(image.u16(1024 + 14));
    let mut open = vec![(String::new(), root)];
    while let Some((path, nid)) = open.pop() {
        let inode = image.inode(nid);
        if inode.mode >> 12 == 0o4 {
            for (name, child, kind) in entries(&inode.content) {
                if name == "." {
                    assert_eq!(child, nid, "'.' of {path}");
                } else if name != ".." {
                    let child_mode = image.inode(child).mode >> 12;
                    let modes = [0, 0o10, 0o4, 0o2, 0o6, 0o1, 0o14, 0o12];
                    assert_eq!(modes[usize::from(kind)], child_mode, "type of {name}");
                    open.push((format!("{path}/{name}"), child));
                }
            }
        }
        found.insert(path, inode);
    }
    found
}

fn entries(content: &[u8]) -> Vec<(String, u64, u8)> {
    let mut all = Vec::new();
    for block in content.chunks(BLOCK) {
        let data = Image(block);
        let count = usize::from(data.u16(8)) / 12;
        for index in 0..count {
            let begin = usize::from(data.u16(index * 12 + 8));
            let end = if index + 1 < count {
                usize::from(data.u16(index * 12 + 20))
            } else {
                block.len()
            };
            let name = block[begin..end].split(|byte| *byte == 0).next().unwrap();
            let name = String::from_utf8_lossy(name).into_owned();
            all.push((name, data.u64(index * 12), block[index * 12 + 10]));
        }
    }
    assert!(all.is_sorted_by(|a, b| a.0.as_bytes() < b.0.as_bytes()));
    all
}

struct Image<'a>(&'a [u8]);

impl Image<'_> {
    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.0[at..at + 2].try_into().unwrap())
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.0[at..at + 4].try_into().unwrap())
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.0[at..at + 8].try_into().unwrap())
    }

    fn inode(&self, nid: u64) -> Found {
        let at = self.u32(1024 + 40) as usize * BLOCK + nid as usize * 32;
        let format = self.u16(at);
        assert_eq!(format & 1, 1, "an extended inode");
        let xattr_bytes = match usize::from(self.u16(at + 2)) {
            0 => 0,
            count => 12 + (count - 1) * 4,
        };
        let size = self.u64(at + 8) as usize;
        let place = self.u32(at + 16);
        let after = at + 64 + xattr_bytes;
        let mode = self.u16(at + 4);
        let content = match format >> 1 {
            _ if !matches!(mode >> 12, 0o4 | 0o10 | 0o12) => Vec::new(),
            0 => self.0[place as usize * BLOCK..][..size].to_vec(),
            2 => {
                let tail = size % BLOCK;
                assert_eq!(
                    after / BLOCK,
                    (after + tail - 1) / BLOCK,
                    "a tail in one block"
                );
                let mut all = self.0[place as usize * BLOCK..][..size - tail].to_vec();
                all.extend_from_slice(&self.0[after..][..tail]);
                all
            }
            4 => {
                let chunk = BLOCK << (place & 0x1f);
                let mut all = vec![0; size];
                for (index, part) in all.chunks_mut(chunk).enumerate() {
                    let block = self.u32(after + index * 4);
                    if block != u32::MAX {
                        let length = part.len();
                        part.copy_from_slice(&self.0[block as usize * BLOCK..][..length]);
                    }
                }
                all
            }
            other => panic!("layout {other}"),
        };
        Found {
            nid,
            mode,
            owner: (self.u32(at + 24), self.u32(at + 28)),
            time: (self.u64(at + 32) as i64, self.u32(at + 40)),
            links: self.u32(at + 44),
            place,
            content,
            xattrs: self.xattrs(at + 64, xattr_bytes),
        }
    }

    fn xattrs(&self, start: usize, bytes: usize) -> BTreeMap<String, Vec<u8>> {
        let mut all = BTreeMap::new();
        let mut at = start + 12;
        while at < start + bytes {
            let name = usize::from(self.0[at]);
            let value = usize::from(self.u16(at + 2));
            let prefix = match self.0[at + 1] {
                1 => "user.",
                2 => "system.posix_acl_access",
                3 => "system.posix_acl_default",
                4 => "trusted.",
                6 => "security.",
                other => panic!("namespace {other}"),
            };
            let rest = String::from_utf8_lossy(&self.0[at + 4..][..name]);
            let content = self.0[at + 4 + name..][..value].to_vec();
            all.insert(format!("{prefix}{rest}"), content);
            at += (4 + name + value).next_multiple_of(4);
        }
        all
    }
}
