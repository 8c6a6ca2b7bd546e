//! `strata run`: from arguments to a machine, and from its end to an exit status.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use strata_disk::Format;
use strata_image::oci::{self, Lease, Store};
use strata_image::{Container, GREETING, Network, Session, Start};
use strata_net::{DOMAIN, Joined, SUBNET_BITS};
use strata_sandbox::Role;
use strata_vmm::{
    Accel, BootModule, ConsolePort, DiskConfig, InitrdPart, Machine, MachineConfig, Outcome,
    SerialConsole,
};

use crate::appliance;
use crate::cli::{Accelerator, Init, RunArgs};
use crate::command::{self, Status};
use crate::console::{KeyInput, Output, PipeInput, Show, Tail, Typist};
use crate::exit::End;
use crate::guard::Guard;
use crate::network;
use crate::report::say;
use crate::sandbox;
use crate::stats::{Maps, Stats};
use crate::supervisor::{Stop, Supervisor};
use crate::terminal::{self, RawMode};

/// Kernel command line of the default appliance. The console is the serial line; a panic
/// resets at once, so that a run never hangs on one; boot messages stay out of the way.
const APPLIANCE_COMMAND_LINE: &str = "console=ttyS0 panic=-1";

/// Added where boot messages are not asked for with `-v`.
const QUIET: &str = "quiet";

/// How much of a hidden console is shown when the guest dies, lines.
const SHOWN_ON_DEATH: usize = 60;

/// Why no machine was started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    /// The default appliance cannot be had.
    #[error("the default appliance cannot be built")]
    Appliance(#[source] strata_image::Error),

    /// The container image cannot be run.
    #[error(transparent)]
    Image(#[from] oci::Error),

    /// The container image does not say what to run.
    #[error("the image '{0}' has no command of its own")]
    NoCommand(String),

    /// The machine refuses its configuration.
    #[error(transparent)]
    Machine(strata_vmm::Error),

    /// The machine has not the network that it is to have.
    #[error(transparent)]
    Network(#[from] network::Fault),

    /// This process is not locked up as it has to be.
    #[error(transparent)]
    Sandbox(#[from] sandbox::Fault),

    /// Something of this host's cannot be used.
    #[error("cannot {action}")]
    Host {
        /// To be read after "cannot".
        action: String,
        /// What the host said.
        source: io::Error,
    },
}

impl Fault {
    fn host(action: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let action = action.into();
        move |source| Self::Host { action, source }
    }

    /// What to do about it, where the error itself does not say.
    pub(crate) fn advice(&self) -> Option<&'static str> {
        use strata_image::Error;
        match self {
            Self::Appliance(Error::NoCacheDirectory | Error::Io { .. }) => Some(
                "set XDG_CACHE_HOME to a directory that can be written to, or boot files of your \
                 own with --kernel FILE (a Linux bzImage or vmlinux) and --initrd FILE",
            ),
            Self::Appliance(_) => Some(
                "boot files of your own instead: --kernel FILE (a Linux bzImage or vmlinux) and \
                 --initrd FILE (an initramfs); or copy ~/.cache/strata from a host where \
                 'strata run' has built the appliance",
            ),
            Self::Image(error) => error.advice(),
            Self::NoCommand(_) => Some("give one after --, such as -- /bin/sh"),
            Self::Sandbox(sandbox::Fault::Incomplete(_)) => Some(
                "use --sandbox auto to run with the layers that there are; 'strata doctor' lists \
                 them",
            ),
            _ => None,
        }
    }
}

/// Runs a machine to its end.
pub(crate) fn run(args: &RunArgs, verbose: bool) -> Result<End, Fault> {
    strata_vmm::give_back_large_blocks();
    let joined = network::join(args)?;
    // An image has a command of its own, which talks to people on the console.
    let runs_image = args.image.is_some() && args.init == Init::Strata;
    let wants_command = !args.command.is_empty() || (runs_image && !io::stdin().is_terminal());
    let boot = Boot::prepare(args, verbose, !wants_command, joined.as_ref())?;
    let supervisor = Supervisor::new();
    let log = args.console_log.as_deref().map(|path| {
        File::create(path).map_err(Fault::host(format!(
            "create the console log '{}'",
            path.display()
        )))
    });
    let show = match (wants_command, verbose) {
        (false, _) => Show::Stdout,
        (true, true) => Show::Stderr,
        (true, false) => Show::Hidden,
    };
    let output = Output::new(show, log.transpose()?, boot.greeting, supervisor.stopper());
    let tail = output.tail();
    let gate = output.gate();
    let status = Status::default();

    // The terminal becomes raw only when all else is well.
    let on_terminal = !wants_command && io::stdin().is_terminal();
    let mut config = MachineConfig {
        cpus: args.cpus,
        memory: args.memory,
        accel: match args.accel {
            Accelerator::Auto => Accel::Auto,
            Accelerator::Soft => Accel::Soft,
        },
        kernel: boot.kernel,
        initrd: boot.initrd,
        modules: modules(args),
        command_line: boot.command_line,
        debug_exit: args.debug_exit,
        disks: boot.disks,
        networks: joined.into_iter().collect(),
        console: SerialConsole {
            output: Box::new(output),
            input: None,
        },
        ports: Vec::<ConsolePort>::new(),
    };
    let mut guard = None;
    let mut typist = None;
    if wants_command {
        config.ports = command::ports(&status, &supervisor.stopper());
    } else if on_terminal {
        guard = Guard::start()
            .inspect_err(|error| tracing::warn!(%error, "no guard for the terminal"))
            .ok();
        let (keys, reader) = KeyInput::new(gate, supervisor.stopper());
        config.console.input = Some(Box::new(keys));
        typist = Some(reader);
    } else {
        config.console.input = Some(Box::new(PipeInput::new(gate)));
    }

    let opened = Machine::open(config).map_err(Fault::Machine)?;
    drop(boot.keeps);
    let signals = supervisor
        .catch_signals(on_terminal)
        .map_err(Fault::host("watch for signals"))?;

    let maps = args.stats.map(|_| Maps::open()).transpose();
    let maps = maps.map_err(Fault::host("look at this process's memory"))?;

    strata_vmm::give_back_program();
    // All is open; no thread has been started yet, as most locks ask for.
    sandbox::lock_up(args.sandbox, Role::Machine)?;
    let machine = opened.build().map_err(Fault::Machine)?;
    let raw = if on_terminal {
        RawMode::enter(guard).map_err(Fault::host("make the terminal raw"))?
    } else {
        None
    };
    typist
        .map_or(Ok(()), Typist::start)
        .and_then(|()| signals.watch())
        .map_err(Fault::host("start a thread"))?;
    let control = machine.control();
    let stop = supervisor
        .start(args.timeout, move || control.stop())
        .map_err(Fault::host("start a thread"))?;
    let mut stats = None;
    let outcome = machine.run_then(|cpus| stats = maps.map(|maps| Stats::take(maps, cpus)));
    drop(raw);
    if let (Some(form), Some(stats)) = (args.stats, stats) {
        stats.tell(form);
    }

    let status = wants_command.then_some(status);
    Ok(Ended {
        outcome,
        stop: stop.get(),
        status,
        tail: (show == Show::Hidden).then_some(&tail),
    }
    .tell())
}

/// What runs in an image: its entry point, with its own arguments or those that were given.
fn words(image: &oci::Image, given: &[OsString]) -> Vec<OsString> {
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

fn disks(args: &RunArgs) -> Vec<DiskConfig> {
    args.disks
        .iter()
        .map(|disk| DiskConfig {
            path: disk.path.clone(),
            format: disk.format,
            read_only: disk.read_only,
        })
        .collect()
}

fn modules(args: &RunArgs) -> Vec<BootModule> {
    args.modules
        .iter()
        .map(|module| BootModule {
            path: module.path.clone(),
            arguments: module.arguments.clone(),
        })
        .collect()
}

/// What is booted.
struct Boot {
    kernel: PathBuf,
    initrd: Vec<InitrdPart>,
    /// `None`: what suits the kernel.
    command_line: Option<String>,
    /// What the guest says when it is ready for input; empty where nothing is known of it.
    greeting: &'static str,
    disks: Vec<DiskConfig>,
    /// What keeps the image's disks until the machine has them open: its layers, and the file
    /// without a name that is written to.
    keeps: (Option<Lease>, Option<File>),
}

impl Boot {
    fn prepare(
        args: &RunArgs,
        verbose: bool,
        on_console: bool,
        joined: Option<&Joined>,
    ) -> Result<Self, Fault> {
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
        let mut container = None;
        let mut command = args.command.clone();
        let mut lease = None;
        let mut scratch = None;
        if let Some(name) = &args.image {
            let store = Store::of_user()?;
            lease = Some(store.lease()?);
            let image = store.find(name)?;
            command = words(&image, &args.command);
            if command.is_empty() && args.init == Init::Strata {
                return Err(Fault::NoCommand(name.clone()));
            }
            let config = image.config.config().clone().unwrap_or_default();
            container = Some(Container {
                first_disk: disks.len(),
                layers: image.layers.len(),
                environment: config.env().clone().unwrap_or_default(),
                user: config.user().clone().unwrap_or_default(),
                directory: config.working_dir().clone().unwrap_or_default(),
                start: match args.init {
                    Init::Image => Start::Init,
                    Init::Strata if on_console => Start::OnConsole,
                    Init::Strata => Start::OnPorts,
                },
                has_scratch: args.scratch.is_some(),
            });
            disks.extend(image.layers.into_iter().map(|layer| DiskConfig {
                path: layer.path,
                format: Some(Format::Raw),
                read_only: true,
            }));
            if let Some(size) = args.scratch {
                let file = oci::scratch(&store, size)?;
                disks.push(DiskConfig {
                    path: format!("/proc/self/fd/{}", file.as_raw_fd()).into(),
                    format: Some(Format::Raw),
                    read_only: false,
                });
                scratch = Some(file);
            }
        }
        let appliance = appliance::get().map_err(Fault::Appliance)?;
        let session = Session {
            command,
            container,
            term: std::env::var_os("TERM").filter(|_| io::stdout().is_terminal()),
            size: terminal::size(),
            name: args.name.clone(),
            network: joined.map(|joined| Network {
                address: joined.addresses.ipv4,
                bits: SUBNET_BITS,
                gateway: joined.gateway,
                domain: DOMAIN,
            }),
        };
        let mut command_line = APPLIANCE_COMMAND_LINE.to_owned();
        for more in (!verbose)
            .then_some(QUIET)
            .into_iter()
            .chain(args.append.as_deref())
        {
            command_line = format!("{command_line} {more}");
        }
        Ok(Self {
            kernel: appliance.kernel,
            initrd: vec![
                InitrdPart::File(appliance.initramfs),
                InitrdPart::Bytes(session.segment()),
            ],
            command_line: Some(command_line),
            // An init of the image's own says what it likes, and never that.
            greeting: match args.init {
                Init::Image => "",
                Init::Strata => GREETING,
            },
            disks,
            keeps: (lease, scratch),
        })
    }
}

/// All that is known when a machine has ended.
struct Ended<'a> {
    outcome: Outcome,
    /// Why we stopped it, if we did.
    stop: Option<&'a Stop>,
    /// What is known of the command, if there was to be one.
    status: Option<Status>,
    /// The console's last output, where the user has not seen it.
    tail: Option<&'a Tail>,
}

impl Ended<'_> {
    /// Says what is to be said and gives the end.
    fn tell(&self) -> End {
        let (end, message) = self.judge();
        if let Some(message) = message {
            if let Some(tail) = self.tail
                && !matches!(end, End::Timeout | End::Done)
            {
                for line in tail.lines(SHOWN_ON_DEATH) {
                    eprintln!("{line}");
                }
            }
            say(&message);
        }
        end
    }

    fn judge(&self) -> (End, Option<String>) {
        let died = |end, what: &str| (end, Some(what.to_owned()));
        match &self.outcome {
            Outcome::Panic => return died(End::KernelPanic, "the guest's kernel panicked"),
            Outcome::TripleFault => {
                return died(
                    End::TripleFault,
                    "the guest's processor shut down on a triple fault",
                );
            }
            Outcome::Failed(why) => {
                return (
                    End::MachineFailed,
                    Some(format!("the machine could not go on: {why}")),
                );
            }
            Outcome::Stopped => {
                return match self.stop {
                    Some(stop) => (stop.end(), stop.message()),
                    None => died(End::MachineFailed, "the machine stopped for no reason"),
                };
            }
            Outcome::DebugExit(value) => return (End::DebugExit(*value), None),
            Outcome::PowerOff | Outcome::Reset => {}
        }
        let Some(progress) = self.status.as_ref().map(Status::progress) else {
            return (End::Done, None);
        };
        match progress.exit {
            Some(status) => (End::Command(status), None),
            None if progress.started => died(
                End::Done,
                "the guest powered off or rebooted before the command ended",
            ),
            None => died(
                End::CommandNotStarted,
                "the guest ended before the command could be started",
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn judge(outcome: Outcome, status: Option<&str>) -> End {
        let status = status.map(|text| {
            let mut status = Status::default();
            status.write_all(text.as_bytes()).unwrap();
            status
        });
        let ended = Ended {
            outcome,
            stop: None,
            status,
            tail: None,
        };
        ended.judge().0
    }

    #[test]
    fn power_off_and_reboot_end_a_run_well() {
        assert_eq!(judge(Outcome::PowerOff, None), End::Done);
        assert_eq!(judge(Outcome::Reset, None), End::Done);
    }

    #[test]
    fn a_commands_status_is_the_runs() {
        let status = Some("ready\nexit 7\n");
        assert_eq!(judge(Outcome::PowerOff, status), End::Command(7));
    }

    #[test]
    fn a_command_that_powers_off_ends_the_run_well() {
        assert_eq!(judge(Outcome::PowerOff, Some("ready\n")), End::Done);
    }

    #[test]
    fn a_guest_that_never_started_the_command_is_a_failure() {
        assert_eq!(judge(Outcome::PowerOff, Some("")), End::CommandNotStarted);
        assert_eq!(judge(Outcome::Reset, Some("")), End::CommandNotStarted);
    }

    #[test]
    fn a_debug_exit_is_the_guests_own_end() {
        assert_eq!(judge(Outcome::DebugExit(0), None).status(), 1);
    }

    #[test]
    fn death_of_the_guest_outweighs_the_commands_status() {
        let status = Some("ready\nexit 0\n");
        assert_eq!(judge(Outcome::Panic, status), End::KernelPanic);
        assert_eq!(judge(Outcome::TripleFault, status), End::TripleFault);
        let failed = Outcome::Failed("x".into());
        assert_eq!(judge(failed, status), End::MachineFailed);
    }
}
