//! Opening images by their paths: which format they are of, what they are based on, and that nobody
//! else uses them.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::blocks::BlockImage;
use crate::error::Error;
use crate::{Disk, HostFile, Passphrase, Qcow2, Raw, SECTOR_SIZE, qcow2, vhd, vhdx, vmdk};

/// Images that one may be based on, one on the other, at most.
const MAX_CHAIN: usize = 64;

/// What an image's file is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The bytes of the disk.
    Raw,
    /// QEMU's format.
    Qcow2,
    /// Microsoft's old format: read, and written as a whole.
    Vhd,
    /// Microsoft's new format: the same.
    Vhdx,
    /// VMware's format: the same.
    Vmdk,
    /// The same in a form to be sent, compressed.
    VmdkStream,
}

impl Format {
    /// All there are.
    pub const ALL: [Self; 6] = [
        Self::Raw,
        Self::Qcow2,
        Self::Vhd,
        Self::Vhdx,
        Self::Vmdk,
        Self::VmdkStream,
    ];

    /// Its usual name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vhd => "vhd",
            Self::Vhdx => "vhdx",
            Self::Vmdk => "vmdk",
            Self::VmdkStream => "vmdk-stream",
        }
    }

    /// The format of this name, which may be QEMU's.
    pub fn from_name(name: &str) -> Option<Self> {
        let name = if name == "vpc" { "vhd" } else { name };
        Self::ALL.into_iter().find(|format| format.name() == name)
    }

    /// Whether images of it can be written in place.
    pub fn is_writable(self) -> bool {
        matches!(self, Self::Raw | Self::Qcow2)
    }

    /// What a file looks like, if not like a raw disk.
    fn of_content(file: &HostFile) -> crate::Result<Option<Self>> {
        let mut first = [0; 512];
        file.read_bytes(0, &mut first)?;
        Ok(if first.starts_with(b"QFI\xfb") {
            Some(Self::Qcow2)
        } else if vmdk::is_vmdk(&first) {
            Some(Self::Vmdk)
        } else if vhdx::is_vhdx(&first) {
            Some(Self::Vhdx)
        } else if vhd::is_vhd(file)? {
            Some(Self::Vhd)
        } else {
            None
        })
    }

    /// What a name ends like.
    fn of_extension(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()? {
            "qcow2" => Some(Self::Qcow2),
            "vhd" => Some(Self::Vhd),
            "vhdx" => Some(Self::Vhdx),
            "vmdk" => Some(Self::Vmdk),
            _ => None,
        }
    }
}

/// Writes what is on a disk to a file, which is empty, as an image of a format that is written as a
/// whole. `progress` is told how many bytes of the disk are done.
pub fn export(
    from: &dyn Disk,
    file: &HostFile,
    format: Format,
    progress: &dyn Fn(u64),
) -> crate::Result<()> {
    match format {
        Format::Vhd => vhd::write(file, from, progress),
        Format::Vhdx => vhdx::write(file, from, progress),
        Format::Vmdk => vmdk::write(file, from, false, progress),
        Format::VmdkStream => vmdk::write(file, from, true, progress),
        Format::Raw | Format::Qcow2 => {
            let what = "raw and qcow2 images are written in place".to_owned();
            Err(Error::Invalid(what))
        }
    }
}

/// Why a file cannot be a disk. The text names the file and says what to do.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no such file.
    #[error(
        "disk {0} does not exist; check the path, or make it: strata disk create {0} 1G",
        path.display()
    )]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// It is a directory, socket, pipe or terminal.
    #[error("disk {} is {what}; a disk is an image file or a block device", path.display())]
    NotADisk {
        /// The file.
        path: PathBuf,
        /// What it is, with its article.
        what: &'static str,
    },
    /// The file may not be read.
    #[error("disk {} may not be read by this user; change its permissions or owner", path.display())]
    NotReadable {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file may be read but not written.
    #[error(
        "disk {} may not be written by this user; change its permissions, or attach it read-only",
        path.display()
    )]
    NotWritable {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Another process, or this machine already, uses it.
    #[error(
        "disk {} is in use by another machine or process (or attached twice); stop that one, \
         or attach the disk read-only in all of them",
        path.display()
    )]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// The file is empty.
    #[error("disk {0} is empty; make an image: strata disk create {0} 1G", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// The size is no multiple of a sector.
    #[error(
        "disk {0} is {size} bytes long, which is not a multiple of 512; is it a raw image? \
         To pad it: truncate -s %512 {0}",
        path.display()
    )]
    OddSize {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// It looks like another format than its name says. A guest can write what it likes to a raw
    /// disk, so its content alone decides nothing.
    #[error(
        "disk {} looks like {looks} but is not called so; say which it is: format=raw or \
         format={looks}, or rename it to end in .{looks}",
        path.display()
    )]
    Ambiguous {
        /// The file.
        path: PathBuf,
        /// What it looks like.
        looks: &'static str,
    },
    /// Its format is not written in place.
    #[error(
        "disk {0} is a {format} image, which is only read; convert it: strata disk convert {0} \
         {1}, or attach it read-only",
        path.display(), path.with_extension("qcow2").display()
    )]
    OnlyRead {
        /// The file.
        path: PathBuf,
        /// Its format.
        format: &'static str,
    },
    /// The image cannot be used.
    #[error("disk {} cannot be used", path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Error,
    },
    /// What it is based on cannot be used.
    #[error("disk {} is based on another, which cannot be used", path.display())]
    Backing {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<OpenError>,
    },
    /// Anything else.
    #[error("disk {} cannot be opened", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// An image whose file is open and locked.
#[derive(Debug)]
pub struct Opened {
    /// Its format.
    pub format: Format,
    /// The file.
    pub file: HostFile,
    /// What a qcow2 image says it needs.
    pub references: qcow2::References,
    path: PathBuf,
    write: bool,
}

/// Opens and locks an image: to `write`, for this process alone; else, with others that only read.
/// Without a `format`, its name decides: what does not end in a format's name is raw.
pub fn open(path: &Path, format: Option<Format>, write: bool) -> Result<Arc<dyn Disk>, OpenError> {
    open_with(path, format, write, Key::None)
}

/// The same for an image that may be encrypted, or may be based on one that is.
pub fn open_with(
    path: &Path,
    format: Option<Format>,
    write: bool,
    key: Key,
) -> Result<Arc<dyn Disk>, OpenError> {
    let opened = open_file(path, format, write)?;
    disk(opened, key, &mut Vec::new())
}

/// What there is to open encrypted images with.
#[derive(Clone, Copy, Debug)]
pub enum Key<'a> {
    /// Nothing: they are refused.
    None,
    /// The passphrase of all of them, of those too that others are based on.
    Passphrase(&'a Passphrase),
    /// They stay locked: it can be asked what is where, and nothing be read.
    NotNeeded,
}

impl<'a> From<Option<&'a Passphrase>> for Key<'a> {
    fn from(passphrase: Option<&'a Passphrase>) -> Self {
        passphrase.map_or(Self::None, Self::Passphrase)
    }
}

impl Key<'_> {
    /// Unlocks an image, if it is encrypted.
    pub fn unlock(self, image: &mut Qcow2) -> crate::Result<()> {
        match self {
            _ if !image.is_encrypted() => Ok(()),
            Self::None => Err(Error::Locked),
            Self::Passphrase(passphrase) => image.unlock(passphrase),
            Self::NotNeeded => Ok(()),
        }
    }
}

/// Opens the file of an image alone.
pub fn open_file(path: &Path, format: Option<Format>, write: bool) -> Result<Opened, OpenError> {
    let file = HostFile::new(lock(path, write)?);
    let path = path.to_path_buf();
    let looks = match Format::of_content(&file) {
        Ok(looks) => looks,
        Err(source) => return Err(OpenError::Image { path, source }),
    };
    let format = match (format.or_else(|| Format::of_extension(&path)), looks) {
        (Some(format), _) => format,
        (None, None) => Format::Raw,
        (None, Some(looks)) => {
            let looks = looks.name();
            return Err(OpenError::Ambiguous { path, looks });
        }
    };
    let references = match format {
        _ if write && !format.is_writable() => {
            let format = format.name();
            return Err(OpenError::OnlyRead { path, format });
        }
        Format::Qcow2 => match qcow2::references(&file) {
            Ok(references) => references,
            Err(source) => return Err(OpenError::Image { path, source }),
        },
        _ => qcow2::References::default(),
    };
    Ok(Opened {
        format,
        file,
        references,
        path,
        write,
    })
}

impl Opened {
    /// Where the image is that this one is based on, and its format.
    pub fn backing(&self) -> Result<Option<(PathBuf, Option<Format>)>, OpenError> {
        let Some(name) = &self.references.backing else {
            return Ok(None);
        };
        let invalid = |what: String| OpenError::Image {
            path: self.path.clone(),
            source: Error::Unsupported(what),
        };
        let name = name.strip_prefix("file:").unwrap_or(name);
        let is_url = name
            .split_once(':')
            .is_some_and(|(scheme, _)| !scheme.contains('/') && !self.beside(name).exists());
        if is_url {
            return Err(invalid(format!("{name:?} as what it is based on")));
        }
        let format = match self.references.backing_format.as_deref() {
            None => None,
            Some(format) => match Format::from_name(format) {
                None => return Err(invalid(format!("a backing image of format {format}"))),
                known => known,
            },
        };
        Ok(Some((self.beside(name), format)))
    }

    fn beside(&self, name: &str) -> PathBuf {
        let folder = self.path.parent().unwrap_or(Path::new(""));
        folder.join(name)
    }
}

fn disk(opened: Opened, key: Key, chain: &mut Vec<(u64, u64)>) -> Result<Arc<dyn Disk>, OpenError> {
    let path = opened.path.clone();
    let image_error = |source| OpenError::Image {
        path: path.clone(),
        source,
    };
    if opened.format == Format::Raw {
        let disk = Raw::open(opened.file, opened.write).map_err(image_error)?;
        let size = disk.size();
        if size == 0 {
            return Err(OpenError::Empty { path });
        }
        if !size.is_multiple_of(SECTOR_SIZE) {
            return Err(OpenError::OddSize { path, size });
        }
        return Ok(Arc::new(disk));
    }
    let only_read = match opened.format {
        Format::Vhd => Some(vhd::open as fn(HostFile) -> crate::Result<BlockImage>),
        Format::Vhdx => Some(vhdx::open as _),
        Format::Vmdk | Format::VmdkStream => Some(vmdk::open as _),
        Format::Raw | Format::Qcow2 => None,
    };
    if let Some(open) = only_read {
        return Ok(Arc::new(open(opened.file).map_err(image_error)?));
    }
    let metadata = fs::metadata(&path).map_err(|e| image_error(e.into()))?;
    let identity = (metadata.dev(), metadata.ino());
    if chain.len() >= MAX_CHAIN || chain.contains(&identity) {
        let what = "the images that it is based on go round, or are too many".to_owned();
        return Err(image_error(Error::Invalid(what)));
    }
    chain.push(identity);
    let backing = match opened.backing()? {
        None => None,
        Some((below, format)) => {
            let found = open_file(&below, format, false).and_then(|below| disk(below, key, chain));
            let backing = found.map_err(|source| OpenError::Backing {
                path: path.clone(),
                source: Box::new(source),
            });
            Some(backing?)
        }
    };
    let data = match &opened.references.data_file {
        None => None,
        Some(name) => Some(HostFile::new(lock(&opened.beside(name), opened.write)?)),
    };
    let image = Qcow2::open(opened.file, backing, data, opened.write);
    let mut image = image.map_err(image_error)?;
    key.unlock(&mut image).map_err(image_error)?;
    Ok(Arc::new(image))
}

/// Opens and locks a file or block device.
fn lock(path: &Path, write: bool) -> Result<File, OpenError> {
    let path = path.to_path_buf();
    // a block device that is mounted refuses to be opened exclusively
    let exclusive = check_kind(&path)? == Kind::BlockDevice && write;
    let file = OpenOptions::new()
        .read(true)
        .write(write)
        .custom_flags(if exclusive { libc::O_EXCL } else { 0 })
        .open(&path)
        .map_err(|source| open_error(&path, write, source))?;
    let lock = if write {
        file.try_lock()
    } else {
        file.try_lock_shared()
    };
    match lock {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(OpenError::InUse { path }),
        // some network file systems have no locks
        Err(TryLockError::Error(error)) => {
            tracing::warn!(disk = %path.display(), %error, "the disk cannot be locked");
            Ok(file)
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    File,
    BlockDevice,
}

fn check_kind(path: &Path) -> Result<Kind, OpenError> {
    let path = path.to_path_buf();
    let kind = match fs::metadata(&path) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Err(OpenError::Missing { path });
        }
        Err(source) if source.kind() == ErrorKind::PermissionDenied => {
            return Err(OpenError::NotReadable { path, source });
        }
        Err(source) => return Err(OpenError::Io { path, source }),
    };
    let what = match kind {
        _ if kind.is_file() => return Ok(Kind::File),
        _ if kind.is_block_device() => return Ok(Kind::BlockDevice),
        _ if kind.is_dir() => "a directory",
        _ if kind.is_char_device() => "a character device",
        _ if kind.is_fifo() => "a pipe",
        _ => "a socket",
    };
    Err(OpenError::NotADisk { path, what })
}

fn open_error(path: &Path, write: bool, source: io::Error) -> OpenError {
    let path = path.to_path_buf();
    match source.kind() {
        ErrorKind::NotFound => OpenError::Missing { path },
        ErrorKind::ReadOnlyFilesystem => OpenError::NotWritable { path, source },
        ErrorKind::PermissionDenied if write && File::open(&path).is_ok() => {
            OpenError::NotWritable { path, source }
        }
        ErrorKind::PermissionDenied => OpenError::NotReadable { path, source },
        // a block device that is mounted, or a program that runs
        ErrorKind::ResourceBusy | ErrorKind::ExecutableFileBusy => OpenError::InUse { path },
        _ => OpenError::Io { path, source },
    }
}
