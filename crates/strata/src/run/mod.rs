//! `strata run`: from arguments to a machine, and from its end to an exit status.

mod boot;
mod ended;
mod streams;

use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

use strata_image::oci;
use strata_machines::{Claim, LogWriter, Machine as Known, Registry};
use strata_sandbox::Role;
use strata_vmm::{Accel, BootModule, Machine, MachineConfig, VsockConfig};

use self::boot::{Boot, Talk, Wanted};
use self::ended::Ended;
use self::streams::{Streams, Terminal};
use crate::cli::{Accelerator, RunArgs};
use crate::command::Control;
use crate::console::Ring;
use crate::exit::End;
use crate::machines;
use crate::network;
use crate::report;
use crate::sandbox;
use crate::share;
use crate::sockets;
use crate::stats::{Maps, Stats};
use crate::supervisor::{SignalTarget, Supervisor};

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

    /// The machine cannot be made known, or its log kept.
    #[error(transparent)]
    Registry(#[from] Box<machines::Fault>),

    /// A folder cannot be shared.
    #[error(transparent)]
    Share(#[from] share::Fault),

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
            Self::Share(fault) => fault.advice(),
            Self::Registry(fault) => match fault.as_ref() {
                machines::Fault::Registry(strata_machines::Error::NoStateDirectory) => {
                    Some("set XDG_STATE_HOME to a directory that can be written to")
                }
                _ => None,
            },
            Self::Sandbox(sandbox::Fault::Incomplete(_)) => Some(
                "use --sandbox auto to run with the layers that there are; 'strata doctor' lists \
                 them",
            ),
            _ => None,
        }
    }
}

/// A machine that others can find, and this process's hold on it.
pub(crate) struct Life {
    pub(crate) machine: Known,
    pub(crate) claim: Claim,
    /// It is in the background: it lasts, and has nobody's streams.
    pub(crate) detached: bool,
}

/// Runs a machine to its end, with this process's streams.
pub(crate) fn run(args: &RunArgs, verbose: bool) -> Result<End, Fault> {
    let mut life = register(args)?;
    let (end, _) = go(args, verbose, life.as_mut())?;
    Ok(end)
}

/// Runs a machine to its end in the background, where it remembers how that came.
pub(crate) fn in_background(args: &RunArgs, mut life: Life) -> End {
    let (end, reason) = go(args, false, Some(&mut life)).unwrap_or_else(|fault| {
        // Read by whoever started this process, if nothing runs yet.
        report::say_error(&fault);
        if let Some(advice) = fault.advice() {
            report::say(advice);
        }
        (End::NotStarted, Some(fault.to_string()))
    });
    let reason = reason.unwrap_or_else(|| end.word().to_owned());
    let _ = life
        .claim
        .end(strata_machines::End::now(end.status(), reason));
    end
}

/// Makes a machine in the foreground known, so that others can find it. One that has no name goes
/// without where that is not possible.
fn register(args: &RunArgs) -> Result<Option<Life>, Fault> {
    let registered = machines::spec(args).and_then(|spec| {
        let (machine, claim) = Registry::of_user()?.create_ephemeral(&spec)?;
        Ok(Life {
            machine,
            claim,
            detached: false,
        })
    });
    match registered {
        Ok(life) => Ok(Some(life)),
        Err(machines::Fault::Run(fault)) => Err(*fault),
        Err(fault) if args.name.is_some() => Err(Fault::Registry(Box::new(fault))),
        Err(fault) => {
            tracing::info!("this machine cannot be found by others: {fault}");
            Ok(None)
        }
    }
}

fn registry_fault(error: strata_machines::Error) -> Fault {
    Fault::Registry(Box::new(error.into()))
}

/// Runs a machine to its end; gives that, and what there is to say of it.
fn go(
    args: &RunArgs,
    verbose: bool,
    life: Option<&mut Life>,
) -> Result<(End, Option<String>), Fault> {
    strata_vmm::give_back_large_blocks();
    let lasting = life.as_ref().filter(|life| life.detached);
    let lasting = lasting.map(|life| &life.machine);
    let talk = Talk::of(args, lasting.is_some());
    // One without a name of its own is not looked for by it.
    let name = args.name.clone();
    let name = name.or_else(|| Some(lasting?.name().to_owned()));
    let shares = share::open(args)?;
    let joined = network::join(args, name.clone())?;
    let ring = lasting
        .map(|machine| LogWriter::open(&machine.directory().join(machines::LOG)))
        .transpose()
        .map_err(registry_fault)?
        .map(Ring::new);
    let boot = Boot::prepare(&Wanted {
        args,
        verbose,
        talk,
        joined: joined.as_ref(),
        name,
        lasting,
    })?;
    let vsock = vsock(args, life.as_ref().map(|life| &life.machine))?;
    let supervisor = Supervisor::new();
    let streams = Streams::new(
        args,
        verbose,
        talk,
        ring.as_ref(),
        boot.greeting,
        &supervisor,
    )?;
    let config = MachineConfig {
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
        shares,
        vsock,
        console: streams.console,
        ports: streams.ports,
    };
    let role = match config.vsock {
        Some(_) => Role::ListeningMachine,
        None => Role::Machine,
    };

    let opened = Machine::open(config).map_err(Fault::Machine)?;
    drop(boot.keeps);
    // In the background signals are for the machine: its command has ways of its own.
    let target = match (&streams.terminal, streams.control.clone()) {
        (Some(_), control) => SignalTarget::Terminal(control),
        (None, Some(control)) if lasting.is_none() && !talk.is_on_console() => {
            SignalTarget::Command(control)
        }
        _ => SignalTarget::Nobody,
    };
    let signals = supervisor
        .catch_signals(target)
        .map_err(Fault::host("watch for signals"))?;

    let maps = args.stats.map(|_| Maps::open()).transpose();
    let maps = maps.map_err(Fault::host("look at this process's memory"))?;

    strata_vmm::give_back_program();
    if let Some(life) = life {
        life.claim.started().map_err(registry_fault)?;
        if life.detached {
            machines::tell_started().map_err(Fault::host("leave the terminal"))?;
        }
    }
    // All is open; no thread has been started yet, as most locks ask for.
    sandbox::lock_up(args.sandbox, role)?;
    let machine = opened.build().map_err(Fault::Machine)?;
    let raw = streams
        .terminal
        .map_or(Ok(None), Terminal::start)
        .map_err(Fault::host("make the terminal raw"))?;
    signals.watch().map_err(Fault::host("start a thread"))?;
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

    Ok(Ended {
        outcome,
        stop: stop.get(),
        progress: streams.control.as_ref().map(Control::progress),
        on_console: talk.is_on_console(),
        tail: streams.hidden.as_ref(),
    }
    .tell())
}

/// The machine's socket device. Its host end is where it was asked for, and with the machine:
/// what is in the appliance talks to other commands there.
fn vsock(args: &RunArgs, machine: Option<&Known>) -> Result<Option<VsockConfig>, Fault> {
    let listen = |path: &Path| {
        let action = format!("make the vsock socket '{}'", path.display());
        let listener = sockets::take_over(path).map_err(Fault::host(action))?;
        Ok(Some(VsockConfig {
            cid: VsockConfig::CID,
            listener,
        }))
    };
    let own = machine.map(|machine| machine.directory().join(machines::SOCKET));
    match (&args.vsock, own) {
        (Some(path), own) => {
            let config = listen(path)?;
            if let Some(own) = own {
                let _ = std::fs::remove_file(&own);
                std::path::absolute(path)
                    .and_then(|path| symlink(path, &own))
                    .map_err(Fault::host(format!("make the link '{}'", own.display())))?;
            }
            Ok(config)
        }
        (None, Some(own)) if args.kernel.is_none() => listen(&own),
        (None, _) => Ok(None),
    }
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
