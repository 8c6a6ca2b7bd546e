//! `strata disk capture` and `restore`: between images and real disks.

use std::fs;
use std::io::{self, BufRead, IsTerminal};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use indicatif::HumanBytes;
use strata_disk::qcow2::{self, Qcow2};
use strata_disk::{
    Disk, Format, HostFile, Journal, Key, Raw, copy_on, first_difference, journal_path,
};

use super::{DiskFault, Result, format_of, progress, with};

/// Makes an image of a disk.
pub(super) fn capture(device: &Path, image: &Path, verify: bool) -> Result<()> {
    check_device(device)?;
    if image.exists() {
        return Err(DiskFault::Exists {
            path: image.to_path_buf(),
        });
    }
    let format = format_of(image, None);
    if !format.is_writable() {
        let what = "a disk is captured to a raw or qcow2 image; convert that";
        return Err(DiskFault::Usage(what.to_owned()));
    }
    let from = strata_disk::open(device, Some(Format::Raw), false)?;
    // it has its name when it is whole
    let mut part = image.as_os_str().to_owned();
    part.push(".part");
    let part = PathBuf::from(part);
    let journal = journal(device, image, from.size())?;
    if journal.done() == 0 {
        let _ = fs::remove_file(&part);
        super::make(&part, |file| begin(&part, &file, format, from.size()))?;
    }
    let opened = strata_disk::open_file(&part, Some(format), true)?.file;
    let to = with(&part, writable(opened, format))?;
    copy(&*from, &*to, &journal, &part)?;
    if verify {
        compare(&*from, &*to, &part)?;
    }
    with(&part, to.flush())?;
    drop(to);
    with(image, fs::rename(&part, image))
}

fn begin(path: &Path, file: &HostFile, format: Format, size: u64) -> Result<()> {
    match format {
        Format::Raw => with(path, file.set_size(size)),
        _ => with(path, qcow2::create(file, &qcow2::Options::new(size))),
    }
}

fn writable(file: HostFile, format: Format) -> strata_disk::Result<Box<dyn Disk>> {
    Ok(match format {
        Format::Raw => Box::new(Raw::open(file, true)?),
        _ => Box::new(Qcow2::open(file, None, None, true)?),
    })
}

/// Writes an image to a disk.
pub(super) fn restore(
    image: &Path,
    device: &Path,
    key: Key,
    yes: bool,
    verify: bool,
) -> Result<()> {
    check_device(device)?;
    let from = strata_disk::open_with(image, None, false, key)?;
    // refused by the kernel if something on it is mounted
    let to = strata_disk::open(device, Some(Format::Raw), true)?;
    if to.size() < from.size() {
        return Err(DiskFault::Usage(format!(
            "{} has {} bytes, and the image needs {}; make its file systems and then the image smaller",
            device.display(),
            to.size(),
            from.size()
        )));
    }
    if !yes && !confirm(device, to.size())? {
        return Err(DiskFault::Usage("nothing was written".to_owned()));
    }
    let journal = journal(image, device, from.size())?;
    copy(&*from, &*to, &journal, device)?;
    if verify {
        compare(&*from, &*to, device)?;
    }
    Ok(())
}

/// Takes only what is a disk, so that a mistyped name is not a new file in /dev.
fn check_device(path: &Path) -> Result<()> {
    let kind = with(path, fs::metadata(path))?.file_type();
    if kind.is_block_device() {
        return Ok(());
    }
    Err(DiskFault::Usage(format!(
        "{} is no block device; for files there is: strata disk convert",
        path.display()
    )))
}

fn confirm(device: &Path, size: u64) -> Result<bool> {
    if !io::stdin().is_terminal() {
        let what = "there is nobody to ask; --yes writes over the disk without asking";
        return Err(DiskFault::Usage(what.to_owned()));
    }
    eprint!(
        "All that is on {} ({}) will be lost. Type yes to go on: ",
        device.display(),
        HumanBytes(size)
    );
    let mut answer = String::new();
    with(device, io::stdin().lock().read_line(&mut answer))?;
    Ok(answer.trim() == "yes")
}

/// Where it is noted how far a copy has come: in the user's state folder.
fn journal(from: &Path, to: &Path, size: u64) -> Result<Journal> {
    let absolute = |path: &Path| with(path, std::path::absolute(path));
    let (from, to) = (absolute(from)?, absolute(to)?);
    let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/state"));
    let state = std::env::var_os("XDG_STATE_HOME").filter(|state| !state.is_empty());
    let state = state.map(PathBuf::from).or_else(home);
    let folder = state
        .unwrap_or_else(std::env::temp_dir)
        .join("strata/copies");
    with(&folder, fs::create_dir_all(&folder))?;
    let changed = with(&from, fs::metadata(&from).and_then(|from| from.modified()))?;
    let what = format!(
        "{} to {}, {size} bytes, {changed:?}",
        from.display(),
        to.display()
    );
    Ok(Journal::new(journal_path(&folder, &from, &to), &what))
}

fn copy(from: &dyn Disk, to: &dyn Disk, journal: &Journal, path: &Path) -> Result<()> {
    if journal.done() > 0 {
        crate::report::say(&format!("going on after {}", HumanBytes(journal.done())));
    }
    let bar = progress(from.size(), "copying");
    with(
        path,
        copy_on(from, to, journal, &|done| bar.set_position(done)),
    )?;
    bar.finish_and_clear();
    Ok(())
}

fn compare(from: &dyn Disk, to: &dyn Disk, path: &Path) -> Result<()> {
    let bar = progress(from.size(), "comparing");
    let different = with(
        path,
        first_difference(from, to, &|done| bar.set_position(done)),
    )?;
    bar.finish_and_clear();
    match different {
        None => Ok(()),
        Some(at) => Err(DiskFault::Usage(format!(
            "{} is different from byte {at} on: the disk was changed meanwhile, or does not keep what \
             is written",
            path.display()
        ))),
    }
}
