//! `strata disk`: images made, looked at, changed and copied.

mod args;
mod device;
mod report;

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub(crate) use args::DiskCommand;
use args::{ConvertArgs, CreateArgs, LayoutArgs, Packing, SnapshotCommand};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use strata_disk::qcow2::{self, Compression, Secret};
use strata_disk::{Disk, Format, HostFile, Key, OpenError, Opened, Passphrase, Qcow2, Raw};

use crate::exit::End;
use crate::units;

/// Why a command about disks failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiskFault {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("{}", path.display())]
    Image {
        path: PathBuf,
        source: strata_disk::Error,
    },
    #[error("{} exists already; remove it first, or use another name", path.display())]
    Exists { path: PathBuf },
    #[error("{} cannot be made", path.display())]
    Create { path: PathBuf, source: io::Error },
    #[error("{0}")]
    Usage(String),
}

type Result<T, E = DiskFault> = std::result::Result<T, E>;

/// Names the image that something failed with.
fn with<T, E: Into<strata_disk::Error>>(path: &Path, result: Result<T, E>) -> Result<T> {
    result.map_err(|source| DiskFault::Image {
        path: path.to_path_buf(),
        source: source.into(),
    })
}

/// Carries out `strata disk`.
pub(crate) fn run(command: DiskCommand) -> Result<End> {
    match command {
        DiskCommand::Create(args) => create(&args)?,
        DiskCommand::Clone {
            from,
            to,
            format,
            key_file,
        } => clone(&from, &to, format, key_file.as_ref())?,
        DiskCommand::Info(args) => report::info(&args)?,
        DiskCommand::Check { look, repair } => return report::check(&look, repair),
        DiskCommand::Map(args) => report::map(&args)?,
        DiskCommand::Convert(args) => convert(&args)?,
        DiskCommand::Capture {
            device,
            image,
            no_verify,
        } => device::capture(&device, &image, !no_verify)?,
        DiskCommand::Restore {
            image,
            device,
            key_file,
            yes,
            no_verify,
        } => device::restore(&image, &device, key_file.as_ref().into(), yes, !no_verify)?,
        DiskCommand::Resize {
            path,
            size,
            shrink,
            format,
            key_file,
        } => resize(&path, &size, shrink, format, key_file.as_ref().into())?,
        DiskCommand::Commit { path, key_file } => commit(&path, key_file.as_ref().into())?,
        DiskCommand::Rebase {
            path,
            onto,
            onto_format,
            name_only,
            key_file,
        } => {
            let onto = onto.as_deref().map(|onto| (onto, onto_format));
            rebase(&path, onto, name_only, key_file.as_ref().into())?;
        }
        DiskCommand::Snapshot(command) => snapshot(command)?,
    }
    Ok(End::Done)
}

/// What a new image is to be, by its name.
fn format_of(path: &Path, format: Option<Format>) -> Format {
    let extension = path.extension().and_then(|e| e.to_str());
    format.unwrap_or(match extension {
        Some("raw" | "img") => Format::Raw,
        Some("vhd") => Format::Vhd,
        Some("vhdx") => Format::Vhdx,
        Some("vmdk") => Format::Vmdk,
        _ => Format::Qcow2,
    })
}

impl LayoutArgs {
    /// Refuses to leave what should be secret in the clear.
    fn check(&self, format: Format) -> Result<()> {
        if format != Format::Qcow2 && self.encrypt.is_some() {
            let what = "only qcow2 images can be encrypted; use --format or --to-format qcow2";
            return Err(DiskFault::Usage(what.to_owned()));
        }
        Ok(())
    }

    fn options(&self, size: u64) -> qcow2::Options {
        qcow2::Options {
            cluster_size: self.cluster_size,
            compression: match self.compression {
                Packing::Zlib => Compression::Zlib,
                Packing::Zstd => Compression::Zstd,
            },
            extended_l2: self.extended_l2,
            secret: self.encrypt.clone().map(|passphrase| Secret {
                cipher: self.cipher,
                hash: self.hash,
                ..Secret::new(passphrase)
            }),
            ..qcow2::Options::new(size)
        }
    }
}

/// A new image, which is removed again if making it fails.
fn make(path: &Path, fill: impl FnOnce(HostFile) -> Result<()>) -> Result<()> {
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path);
    let file = file.map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => DiskFault::Exists {
            path: path.to_path_buf(),
        },
        _ => DiskFault::Create {
            path: path.to_path_buf(),
            source,
        },
    })?;
    // as when a file is copied: it can be made again
    let result = fill(HostFile::relaxed(file));
    if result.is_err() {
        let _ = fs::remove_file(path);
    }
    result
}

fn create(args: &CreateArgs) -> Result<()> {
    let format = format_of(&args.path, args.format);
    let backing = match &args.backing {
        None => None,
        Some(path) => Some(backing(&args.path, path, args.backing_format)?),
    };
    let size = args.size.or(backing.as_ref().map(|backing| backing.size));
    let size = size.unwrap_or_default();
    if !format.is_writable() {
        let what = "images of this format are made by strata disk convert, of another image";
        return Err(DiskFault::Usage(what.to_owned()));
    }
    args.layout.check(format)?;
    if format == Format::Raw {
        if backing.is_some() {
            let what = "a raw image has no room to say what it is based on; use --format qcow2";
            return Err(DiskFault::Usage(what.to_owned()));
        }
        return make(&args.path, |file| with(&args.path, file.set_size(size)));
    }
    let mut options = args.layout.options(size);
    options.backing = backing.map(|backing| (backing.name, backing.format.name().to_owned()));
    make(&args.path, |file| {
        with(&args.path, qcow2::create(&file, &options))
    })
}

/// What an image is to be based on.
struct Backing {
    name: String,
    format: Format,
    size: u64,
}

/// Looks at the image at `below`, and how the one at `path` is to name it.
fn backing(path: &Path, below: &Path, format: Option<Format>) -> Result<Backing> {
    let format = strata_disk::open_file(below, format, false)?.format;
    let size = strata_disk::open_with(below, Some(format), false, Key::NotNeeded)?.size();
    let absolute = |path: &Path| with(path, std::path::absolute(path));
    let folder = absolute(path)?.parent().map(Path::to_path_buf);
    let below = absolute(below)?;
    // beside it: the two can be moved together
    let name = folder.and_then(|folder| below.strip_prefix(folder).ok().map(Path::to_path_buf));
    let name = name.unwrap_or(below);
    match name.to_str() {
        Some(name) => Ok(Backing {
            name: name.to_owned(),
            format,
            size,
        }),
        None => Err(DiskFault::Usage(format!(
            "{} is not UTF-8, which an image cannot name; rename it",
            name.display()
        ))),
    }
}

fn clone(from: &Path, to: &Path, format: Option<Format>, key: Option<&Passphrase>) -> Result<()> {
    let below = backing(to, from, format)?;
    let opened = strata_disk::open_file(from, Some(below.format), false)?;
    let is_encrypted = below.format == Format::Qcow2
        && with(from, qcow2::facts(&opened.file))?.encryption.is_some();
    drop(opened);
    let mut options = qcow2::Options::new(below.size);
    if is_encrypted {
        // what is changed is as secret as what is not
        strata_disk::open_with(from, Some(below.format), false, key.into())?;
        options.secret = key.cloned().map(Secret::new);
    }
    options.backing = Some((below.name, below.format.name().to_owned()));
    make(to, |file| with(to, qcow2::create(&file, &options)))
}

/// Opens a qcow2 image alone, without what it is based on.
fn qcow2_alone(path: &Path, format: Option<Format>, write: bool) -> Result<Qcow2> {
    let opened = strata_disk::open_file(path, format, write)?;
    if opened.format != Format::Qcow2 {
        let what = format!(
            "{} is no qcow2 image: it has no tables to look at",
            path.display()
        );
        return Err(DiskFault::Usage(what));
    }
    let Opened { file, .. } = opened;
    with(path, Qcow2::open_tables(file, write))
}

/// Shows how far something has come, on a terminal.
fn progress(total: u64, what: &'static str) -> ProgressBar {
    let template = "{msg} [{wide_bar}] {binary_bytes}/{binary_total_bytes} {eta}";
    let style = ProgressStyle::with_template(template);
    ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr())
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        .with_message(what)
}

fn convert(args: &ConvertArgs) -> Result<()> {
    let key = args.key_file.as_ref().into();
    let from = strata_disk::open_with(&args.from, args.from_format, false, key)?;
    let bar = progress(from.size(), "copying");
    let tell = |done| bar.set_position(done);
    let format = format_of(&args.to, args.to_format);
    if args.compress && format != Format::Qcow2 {
        let what = "only qcow2 images are compressed at will, and vmdk-stream always";
        return Err(DiskFault::Usage(what.to_owned()));
    }
    args.layout.check(format)?;
    if args.compress && args.layout.encrypt.is_some() {
        let what = "what is encrypted cannot be compressed too; leave out one of both";
        return Err(DiskFault::Usage(what.to_owned()));
    }
    make(&args.to, |file| {
        let to = &args.to;
        if !format.is_writable() {
            return with(to, strata_disk::export(&*from, &file, format, &tell));
        }
        if format == Format::Raw {
            with(to, file.set_size(from.size()))?;
            let disk = with(to, Raw::open(file, true))?;
            with(to, strata_disk::copy(&*from, &disk, true, &tell))?;
            return with(to, disk.flush());
        }
        with(to, qcow2::create(&file, &args.layout.options(from.size())))?;
        let mut disk = with(to, Qcow2::open(file, None, None, true))?;
        with(
            to,
            Key::from(args.layout.encrypt.as_ref()).unlock(&mut disk),
        )?;
        if args.compress {
            with(to, disk.copy_compressed(&*from, &tell))?;
        } else {
            with(to, strata_disk::copy(&*from, &disk, true, &tell))?;
        }
        with(to, disk.close())
    })?;
    bar.finish_and_clear();
    Ok(())
}

fn resize(path: &Path, size: &str, shrink: bool, format: Option<Format>, key: Key) -> Result<()> {
    let usage = |what: String| Err(DiskFault::Usage(what));
    let opened = strata_disk::open_file(path, format, true)?;
    let format = opened.format;
    drop(opened);
    let old = strata_disk::open_with(path, Some(format), false, key)?.size();
    let parsed = |text: &str| units::size(text).map_err(DiskFault::Usage);
    let new = if let Some(more) = size.strip_prefix('+') {
        old.saturating_add(parsed(more)?)
    } else if let Some(less) = size.strip_prefix('-') {
        old.saturating_sub(parsed(less)?)
    } else {
        parsed(size)?
    };
    if new == 0 {
        return usage("a disk cannot be empty".to_owned());
    }
    if new < old && !shrink {
        return usage(format!(
            "the disk has {old} bytes; what is behind {new} would be lost. Make file systems on it \
             smaller first, then say --shrink"
        ));
    }
    if format == Format::Raw {
        let opened = strata_disk::open_file(path, Some(format), true)?;
        return with(path, opened.file.set_size(new));
    }
    let mut image = with_backing(path, true, key)?;
    with(path, image.resize(new))
}

/// Opens a qcow2 image with what it is based on.
fn with_backing(path: &Path, write: bool, key: Key) -> Result<Qcow2> {
    let opened = strata_disk::open_file(path, Some(Format::Qcow2), write)?;
    let backing: Option<Arc<dyn Disk>> = match opened.backing()? {
        None => None,
        Some((below, format)) => Some(strata_disk::open_with(&below, format, false, key)?),
    };
    let mut image = with(path, Qcow2::open(opened.file, backing, None, write))?;
    with(path, key.unlock(&mut image))?;
    Ok(image)
}

fn commit(path: &Path, key: Key) -> Result<()> {
    let opened = strata_disk::open_file(path, Some(Format::Qcow2), true)?;
    let Some((below, format)) = opened.backing()? else {
        let what = format!("{} is based on no other image", path.display());
        return Err(DiskFault::Usage(what));
    };
    let to = strata_disk::open_with(&below, format, true, key)?;
    // for what this image does not say: it is only read there
    let mut image = with(
        path,
        Qcow2::open(opened.file, Some(Arc::clone(&to)), None, true),
    )?;
    with(path, key.unlock(&mut image))?;
    let bar = progress(image.size(), "committing");
    with(path, image.commit_to(&*to, &|done| bar.set_position(done)))?;
    bar.finish_and_clear();
    with(path, image.close())
}

fn rebase(
    path: &Path,
    onto: Option<(&Path, Option<Format>)>,
    name_only: bool,
    key: Key,
) -> Result<()> {
    let below = onto.map(|(onto, format)| backing(path, onto, format));
    let below = below.transpose()?;
    let onto = onto.map(|(onto, _)| onto);
    let named = below
        .as_ref()
        .map(|below| (below.name.as_str(), below.format.name()));
    if name_only {
        let mut image = qcow2_alone(path, None, true)?;
        return with(path, image.set_backing(named));
    }
    let mut image = with_backing(path, true, key)?;
    let disk = match (onto, &below) {
        (Some(onto), Some(below)) => {
            let format = Some(below.format);
            Some(strata_disk::open_with(onto, format, false, key)?)
        }
        _ => None,
    };
    let onto = disk
        .as_deref()
        .zip(named)
        .map(|(disk, (name, format))| (disk, name, format));
    let bar = progress(image.size(), "comparing");
    with(path, image.rebase(onto, &|done| bar.set_position(done)))?;
    bar.finish_and_clear();
    Ok(())
}

fn snapshot(command: SnapshotCommand) -> Result<()> {
    let (path, name, change): (_, _, fn(&mut Qcow2, &str) -> strata_disk::Result<()>) =
        match command {
            SnapshotCommand::Ls(args) => return report::list_snapshots(&args),
            SnapshotCommand::Create { path, name } => (path, name, Qcow2::create_snapshot),
            SnapshotCommand::Apply { path, name } => (path, name, Qcow2::apply_snapshot),
            SnapshotCommand::Rm { path, name } => (path, name, Qcow2::delete_snapshot),
        };
    let mut image = qcow2_alone(&path, None, true)?;
    with(&path, change(&mut image, &name))
}

/// Says what failed.
pub(crate) fn say(fault: &DiskFault) -> End {
    crate::report::say_error(fault);
    End::NotStarted
}
