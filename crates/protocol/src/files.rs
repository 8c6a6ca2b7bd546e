//! Files as a tar stream between host and guest, cut into messages. Both sides pack and unpack,
//! and neither believes the other: nothing is written outside the place that was named.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Read, Write};
use std::path::{Component, Path, PathBuf};

use tar::{Archive, Builder, Entry, EntryType};

use crate::MAX_DATA;

/// Name of all of a directory's contents instead of the directory itself.
const CONTENTS: &str = ".";

/// Takes bytes, and hands them on in pieces of [`MAX_DATA`].
pub struct Pieces<F> {
    buffer: Vec<u8>,
    send: F,
}

impl<F: FnMut(Vec<u8>) -> io::Result<()>> Pieces<F> {
    /// Hands pieces to `send`.
    pub fn new(send: F) -> Self {
        let buffer = Vec::with_capacity(MAX_DATA);
        Self { buffer, send }
    }
}

impl<F: FnMut(Vec<u8>) -> io::Result<()>> Write for Pieces<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(MAX_DATA - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..count]);
        if self.buffer.len() == MAX_DATA {
            self.flush()?;
        }
        Ok(count)
    }

    /// Hands on what there is. To be called at the end.
    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let next = Vec::with_capacity(MAX_DATA);
        (self.send)(std::mem::replace(&mut self.buffer, next))
    }
}

/// Reads the bytes of pieces; `None` is the end.
pub struct Joined<F> {
    piece: io::Cursor<Vec<u8>>,
    ended: bool,
    next: F,
}

impl<F: FnMut() -> io::Result<Option<Vec<u8>>>> Joined<F> {
    /// Takes pieces from `next`.
    pub fn new(next: F) -> Self {
        Self {
            piece: io::Cursor::default(),
            ended: false,
            next,
        }
    }
}

impl<F: FnMut() -> io::Result<Option<Vec<u8>>>> Read for Joined<F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let count = self.piece.read(buffer)?;
            if count > 0 || buffer.is_empty() || self.ended {
                return Ok(count);
            }
            match (self.next)()? {
                Some(piece) => self.piece = io::Cursor::new(piece),
                None => self.ended = true,
            }
        }
    }
}

/// Writes a file, a symbolic link or a directory with all in it as a tar stream, under its last
/// name. What a path that ends in `/.` names are the contents of a directory. Sockets are left
/// out: there is nothing to them without the process that listens.
pub fn pack(path: &Path, to: &mut impl Write) -> io::Result<()> {
    let mut builder = Builder::new(to);
    builder.follow_symlinks(false);
    builder.sparse(false);
    let text = path.as_os_str().as_encoded_bytes();
    let name = if text == b"." || text.ends_with(b"/.") {
        OsStr::new(CONTENTS)
    } else {
        path.file_name().unwrap_or(OsStr::new(CONTENTS))
    };
    pack_one(&mut builder, path, Path::new(name))?;
    builder.into_inner()?.flush()
}

fn pack_one<W: Write>(builder: &mut Builder<W>, path: &Path, name: &Path) -> io::Result<()> {
    let named =
        |error: io::Error| io::Error::new(error.kind(), format!("'{}': {error}", path.display()));
    let kind = fs::symlink_metadata(path).map_err(named)?.file_type();
    if std::os::unix::fs::FileTypeExt::is_socket(&kind) {
        return Ok(());
    }
    if !kind.is_dir() {
        return builder.append_path_with_name(path, name).map_err(named);
    }
    builder.append_dir(name, path).map_err(named)?;
    let mut names = fs::read_dir(path)
        .and_then(|entries| entries.map(|entry| Ok(entry?.file_name())).collect())
        .map_err(named)?;
    let names: &mut Vec<OsString> = &mut names;
    names.sort();
    for entry in names {
        pack_one(builder, &path.join(&*entry), &name.join(&*entry))?;
    }
    Ok(())
}

/// Unpacks a tar stream as [`pack`] writes it: into `to` where that is a directory, and as `to`
/// where there is no such file or a plain one. With `keep_owner` files belong to the users and
/// groups of the stream. Device nodes and the like are left out, and so are set-user-ID bits.
pub fn unpack(from: &mut impl Read, to: &Path, keep_owner: bool) -> io::Result<()> {
    if fs::metadata(to).is_ok_and(|metadata| metadata.is_dir()) {
        extract(from, to, keep_owner)?;
        return Ok(());
    }
    if to.as_os_str().as_encoded_bytes().ends_with(b"/") {
        let message = format!("there is no directory '{}'", to.display());
        return Err(io::Error::new(io::ErrorKind::NotFound, message));
    }
    let parent = match to.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    // Beside the place, so that it can be renamed, and under a name that nobody else has.
    let room = Room::beside(parent)?;
    let whole = room.0.join("whole");
    fs::create_dir(&whole)?;
    match extract(from, &whole, keep_owner)? {
        None => Err(io::Error::new(io::ErrorKind::NotFound, "nothing came")),
        Some(name) if name == CONTENTS => fs::rename(whole, to),
        Some(name) => fs::rename(whole.join(name), to),
    }
}

/// A directory that is gone when this is.
struct Room(PathBuf);

impl Room {
    fn beside(parent: &Path) -> io::Result<Self> {
        let mut number = 0_u32;
        loop {
            let name = format!(".strata-{}-{number}", std::process::id());
            let path = parent.join(name);
            match fs::create_dir(&path) {
                Ok(()) => return Ok(Self(path)),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
                Err(error) => {
                    let text = format!("'{}': {error}", parent.display());
                    return Err(io::Error::new(error.kind(), text));
                }
            }
        }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Extracts all of a stream into a directory; gives the name that all of it is under, which is
/// [`CONTENTS`] where there are several.
fn extract(from: &mut impl Read, to: &Path, keep_owner: bool) -> io::Result<Option<OsString>> {
    let mut archive = Archive::new(from);
    archive.set_preserve_ownerships(keep_owner);
    archive.set_unpack_xattrs(false);
    let mut top: Option<OsString> = None;
    let mut directories = Vec::new();
    for entry in archive.entries()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        let first = first_name(&path);
        match &top {
            None => top = Some(first),
            Some(top) if *top != first && top != CONTENTS => {
                let message = format!("'{}' came with '{}'", path.display(), top.display());
                return Err(io::Error::new(io::ErrorKind::InvalidData, message));
            }
            Some(_) => {}
        }
        match entry.header().entry_type() {
            // Last, since one that cannot be written to must be filled before.
            EntryType::Directory => directories.push(entry),
            EntryType::Regular | EntryType::Symlink | EntryType::Link => {
                put(&mut entry, to, &path)?;
            }
            _ => {}
        }
    }
    directories.sort_by(|a, b| b.path_bytes().cmp(&a.path_bytes()));
    for mut directory in directories {
        let path = directory.path()?.into_owned();
        put(&mut directory, to, &path)?;
    }
    Ok(top)
}

fn put(entry: &mut Entry<'_, impl Read>, into: &Path, path: &Path) -> io::Result<()> {
    if entry.unpack_in(into)? {
        return Ok(());
    }
    let message = format!("'{}' leads out of its place", path.display());
    Err(io::Error::new(io::ErrorKind::InvalidData, message))
}

fn first_name(path: &Path) -> OsString {
    match path.components().next() {
        Some(Component::Normal(name)) => name.to_owned(),
        _ => CONTENTS.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
    use std::os::unix::net::UnixListener;

    use super::*;

    /// What packing and unpacking with messages in between makes of it.
    fn carry(from: &Path, to: &Path) -> io::Result<()> {
        let mut pieces = std::collections::VecDeque::new();
        let mut sink = Pieces::new(|piece: Vec<u8>| {
            assert!(!piece.is_empty() && piece.len() <= MAX_DATA);
            pieces.push_back(piece);
            Ok(())
        });
        pack(from, &mut sink)?;
        unpack(&mut Joined::new(|| Ok(pieces.pop_front())), to, false)
    }

    fn tree(at: &Path) {
        fs::create_dir_all(at.join("d/empty")).unwrap();
        fs::write(at.join("d/large"), vec![7; 300_000]).unwrap();
        fs::write(at.join("d/script"), "#!").unwrap();
        fs::set_permissions(at.join("d/script"), fs::Permissions::from_mode(0o4751)).unwrap();
        symlink("/no/where", at.join("d/link")).unwrap();
        fs::create_dir(at.join("d/closed")).unwrap();
        fs::write(at.join("d/closed/file"), "x").unwrap();
        fs::set_permissions(at.join("d/closed"), fs::Permissions::from_mode(0o555)).unwrap();
        UnixListener::bind(at.join("d/socket")).unwrap();
    }

    fn check(directory: &Path) {
        assert_eq!(fs::read(directory.join("large")).unwrap().len(), 300_000);
        let mode = |name: &str| fs::symlink_metadata(directory.join(name)).unwrap().mode() & 0o7777;
        assert_eq!(mode("script"), 0o751);
        assert_eq!(mode("closed"), 0o555);
        assert_eq!(
            fs::read_link(directory.join("link")).unwrap(),
            Path::new("/no/where")
        );
        assert!(directory.join("empty").is_dir() && directory.join("closed/file").is_file());
        assert!(!directory.join("socket").exists());
    }

    #[test]
    fn a_directory_arrives_as_cp_would_have_it() {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name);
        tree(place.path());
        // as a new name, into a directory that is there, and its contents alone
        carry(&at("d"), &at("new")).unwrap();
        check(&at("new"));
        fs::create_dir(at("there")).unwrap();
        carry(&at("d"), &at("there")).unwrap();
        check(&at("there/d"));
        carry(&at("d/."), &at("contents")).unwrap();
        check(&at("contents"));
        carry(&at("d/."), &at("there")).unwrap();
        check(&at("there"));
        let left = fs::read_dir(place.path()).unwrap().count();
        assert_eq!(left, 4);
    }

    #[test]
    fn a_file_takes_the_name_that_was_given() {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name);
        fs::write(at("a"), "new").unwrap();
        fs::write(at("b"), "old").unwrap();
        carry(&at("a"), &at("b")).unwrap();
        assert_eq!(fs::read(at("b")).unwrap(), b"new");
        assert_eq!(
            carry(&at("a"), &at("c/")).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
        assert_eq!(
            carry(&at("none"), &at("c")).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
        assert!(carry(&at("a"), &at("no/such/place")).is_err());
    }

    /// A stream that holds what the closure adds.
    fn stream(add: impl FnOnce(&mut Builder<Vec<u8>>)) -> Vec<u8> {
        let mut builder = Builder::new(Vec::new());
        add(&mut builder);
        builder.into_inner().unwrap()
    }

    fn add(builder: &mut Builder<Vec<u8>>, name: &str, kind: EntryType, target: &str) {
        let mut header = tar::Header::new_gnu();
        // As a hostile sender would: names that the library does not write.
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(0o644);
        if !target.is_empty() {
            header.set_link_name(target).unwrap();
        }
        header.set_size(0);
        header.set_cksum();
        builder.append(&header, io::empty()).unwrap();
    }

    #[test]
    fn a_hostile_stream_writes_nothing_outside() {
        let place = tempfile::tempdir().unwrap();
        let inside = place.path().join("inside");
        let outside = place.path().join("outside");
        fs::create_dir(&outside).unwrap();
        let target = outside.to_str().unwrap();
        let streams = [
            stream(|b| add(b, "x/../../outside/a", EntryType::Regular, "")),
            stream(|b| add(b, "../outside/a", EntryType::Regular, "")),
            stream(|b| {
                add(b, "x", EntryType::Symlink, target);
                add(b, "x/a", EntryType::Regular, "");
            }),
            stream(|b| {
                add(b, "x/l", EntryType::Symlink, target);
                add(b, "x/l/a", EntryType::Regular, "");
            }),
            stream(|b| add(b, "x", EntryType::Link, &format!("{target}/secret"))),
            stream(|b| {
                add(b, "a", EntryType::Regular, "");
                add(b, "b", EntryType::Regular, "");
            }),
        ];
        fs::write(outside.join("secret"), "s").unwrap();
        for (number, bytes) in streams.iter().enumerate() {
            fs::create_dir(&inside).unwrap();
            for to in [inside.clone(), inside.join("new")] {
                let result = unpack(&mut bytes.as_slice(), &to, false);
                assert!(result.is_err(), "stream {number} to {}", to.display());
            }
            let names: Vec<_> = fs::read_dir(&outside)
                .unwrap()
                .map(|e| e.unwrap().file_name())
                .collect();
            assert_eq!(names, ["secret"], "stream {number}");
            assert_eq!(fs::metadata(outside.join("secret")).unwrap().nlink(), 1);
            fs::remove_dir_all(&inside).unwrap();
        }
    }

    #[test]
    fn devices_are_left_out() {
        let place = tempfile::tempdir().unwrap();
        let bytes = stream(|b| {
            add(b, "x/", EntryType::Directory, "");
            add(b, "x/null", EntryType::Char, "");
            add(b, "x/pipe", EntryType::Fifo, "");
            add(b, "x/file", EntryType::Regular, "");
        });
        unpack(&mut bytes.as_slice(), place.path(), false).unwrap();
        let names: Vec<_> = fs::read_dir(place.path().join("x"))
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(names, ["file"]);
    }
}
