//! Debian in a machine, up to its login shell: boots it, runs lines of shell in it, powers
//! it off. Called by the command.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use strata_image::{Archive, Cache};
use tempfile::TempDir;

use super::conversation::{Conversation, Heard};
use super::disk;
use crate::Error;
use crate::progress::Lines;

const MEMORY: &str = "1536M";
/// How long booting and powering off may take.
const BOOT: Duration = Duration::from_mins(4);
/// How long the shell may take for next to nothing.
const SOON: Duration = Duration::from_secs(30);
/// The last of a long output that is shown.
const SHOWN: usize = 4000;

/// What starts first in the guest, as `rdinit=`; `switch_root` wants it to be called so.
const INIT: &str = "/init";
/// Loads the disk's driver and goes on with the disk's own init, which is systemd.
const SCRIPT: &str = "#!/bin/busybox sh\n\
    /bin/busybox mount -t proc proc /proc\n\
    /bin/busybox mount -t sysfs sysfs /sys\n\
    /bin/busybox mount -t devtmpfs dev /dev\n\
    /bin/busybox modprobe -a virtio_pci virtio_blk virtio_rng\n\
    /bin/busybox mount -t ext4 /dev/vda /mnt\n\
    /bin/busybox umount /proc /sys /dev\n\
    exec /bin/busybox switch_root /mnt /sbin/init\n";

/// What root's login shell says when it is ready for a line.
const PROMPT: &str = "root@strata:~# ";
/// From then on the shell is quiet but for what it is told to do, nothing waits for a reader,
/// and an interrupt leaves alone what is typed after it.
const HUSH: &str = "stty -echo noflsh; exec env PS1= PS2= PAGER=cat LC_ALL=C TERM=dumb sh\n";
/// Ends what a line says. Lines spell it in two parts, so that no echo is taken for it.
const MARK: &str = "<<ended ";

/// How a line of shell ended.
#[derive(Debug)]
pub(super) enum Ended {
    /// With this status, having said this.
    Status(u32, String),
    /// Not in time, having said this.
    Late(String),
}

impl Ended {
    /// The last of what was said, where it is of interest: after a failure.
    pub(super) fn complaint(&self) -> Option<&str> {
        let (Self::Status(1.., said) | Self::Late(said)) = self else {
            return None;
        };
        let start = said.len().saturating_sub(SHOWN);
        let start = (start..said.len()).find(|at| said.is_char_boundary(*at));
        Some(said.get(start.unwrap_or(0)..).unwrap_or_default())
    }
}

/// The machine, at its shell.
pub(super) struct Guest {
    talk: Conversation,
    patience: u32,
    /// Its disk and boot files.
    _directory: TempDir,
}

impl Guest {
    /// Boots from a copy of the disk `image`.
    pub(super) fn boot(
        strata: &Path,
        image: &Path,
        cpus: u32,
        patience: u32,
    ) -> Result<Self, Error> {
        let kept = disk::directory()?;
        let directory = tempfile::tempdir_in(&kept).map_err(Error::file("use", &kept))?;
        let root = directory.path().join("root.img");
        disk::copy(image, &root)?;
        let initrd = directory.path().join("initrd");
        let kernel = boot_files(&initrd)?;
        let mut command = Command::new(strata);
        command
            .args(["run", "--accel", "soft", "--memory", MEMORY])
            .args(["--cpus", &cpus.to_string()])
            .arg("--kernel")
            .arg(kernel)
            .arg("--initrd")
            .arg(initrd)
            .args(["--append", &format!("console=ttyS0 panic=-1 rdinit={INIT}")])
            .arg("--disk")
            .arg(root);
        let log = kept.join(format!("console-{cpus}.log"));
        let mut guest = Self {
            talk: Conversation::start("strata", &mut command, &log)?,
            patience,
            _directory: directory,
        };
        guest.expect(PROMPT, BOOT)?;
        guest.talk.say(HUSH);
        guest.expect_answer()?;
        Ok(guest)
    }

    /// Runs a line of shell, without input, for `limit` at most.
    pub(super) fn run(&mut self, line: &str, limit: Duration) -> Result<Ended, Error> {
        self.talk.say(&format!(
            "( {line} ) </dev/null 2>&1; echo '<<'\"ended $?>>\"\n"
        ));
        match self.talk.wait_for(MARK, limit) {
            Heard::Words(said) => {
                let status = self.expect(">>", SOON)?;
                let status = status
                    .parse()
                    .map_err(|_| Error::Output(format!("the shell's status is '{status}'")))?;
                Ok(Ended::Status(status, said))
            }
            Heard::Nothing => Ok(Ended::Late(self.talk.unheard().to_owned())),
            Heard::End => Err(self.lost("it ended")),
        }
    }

    /// Interrupts a line that takes too long.
    pub(super) fn interrupt(&mut self) -> Result<(), Error> {
        self.talk.say("\x03");
        self.expect_answer()
    }

    /// Sees that the shell does as it is told.
    fn expect_answer(&mut self) -> Result<(), Error> {
        self.talk.say("\necho rea''dy\n");
        self.expect("ready\r\n", SOON).map(drop)
    }

    /// Has systemd power it off.
    pub(super) fn power_off(mut self) -> Result<(), Error> {
        self.talk.say("systemctl poweroff\n");
        if self.talk.end(BOOT * self.patience) {
            return Ok(());
        }
        Err(self.lost("it did not power off"))
    }

    fn expect(&mut self, words: &str, limit: Duration) -> Result<String, Error> {
        match self.talk.wait_for(words, limit * self.patience) {
            Heard::Words(before) => Ok(before),
            Heard::Nothing => Err(self.lost(&format!("it did not say '{words}' in time"))),
            Heard::End => Err(self.lost("it ended")),
        }
    }

    fn lost(&self, how: &str) -> Error {
        let said = Ended::Late(self.talk.unheard().to_owned());
        Error::Ended {
            what: "the guest".to_owned(),
            how: format!("is lost: {how}\n{}", said.complaint().unwrap_or_default()),
        }
    }
}

/// Writes the initramfs and gives the kernel, both the default appliance's.
fn boot_files(initrd: &Path) -> Result<std::path::PathBuf, Error> {
    let appliance = Cache::of_user()?.appliance(&mut Lines)?;
    let mut bytes =
        fs::read(&appliance.initramfs).map_err(Error::file("read", &appliance.initramfs))?;
    let mut archive = Archive::new();
    archive.file(INIT, 0o755, SCRIPT.as_bytes());
    bytes.extend(archive.finish());
    fs::write(initrd, bytes).map_err(Error::file("write", initrd))?;
    Ok(appliance.kernel)
}
