//! What a machine boots: a kernel of the user's, or the appliance with what the guest is to do.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use strata_disk::Format;
use strata_image::oci::{self, Image, Lease, Store};
use strata_machines::Machine;
use strata_net::{DOMAIN, Joined, SUBNET_BITS};
use strata_protocol::{Container, GREETING, Mount, Network, Run, Session, Size, Streams};
use strata_vmm::{DiskConfig, DiskContent, DiskImage, InitrdPart};

use super::Fault;
use crate::appliance;
use crate::cli::{Init, RunArgs};
use crate::share;
use crate::terminal;
use crate::units::{self, Volume};

/// Kernel command line of the default appliance. The console is the serial line; a panic
/// resets at once, so that a run never hangs on one; boot messages stay out of the way.
const APPLIANCE_COMMAND_LINE: &str = "console=ttyS0 panic=-1";

/// Added where boot messages are not asked for.
const QUIET: &str = "quiet";

/// What the image of a machine in the background writes, in the machine's directory, and how much
/// that may be if nothing is said, bytes. It takes room as it is written to.
const SCRATCH: &str = "scratch.img";
const SCRATCH_SIZE: u64 = 16 << 30;

/// What runs in the guest, and where its streams lead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Talk {
    /// A main command.
    Command(Streams),
    /// What is on the console is all that is known.
    Console,
    /// Nothing runs by itself.
    Nobody,
}

impl Talk {
    /// For a machine in the foreground or in the background. An image has a command of its own,
    /// which talks to people on the console.
    pub(super) fn of(args: &RunArgs, detached: bool) -> Self {
        if args.kernel.is_some() || args.init == Init::Image {
            return if detached {
                Self::Nobody
            } else {
                Self::Console
            };
        }
        let has_command = !args.command.is_empty() || args.image.is_some();
        if detached {
            return match (args.tty, args.interactive) {
                (true, _) => Self::Command(Streams::Terminal(Size::USUAL)),
                (_, true) => Self::Command(Streams::Attached),
                _ if args.has_main_command() => Self::Command(Streams::Ports),
                _ => Self::Nobody,
            };
        }
        let somebody_types = io::stdin().is_terminal();
        let on_console = args.tty || (args.command.is_empty() && (somebody_types || !has_command));
        Self::Command(if on_console {
            Streams::Console
        } else {
            Streams::Ports
        })
    }

    pub(super) fn is_on_console(self) -> bool {
        matches!(self, Self::Console | Self::Command(Streams::Console))
    }
}

/// What runs where there is a terminal and nothing else was asked for.
const SHELL: [&str; 2] = ["/bin/sh", "-l"];

/// What shapes a boot beside the arguments.
pub(super) struct Wanted<'a> {
    pub(super) args: &'a RunArgs,
    /// Boot messages are shown.
    pub(super) verbose: bool,
    pub(super) talk: Talk,
    /// The guest's place on its network.
    pub(super) joined: Option<&'a Joined>,
    /// What the guest is to be called.
    pub(super) name: Option<String>,
    /// The machine, if it lasts: what its image writes does, too.
    pub(super) lasting: Option<&'a Machine>,
}

/// What is booted.
pub(super) struct Boot {
    pub(super) kernel: PathBuf,
    pub(super) initrd: Vec<InitrdPart>,
    /// `None`: what suits the kernel.
    pub(super) command_line: Option<String>,
    /// What the guest says when it is ready for input; empty where nothing is known of it.
    pub(super) greeting: &'static str,
    pub(super) disks: Vec<DiskConfig>,
    /// What keeps the image's disks until the machine has them open: its layers, and the file
    /// without a name that is written to.
    pub(super) keeps: (Option<Lease>, Option<File>),
}

impl Boot {
    pub(super) fn prepare(wanted: &Wanted<'_>) -> Result<Self, Fault> {
        let args = wanted.args;
        let mut disks = disks(args);
        if let Some(kernel) = &args.kernel {
            return Ok(Self {
                kernel: kernel.clone(),
                initrd: args.initrd.iter().cloned().map(InitrdPart::File).collect(),
                command_line: args.append.clone(),
                greeting: "",
                disks,
                keeps: (None, None),
            });
        }
        let mut command = args.command.clone();
        let mut container = None;
        let mut keeps = (None, None);
        if let Some(name) = &args.image {
            let store = Store::of_user()?;
            keeps.0 = Some(store.lease()?);
            let pinned = wanted
                .lasting
                .and_then(|machine| machine.asked().image.as_ref());
            let image = match pinned {
                Some(pinned) => store.pinned(&pinned.name, &pinned.id)?,
                None => store.find(name)?,
            };
            command = words(&image, &args.command);
            if command.is_empty() && args.init == Init::Strata {
                return Err(Fault::NoCommand(name.clone()));
            }
            container = Some(wanted.container(&store, &image, &mut disks, &mut keeps.1)?);
        }
        let appliance = appliance::get().map_err(Fault::Appliance)?;
        let mut command_line = APPLIANCE_COMMAND_LINE.to_owned();
        for more in (!wanted.verbose)
            .then_some(QUIET)
            .into_iter()
            .chain(args.append.as_deref())
        {
            command_line = format!("{command_line} {more}");
        }
        let session = wanted.session(&command, container);
        Ok(Self {
            kernel: appliance.kernel,
            initrd: vec![
                InitrdPart::File(appliance.initramfs),
                InitrdPart::Bytes(strata_image::segment(&session)),
            ],
            command_line: Some(command_line),
            // An init of the image's own says what it likes, and never that.
            greeting: match args.init {
                Init::Image => "",
                Init::Strata => GREETING,
            },
            disks,
            keeps,
        })
    }
}

impl Wanted<'_> {
    /// Adds the disks of an image, and says which they are and how commands run there.
    fn container(
        &self,
        store: &Store,
        image: &Image,
        disks: &mut Vec<DiskConfig>,
        unnamed: &mut Option<File>,
    ) -> Result<Container, Fault> {
        let mut add = |disk| {
            disks.push(disk);
            disk_name(disks.len() - 1)
        };
        let raw = |path| DiskConfig::image(path, Some(Format::Raw), false);
        // All layers are one disk, a partition each: disks are few, and images have up to 127.
        let parts = image.layers.iter().enumerate().map(|(number, layer)| {
            let image = DiskImage::new(layer.path.clone(), Some(Format::Raw));
            (format!("layer-{number}"), image)
        });
        let disk = add(DiskConfig {
            content: DiskContent::Partitions(parts.collect()),
            read_only: true,
        });
        let layers = (1..=image.layers.len()).map(|number| format!("{disk}{number}"));
        let layers = layers.collect();
        let scratch = match (self.lasting, self.args.scratch) {
            (Some(machine), size) => {
                let path = machine.directory().join(SCRATCH);
                oci::scratch_at(store, &path, size.unwrap_or(SCRATCH_SIZE))?;
                Some(add(raw(path)))
            }
            (None, Some(size)) => {
                let file = unnamed.insert(oci::scratch(store, size)?);
                let path = format!("/proc/self/fd/{}", file.as_raw_fd());
                Some(add(raw(path.into())))
            }
            (None, None) => None,
        };
        let config = image.config.config().clone().unwrap_or_default();
        let stop_signal = config.stop_signal().as_ref();
        Ok(Container {
            layers,
            scratch,
            environment: bytes_of(config.env().iter().flatten()),
            user: config.user().clone().unwrap_or_default(),
            directory: config.working_dir().clone().unwrap_or_default(),
            volumes: config.volumes().clone().unwrap_or_default(),
            stop_signal: stop_signal.and_then(|name| units::signal(name).ok()),
        })
    }

    fn session(&self, command: &[OsString], container: Option<Container>) -> Session {
        Session {
            run: match self.talk {
                Talk::Command(streams) => Run::Command {
                    words: match command {
                        [] => bytes_of(SHELL),
                        words => bytes_of(words),
                    },
                    streams,
                },
                _ if self.args.init == Init::Image => Run::Init,
                _ => Run::Wait,
            },
            container,
            term: std::env::var_os("TERM")
                .filter(|_| io::stdout().is_terminal())
                .map(OsString::into_vec),
            size: terminal::size(),
            name: self.name.clone(),
            network: self.joined.map(|joined| Network {
                address: joined.addresses.ipv4,
                bits: SUBNET_BITS,
                gateway: joined.gateway,
                domain: DOMAIN.to_owned(),
            }),
            sockets_first: self.args.vsock.is_some(),
            mounts: mounts(self.args),
        }
    }
}

/// What runs in an image: its entry point, with its own arguments or those that were given.
fn words(image: &Image, given: &[OsString]) -> Vec<OsString> {
    let config = image.config.config().clone().unwrap_or_default();
    let own = |words: &Option<Vec<String>>| -> Vec<OsString> {
        words.iter().flatten().map(OsString::from).collect()
    };
    let mut words = own(config.entrypoint());
    if given.is_empty() {
        words.extend(own(config.cmd()));
    } else {
        words.extend_from_slice(given);
    }
    words
}

fn bytes_of(words: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Vec<Vec<u8>> {
    let words = words.into_iter();
    words
        .map(|word| word.as_ref().as_bytes().to_vec())
        .collect()
}

/// What Linux calls the nth virtio disk, counted from 0: vda to vdz, vdaa to vdzz.
fn disk_name(number: usize) -> String {
    let letter = |number: usize| char::from(b'a' + (number % 26) as u8);
    let mut name = "vd".to_owned();
    if number >= 26 {
        name.push(letter(number / 26 - 1));
    }
    name.push(letter(number));
    name
}

fn disks(args: &RunArgs) -> Vec<DiskConfig> {
    args.disks
        .iter()
        .map(|disk| DiskConfig {
            content: DiskContent::Image(DiskImage {
                path: disk.path.clone(),
                format: disk.format,
                passphrase: disk.passphrase.clone(),
            }),
            read_only: disk.read_only,
        })
        .collect()
}

/// What the guest mounts: a folder within another after that one.
fn mounts(args: &RunArgs) -> Vec<Mount> {
    let mount = |(volume, number): (&Volume, usize)| Mount {
        tag: share::tag(number),
        path: volume.guest.clone().into_os_string().into_vec(),
        read_only: volume.read_only,
        file: share::file_in(volume),
    };
    let mut mounts: Vec<_> = args.volumes.iter().zip(0..).map(mount).collect();
    mounts.sort_by(|a, b| a.path.cmp(&b.path));
    mounts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_called_as_linux_calls_them() {
        let names = [0, 1, 25, 26, 27, 51, 52].map(disk_name);
        assert_eq!(names, ["vda", "vdb", "vdz", "vdaa", "vdab", "vdaz", "vdba"]);
    }
}
