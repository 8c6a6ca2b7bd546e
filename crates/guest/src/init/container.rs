//! The file system of a container image: its layers laid over each other, with room on top for
//! what is written, as the new root.

use std::env::set_current_dir;
use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::sync::OnceLock;

use rustix::mount::{MountFlags, mount, mount_move, mount_remount};
use rustix::process::chroot;
use strata_protocol::{Container, Session};

use super::Fault;
use super::drivers;
use super::network;

/// Where the layers are, and what is written.
const PLACE: &str = "/layers";
/// What they make together.
pub(super) const ROOT: &str = "/layers/root";

/// Where what is written goes, whichever root this process has.
static WRITTEN: OnceLock<File> = OnceLock::new();

/// Makes what the image wrote clean on its disk, when nobody writes any more.
pub(super) fn finish() {
    let Some(place) = WRITTEN.get() else { return };
    // A directory that no path leads to can still be where one is.
    if rustix::process::fchdir(place).is_ok() {
        let _ = mount_remount(".", MountFlags::RDONLY, c"");
    }
}

fn c_string(text: &str) -> io::Result<CString> {
    CString::new(text).map_err(io::Error::from)
}

/// Mounts the layers over each other at [`ROOT`].
fn mount_layers(container: &Container) -> Result<(), Fault> {
    drivers::load_modules(drivers::IMAGE_MODULES);
    let no_room = || Fault::of("make room for what the image writes");
    fs::create_dir_all(PLACE).map_err(no_room())?;
    let mounted = match &container.scratch {
        Some(device) => {
            let device = Path::new("/dev").join(device);
            mount(device, PLACE, "ext4", MountFlags::empty(), c"discard")
        }
        None => mount("scratch", PLACE, "tmpfs", MountFlags::empty(), c"mode=0755"),
    };
    mounted.map_err(io::Error::from).map_err(no_room())?;
    if let Ok(place) = File::open(PLACE) {
        let _ = WRITTEN.set(place);
    }
    // Short names: all of them have to fit into one page.
    set_current_dir(PLACE).map_err(no_room())?;
    for directory in ["upper", "work", "root"] {
        fs::create_dir_all(directory).map_err(no_room())?;
    }
    let mut lower = String::new();
    for (number, device) in container.layers.iter().enumerate().rev() {
        let at = number.to_string();
        fs::create_dir_all(&at)
            .and_then(|()| {
                let device = Path::new("/dev").join(device);
                mount(device, at.as_str(), "erofs", MountFlags::RDONLY, None)?;
                Ok(())
            })
            .map_err(Fault::of(format!("mount layer {number} of the image")))?;
        if !lower.is_empty() {
            lower.push(':');
        }
        lower.push_str(&at);
    }
    c_string(&format!("lowerdir={lower},upperdir=upper,workdir=work"))
        .and_then(|options| {
            mount(
                "image",
                "root",
                "overlay",
                MountFlags::empty(),
                options.as_c_str(),
            )?;
            Ok(())
        })
        .map_err(Fault::of("lay the layers of the image over each other"))
}

/// Makes the image ready at [`ROOT`]: what the kernel offers moves into it, its files learn of
/// the machine, volumes and the host's folders are there.
pub(super) fn prepare(container: &Container, session: &Session) -> Result<(), Fault> {
    mount_layers(container)?;
    let root = Path::new(ROOT);
    let inside = |path: &str| root.join(path.trim_start_matches('/'));
    for directory in ["proc", "sys", "dev", "etc", "run"] {
        fs::create_dir_all(root.join(directory))
            .map_err(Fault::of(format!("make /{directory} in the image")))?;
    }
    network::write_files(session, root).map_err(Fault::of("write /etc in the image"))?;
    for volume in &container.volumes {
        fs::create_dir_all(inside(volume))
            .map_err(Fault::of(format!("make the volume '{volume}'")))?;
    }
    for directory in ["dev", "proc", "sys"] {
        mount_move(Path::new("/").join(directory), root.join(directory))
            .map_err(Fault::of(format!("move /{directory} into the image")))?;
    }
    Ok(())
}

/// Makes [`ROOT`] the root of this process and of all that it starts. What was the root before
/// is under it and takes no memory any more.
pub(super) fn enter() -> Result<(), Fault> {
    forget_appliance();
    set_current_dir(ROOT)
        .and_then(|()| {
            // Moved rather than only entered: for namespaces, too, it is the root then.
            mount_move(".", "/")?;
            chroot(".")?;
            set_current_dir("/")
        })
        .map_err(Fault::of("make the image the root"))
}

/// Deletes the appliance's files, which are in memory.
fn forget_appliance() {
    for directory in ["/bin", "/lib", "/sbin", "/usr", "/strata", "/init"] {
        let path = Path::new(directory);
        let _ = fs::remove_dir_all(path).or_else(|_| fs::remove_file(path));
    }
}
