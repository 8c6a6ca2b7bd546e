//! Reader for Debian packages, without dpkg.
//!
//! A package is an `ar` archive whose member `data.tar[.xz|.zst|.gz]` holds the files
//! (deb(5)). Called by `appliance` only. It never writes to the host's disk.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::Path;

use crate::error::Error;

/// Largest file taken from a package. Kernels and tools are far smaller.
const MAX_FILE_BYTES: u64 = 256 << 20;

/// A regular file inside a package.
pub(crate) struct Member<'a> {
    /// Its path without leading `./` or `/`, and without `usr/` before `lib` or `bin`, so
    /// that packages from before and after Debian's merge of `/usr` read alike.
    pub(crate) path: &'a str,
    reader: &'a mut dyn Read,
    size: u64,
}

impl Member<'_> {
    /// The whole contents.
    pub(crate) fn read(&mut self) -> io::Result<Vec<u8>> {
        if self.size > MAX_FILE_BYTES {
            return Err(io::Error::other(format!("'{}' is too large", self.path)));
        }
        let mut data = Vec::with_capacity(self.size as usize);
        self.reader.read_to_end(&mut data)?;
        Ok(data)
    }
}

/// Calls `visit` for each regular file of the package at `path`, in the package's order, and
/// `position` with the bytes of the package read so far.
pub(crate) fn for_each_file(
    path: &Path,
    position: &mut dyn FnMut(u64),
    mut visit: impl FnMut(&mut Member<'_>) -> io::Result<()>,
) -> Result<(), Error> {
    let file = File::open(path).map_err(Error::io("open the package", path))?;
    let counted = Counted {
        inner: BufReader::with_capacity(1 << 18, file),
        read: 0,
        position,
    };
    let mut package = ar::Archive::new(counted);
    while let Some(member) = package.next_entry() {
        let member = member.map_err(|e| damaged(path, &e))?;
        let name = String::from_utf8_lossy(member.header().identifier()).into_owned();
        let name = name.trim_end_matches('/');
        let Some(suffix) = name.strip_prefix("data.tar") else {
            continue;
        };
        let data = decompress(suffix, member).map_err(|e| damaged(path, &e))?;
        return visit_tar(data, &mut visit).map_err(|e| damaged(path, &e));
    }
    Err(Error::bad(
        path,
        "not a Debian package, or a truncated one: it has no data.tar member",
    ))
}

fn damaged(path: &Path, error: &io::Error) -> Error {
    Error::bad(path, format!("the package is damaged: {error}"))
}

/// Undoes the compression that `suffix` (".xz", ".ko.xz" and so on) names.
pub(crate) fn decompress<'a>(
    suffix: &str,
    reader: impl Read + 'a,
) -> io::Result<Box<dyn Read + 'a>> {
    Ok(match suffix.rsplit('.').next().unwrap_or_default() {
        "xz" => Box::new(lzma_rust2::XzReader::new(reader, true)),
        "zst" => Box::new(
            ruzstd::decoding::StreamingDecoder::new(reader)
                .map_err(|e| io::Error::other(e.to_string()))?,
        ),
        "gz" => Box::new(flate2::read::MultiGzDecoder::new(reader)),
        "" => Box::new(reader),
        other => {
            return Err(io::Error::other(format!(
                "compression '{other}' is not known"
            )));
        }
    })
}

fn visit_tar(
    data: impl Read,
    visit: &mut impl FnMut(&mut Member<'_>) -> io::Result<()>,
) -> io::Result<()> {
    // Buffered here once: tar reads headers in small pieces.
    let mut tar = tar::Archive::new(BufReader::with_capacity(1 << 18, data));
    for entry in tar.entries()? {
        let mut entry = entry?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let path = path.trim_start_matches("./").trim_start_matches('/');
        let merged = path
            .strip_prefix("usr/")
            .filter(|rest| rest.starts_with("lib/") || rest.starts_with("bin/"));
        let size = entry.size();
        visit(&mut Member {
            path: merged.unwrap_or(path),
            reader: &mut entry,
            size,
        })?;
    }
    Ok(())
}

/// Tells how far the reading of the package file has come.
struct Counted<'a, R> {
    inner: R,
    read: u64,
    position: &'a mut dyn FnMut(u64),
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.read += count as u64;
        (self.position)(self.read);
        Ok(count)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Write;

    use super::*;

    /// Builds a package as dpkg-deb would, with `files` as (path, contents).
    pub(crate) fn package(path: &Path, suffix: &str, files: &[(&str, &[u8])]) {
        let mut tar = tar::Builder::new(Vec::new());
        for (name, data) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(data.len() as u64);
            header.set_mode(0o644);
            header.set_cksum();
            tar.append_data(&mut header, name, *data).unwrap();
        }
        let tar = tar.into_inner().unwrap();
        let data = match suffix {
            ".gz" => {
                let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                gz.write_all(&tar).unwrap();
                gz.finish().unwrap()
            }
            ".xz" => {
                let options = lzma_rust2::XzOptions::with_preset(1);
                let mut xz = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
                xz.write_all(&tar).unwrap();
                xz.finish().unwrap()
            }
            ".zst" => ruzstd::encoding::compress_to_vec(
                tar.as_slice(),
                ruzstd::encoding::CompressionLevel::Fastest,
            ),
            _ => tar,
        };
        let mut package = ar::Builder::new(File::create(path).unwrap());
        let mut member = |name: String, data: &[u8]| {
            let header = ar::Header::new(name.into_bytes(), data.len() as u64);
            package.append(&header, data).unwrap();
        };
        member("debian-binary".into(), b"2.0\n");
        member("control.tar.xz".into(), b"not looked at");
        member(format!("data.tar{suffix}"), &data);
    }

    fn files_of(path: &Path) -> Result<Vec<(String, Vec<u8>)>, Error> {
        let mut found = Vec::new();
        for_each_file(path, &mut |_| {}, |member| {
            found.push((member.path.to_owned(), member.read()?));
            Ok(())
        })?;
        Ok(found)
    }

    #[test]
    fn files_are_read_whatever_the_compression() {
        let dir = tempfile::tempdir().unwrap();
        for suffix in ["", ".gz", ".xz", ".zst"] {
            let path = dir.path().join(format!("p{suffix}.deb"));
            let big = vec![9; 300_000];
            package(
                &path,
                suffix,
                &[("./boot/vmlinuz-6", b"kernel"), ("./bin/b", &big)],
            );

            let files = files_of(&path).unwrap();

            assert_eq!(files[0], ("boot/vmlinuz-6".into(), b"kernel".to_vec()));
            assert_eq!(files[1], ("bin/b".into(), big), "{suffix}");
        }
    }

    #[test]
    fn paths_are_the_same_before_and_after_the_merge_of_usr() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.deb");
        package(
            &path,
            "",
            &[("./usr/bin/busybox", b"x"), ("./usr/share/y", b"")],
        );

        let names: Vec<_> = files_of(&path).unwrap().into_iter().map(|f| f.0).collect();

        assert_eq!(names, ["bin/busybox", "usr/share/y"]);
    }

    #[test]
    fn position_ends_at_the_size_of_the_data() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.deb");
        package(&path, ".xz", &[("./a", &[1; 1000])]);
        let mut last = 0;

        for_each_file(&path, &mut |at| last = at, |_| Ok(())).unwrap();

        assert!(last > 0 && last <= std::fs::metadata(&path).unwrap().len());
    }

    #[test]
    fn a_truncated_package_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("short.deb");
        package(&path, ".xz", &[("./a", &vec![1; 100_000])]);
        let whole = std::fs::read(&path).unwrap();

        for keep in [0, 5, 70, whole.len() / 2, whole.len() - 40] {
            std::fs::write(&path, &whole[..keep]).unwrap();
            let error = files_of(&path).unwrap_err().to_string();
            assert!(error.contains("short.deb"), "{keep}: {error}");
        }
    }

    #[test]
    fn something_else_than_a_package_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("page.deb");
        std::fs::write(&path, "<html>not found</html>").unwrap();

        assert!(files_of(&path).is_err());
    }
}
