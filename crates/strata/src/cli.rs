//! The command line.

use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::error::ErrorKind;
use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use strata_net::Forward;

use crate::disk::DiskCommand;
use crate::exit;
use crate::image::ImageArgs;
use crate::machines::{
    AttachArgs, CopyArgs, ExecArgs, KillArgs, LogsArgs, PsArgs, RemoveArgs, StatsArgs, StopArgs,
    WaitArgs,
};
use crate::units::{self, Disk, Module, Network, Volume};

const RUN_KEYS: &str = "\
Keys on the console: Ctrl-A x quits, Ctrl-A h lists the keys, Ctrl-A Ctrl-A sends Ctrl-A.";

/// Real virtual machines on any x86-64 Linux host, with or without hardware virtualization.
#[derive(Debug, Parser)]
#[command(name = "strata", version, max_term_width = 100)]
pub(crate) struct Cli {
    /// Tell more: once what is done and the guest's boot messages, twice and thrice details
    #[arg(long, global = true, action = ArgAction::Count, display_order = 100)]
    pub(crate) verbose: u8,

    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a virtual machine: a shell in it, one command, or a kernel of your own
    ///
    /// Without --kernel it boots the default appliance, Debian's cloud kernel with a minimal user
    /// space, which the first run fetches and builds. The guest's console is on this terminal;
    /// with -- CMD the command runs in the guest instead, with this process's standard input,
    /// output and error, and its exit status.
    Run(Box<RunArgs>),
    /// List machines: those that run, or all
    Ps(PsArgs),
    /// Run a program in a machine that runs
    ///
    /// It runs as the machine's image says, with this process's standard output and error, and its
    /// status is this one's: 126 and 127 as in a shell. In a machine with a kernel of its own there
    /// is nobody to ask.
    Exec(ExecArgs),
    /// Take part in the command of a machine in the background, as if it ran here
    ///
    /// What it prints from now on is printed here; what is typed is its input, if the machine was run
    /// with -i or -t; signals go to it, and its status is this one's. Ctrl-\ leaves, and on a
    /// terminal that was made with -t it is Ctrl-A d; the machine goes on.
    Attach(AttachArgs),
    /// Print what a machine in the background printed
    Logs(LogsArgs),
    /// Copy files between this host and a machine that runs
    Cp(CopyArgs),
    /// Stop machines: ask first, then end them
    Stop(StopArgs),
    /// Start machines again that have ended
    Start {
        /// The machines: names, or first digits of IDs
        #[arg(required = true, value_name = "MACHINE")]
        machines: Vec<String>,
    },
    /// End machines at once, or send their commands a signal
    Kill(KillArgs),
    /// Wait until a machine ends, and end with its status
    Wait(WaitArgs),
    /// Remove machines that have ended, with their disks and logs
    Rm(RemoveArgs),
    /// Tell what machines use: processors, memory, network and disks
    Stats(StatsArgs),
    /// Make, look at, change and copy disk images
    #[command(subcommand)]
    Disk(DiskCommand),
    /// Fetch, list and remove container images
    Image(ImageArgs),
    /// Tell what this host can do, and which accelerator would be used and why
    Doctor(DoctorArgs),
    /// Give the terminal back if the process that started this one dies
    #[command(name = crate::guard::SUBCOMMAND, hide = true)]
    TerminalGuard,
    /// Keep a machine's place on a bridge until it has gone
    #[command(name = crate::bridge::SUBCOMMAND, hide = true)]
    NetworkWarden(WardenArgs),
    /// Serve a network until its last machine has gone
    #[command(name = crate::network::SUBCOMMAND, hide = true)]
    NetworkSwitch(SwitchArgs),
    /// Serve a folder to a machine until that has gone
    #[command(name = crate::share::SUBCOMMAND, hide = true)]
    ShareServer(ShareArgs),
    /// Tell a network's switch of changes of the host's name servers
    #[command(name = crate::resolvers::SUBCOMMAND, hide = true)]
    NetworkResolvers,
    /// Enter the sandbox and say what became of each of its layers
    #[command(name = crate::sandbox::SUBCOMMAND, hide = true)]
    SandboxProbe,
    /// Be a machine in the background
    #[command(name = crate::machines::MACHINE, hide = true)]
    Machine {
        /// Its ID
        id: String,
    },
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print a manual page in roff, for man(1)
    Man {
        /// The subcommand whose page to print, such as run or image pull; the page of strata itself
        /// without one
        subcommand: Vec<String>,
    },
}

/// Arguments of `strata run`.
#[derive(Debug, Args)]
#[command(
    after_help = exit::HELP,
    after_long_help = format!("{RUN_KEYS}\n\n{}", exit::HELP),
)]
pub(crate) struct RunArgs {
    /// Number of virtual CPUs
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u8).range(1..=i64::from(strata_vmm::MAX_CPUS)))]
    pub(crate) cpus: u8,

    /// Memory of the guest, such as 512M, 2G or 1GiB
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = units::memory)]
    pub(crate) memory: u64,

    /// A disk image or block device; with ,ro it is not written to. What is not called .qcow2 is raw,
    /// unless format=qcow2 says otherwise. An encrypted one needs key-file=FILE, with its passphrase.
    /// Repeat for /dev/vda, /dev/vdb, ...
    #[arg(long = "disk", value_name = "PATH[,ro][,format=FORMAT][,key-file=FILE]",
          value_parser = OsStringValueParser::new().try_map(|text| units::disk(&text)))]
    pub(crate) disks: Vec<Disk>,

    /// A folder or a file of this host that the guest has at an absolute path of its own; with :ro it
    /// is not changed. Repeat for more
    #[arg(short = 'v', long = "volume", value_name = "HOST:GUEST[:ro]",
          value_parser = OsStringValueParser::new().try_map(|text| units::volume(&text)))]
    pub(crate) volumes: Vec<Volume>,

    /// The machine's network: one of its own (user), one shared under a NAME with other machines of
    /// this user, the same on a Linux bridge, which needs privileges (bridge:NAME), or none. With
    /// ,host it reaches this host, with ,isolated nobody but its neighbours [default: none, or user
    /// with -p]
    #[arg(long, value_name = "user|none|[bridge:]NAME[,host|,isolated]",
          value_parser = units::network)]
    pub(crate) network: Option<Network>,

    /// A port of this host that leads to one of the guest: on 127.0.0.1, or ADDRESS. Repeat for
    /// more
    #[arg(short = 'p', long = "publish", value_name = "[ADDRESS:]HOST:GUEST[/udp]",
          value_parser = units::forward)]
    pub(crate) forwards: Vec<Forward>,

    /// A Unix socket to make at PATH, by which programs of this host reach vsock ports of the guest:
    /// they connect, write "CONNECT PORT" and a newline, and read "OK NUMBER"
    #[arg(long, value_name = "PATH")]
    pub(crate) vsock: Option<PathBuf>,

    /// The machine's name, by which you and others on its network find it. One in the background
    /// gets a name where none is given
    #[arg(long, value_name = "NAME", value_parser = units::name)]
    pub(crate) name: Option<String>,

    /// Run in the background, and print the machine's name. It stays, with what it wrote, until
    /// 'strata rm'; 'strata logs' prints what it printed
    #[arg(short, long, conflicts_with_all = ["console_log", "stats"])]
    pub(crate) detach: bool,

    /// Give the command input: in the foreground it has this process's anyway, in the background it
    /// gets what 'strata attach' gives it
    #[arg(short, long, conflicts_with = "kernel")]
    pub(crate) interactive: bool,

    /// Give the command a terminal: this one, or in the background one of its own, which 'strata
    /// attach' leads to
    #[arg(short, long, conflicts_with = "kernel")]
    pub(crate) tty: bool,

    /// Container image to run the command in, one that 'strata image pull' has fetched. Without
    /// -- CMD it is the image's own; with it, CMD stands in place of the image's arguments
    #[arg(long, value_name = "NAME", conflicts_with = "kernel")]
    pub(crate) image: Option<String>,

    /// What runs the image: Strata, which starts its command, or the image's own /sbin/init, which
    /// gets the whole machine
    #[arg(long, value_enum, requires = "image", default_value_t = Init::Strata)]
    pub(crate) init: Init,

    /// Room on a temporary disk for what the image writes, such as 16G; in the guest's memory
    /// without it
    #[arg(long, value_name = "SIZE", requires = "image", value_parser = units::memory)]
    pub(crate) scratch: Option<u64>,

    /// Kernel to boot instead of the default appliance: Linux, a bzImage or an ELF vmlinux, or a
    /// Multiboot kernel
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,

    /// Initial RAM file system for --kernel; to a Multiboot kernel the first module
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub(crate) initrd: Option<PathBuf>,

    /// Module for a Multiboot kernel, with what the kernel is told of it. Repeat for more
    #[arg(long = "module", value_name = "FILE [ARGS]", requires = "kernel",
          value_parser = OsStringValueParser::new().try_map(|text| units::module(&text)))]
    pub(crate) modules: Vec<Module>,

    /// Kernel command line; added to the appliance's own, the whole of it with --kernel
    /// [default with --kernel: "console=ttyS0 panic=-1" for Linux, nothing for others]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) append: Option<String>,

    /// What runs the guest's instructions
    #[arg(long, value_enum, default_value_t = Accelerator::Auto)]
    pub(crate) accel: Accelerator,

    /// How this process locks itself up before the guest runs
    #[arg(long, value_enum, default_value_t = Sandbox::Auto)]
    pub(crate) sandbox: Sandbox,

    /// Stop the machine after this time, such as 30s, 5m or 500ms
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    pub(crate) timeout: Option<Duration>,

    /// Port, such as 0xf4, that ends the machine: after a write of V the status is V * 2 + 1
    #[arg(long, value_name = "PORT", value_parser = units::port)]
    pub(crate) debug_exit: Option<u16>,

    /// Also write all that appears on the guest's serial console to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) console_log: Option<PathBuf>,

    /// At the end, tell on standard error what the machine held of this host's memory beyond the
    /// guest's own, and what was translated
    #[arg(long, value_name = "FORM", value_enum, num_args = 0..=1, require_equals = true,
          default_missing_value = "text")]
    pub(crate) stats: Option<OutputForm>,

    /// Command to run in the guest, and its arguments
    #[arg(last = true, value_name = "CMD")]
    pub(crate) command: Vec<OsString>,
}

impl RunArgs {
    /// Checks what clap's own rules cannot say.
    pub(crate) fn check(&self) -> Result<(), clap::Error> {
        let refuse = |text: &str| Err(clap::Error::raw(ErrorKind::ArgumentConflict, text));
        if self.kernel.is_some() && !self.command.is_empty() {
            return refuse(
                "a command after -- runs in the default appliance, so --kernel cannot be given \
                 with it.\nLeave out --kernel, or start the command from your own initrd.\n",
            );
        }
        if !self.forwards.is_empty() && self.network() == Network::NONE {
            return refuse("-p needs a network: leave out --network none.\n");
        }
        for (index, volume) in self.volumes.iter().enumerate() {
            let before = &self.volumes[..index];
            if before.iter().any(|other| other.guest == volume.guest) {
                return refuse(&format!(
                    "two volumes are to be at '{}' in the guest.\nGive each a path of its own.\n",
                    volume.guest.display()
                ));
            }
        }
        if self.init == Init::Image && !self.command.is_empty() {
            return refuse(
                "with --init image the image's own init decides what runs.\nLeave out the command \
                 after --.\n",
            );
        }
        if self.init == Init::Image && (self.interactive || self.tty) {
            return refuse(
                "with --init image there is no command that -i and -t could be for.\nLeave them \
                 out, and look in with 'strata exec -it'.\n",
            );
        }
        if self.tty && !self.detach && !std::io::stdin().is_terminal() {
            return refuse("-t needs a terminal on standard input.\nLeave it out.\n");
        }
        if self.command.first().is_some_and(|word| word.is_empty()) {
            return refuse("the command after -- is empty.\n");
        }
        Ok(())
    }
}

impl RunArgs {
    /// Whether something runs in the machine that it ends with, if it is in the background.
    pub(crate) fn has_main_command(&self) -> bool {
        let asked_for = !self.command.is_empty() || self.image.is_some();
        let is_ours = self.kernel.is_none() && self.init == Init::Strata;
        is_ours && (asked_for || self.interactive || self.tty)
    }

    /// The network that the machine is to have.
    pub(crate) fn network(&self) -> Network {
        let implied = if self.forwards.is_empty() {
            Network::NONE
        } else {
            Network::USER
        };
        self.network.clone().unwrap_or(implied)
    }
}

/// Arguments of the process that is a network's switch.
#[derive(Debug, Args)]
pub(crate) struct SwitchArgs {
    /// Let guests reach this host
    #[arg(long)]
    pub(crate) host: bool,

    /// Let guests reach nobody but each other
    #[arg(long)]
    pub(crate) isolated: bool,

    /// Standard input is where machines come in, standard output the lock of those who do
    #[arg(long)]
    pub(crate) door: bool,

    /// Serve the guests on the bridge with this interface
    #[arg(long, requires = "door")]
    pub(crate) bridge: Option<String>,

    /// How this process locks itself up
    #[arg(long, value_enum, default_value_t = Sandbox::Auto)]
    pub(crate) sandbox: Sandbox,
}

/// Arguments of the process that serves a folder.
#[derive(Debug, Args)]
pub(crate) struct ShareArgs {
    /// The folder or file, without symbolic links
    pub(crate) folder: PathBuf,

    /// Change nothing in it
    #[arg(long)]
    pub(crate) read_only: bool,

    /// How this process locks itself up
    #[arg(long, value_enum, default_value_t = Sandbox::Auto)]
    pub(crate) sandbox: Sandbox,
}

/// Arguments of the process that keeps a machine's place on a bridge.
#[derive(Debug, Args)]
pub(crate) struct WardenArgs {
    /// The bridge's name
    #[arg(long)]
    pub(crate) bridge: String,

    /// Let guests reach this host
    #[arg(long)]
    pub(crate) host: bool,

    /// Let guests reach nobody but each other
    #[arg(long)]
    pub(crate) isolated: bool,

    /// How the bridge's name server locks itself up
    #[arg(long, value_enum, default_value_t = Sandbox::Auto)]
    pub(crate) sandbox: Sandbox,
}

/// What runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Accelerator {
    /// The best that works on this host; see `strata doctor`
    Auto,
    /// The software CPU, which needs nothing of the host
    Soft,
}

/// What runs a container image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Init {
    /// Strata's own init, which starts the image's command
    Strata,
    /// The image's /sbin/init, such as systemd
    Image,
}

/// How the process locks itself up before the guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Sandbox {
    /// As far as this host allows; see `strata doctor`
    Auto,
    /// Wholly, or no machine is started
    Require,
    /// Not at all, for debuggers
    Off,
}

impl Sandbox {
    /// As it is written on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Require => "require",
            Self::Off => "off",
        }
    }
}

/// Arguments of `strata doctor`.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Form of the report
    #[arg(long, value_enum, default_value_t = OutputForm::Text)]
    pub(crate) output: OutputForm,
}

/// Form of a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputForm {
    /// For people
    Text,
    /// For programs
    Json,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn run(args: &[&str]) -> Result<RunArgs, clap::Error> {
        let cli = Cli::try_parse_from(["strata", "run"].iter().chain(args))?;
        let Command::Run(run) = cli.command else {
            panic!("not run");
        };
        run.check()?;
        Ok(*run)
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_run_needs_no_arguments() {
        let run = run(&[]).unwrap();
        assert_eq!((run.cpus, run.memory), (1, 512 << 20));
        assert!(run.command.is_empty() && run.kernel.is_none());
    }

    #[test]
    fn all_after_the_dashes_is_the_commands() {
        let run = run(&["--memory", "1G", "--", "ls", "-l", "--memory", "--", "x"]).unwrap();
        assert_eq!(run.command, ["ls", "-l", "--memory", "--", "x"]);
        assert_eq!(run.memory, 1 << 30);
    }

    #[test]
    fn disks_keep_their_order() {
        let run = run(&["--disk", "a", "--disk", "b,ro"]).unwrap();
        let disks: Vec<_> = run
            .disks
            .iter()
            .map(|d| (d.path.to_str().unwrap(), d.read_only))
            .collect();
        assert_eq!(disks, [("a", false), ("b", true)]);
    }

    #[test]
    fn the_letter_v_is_for_volumes_and_words_are_for_telling_more() {
        let run = run(&["-v", "a:/b", "--volume", "c:/d:ro"]).unwrap();
        let paths: Vec<_> = run.volumes.iter().map(|v| v.guest.to_str()).collect();
        assert_eq!(paths, [Some("/b"), Some("/d")]);
        for args in [&["strata", "-v", "doctor"][..], &["strata", "doctor", "-v"]] {
            assert!(Cli::try_parse_from(args).is_err(), "{args:?}");
        }
        let cli = Cli::try_parse_from(["strata", "run", "--verbose", "--verbose"]).unwrap();
        assert_eq!(cli.verbose, 2);
    }

    #[test]
    fn modules_keep_their_order_and_arguments() {
        let run = run(&["--kernel", "k", "--module", "a x y", "--module", "b"]).unwrap();
        let modules: Vec<_> = run
            .modules
            .iter()
            .map(|m| (m.path.to_str().unwrap(), &*m.arguments))
            .collect();
        assert_eq!(modules, [("a", "x y"), ("b", "")]);
    }

    #[test]
    fn wrong_usage_is_refused() {
        let wrong: [&[&str]; 27] = [
            &["-v", "site"],
            &["-v", "site:srv"],
            &["-v", "site:/srv:no"],
            &["-v", "a:/srv", "-v", "b:/srv/"],
            &["--init", "image"],
            &["--image", "i", "--init", "image", "--", "ls"],
            &["--scratch", "1G"],
            &["--image", "i", "--kernel", "k"],
            &["--memory", "512"],
            &["--cpus", "0"],
            &["--cpus", "17"],
            &["--timeout", "never"],
            &["--accel", "kvm"],
            &["--initrd", "i"],
            &["--kernel", "k", "--", "ls"],
            &["--module", "m"],
            &["--kernel", "k", "--module", ""],
            &["--debug-exit", "0x10000"],
            &["--debug-exit", "port"],
            &["--network", "Web"],
            &["--network", "user,ro"],
            &["--network", "none", "-p", "80:80"],
            &["-p", "80"],
            &["-p", "0:80"],
            &["--name", "a.b"],
            &["ls"],
            &["--", ""],
        ];
        for args in wrong {
            assert!(run(args).is_err(), "{args:?}");
        }
    }

    #[test]
    fn an_append_may_begin_with_a_dash() {
        let run = run(&["--append", "-- single"]).unwrap();
        assert_eq!(run.append.as_deref(), Some("-- single"));
    }
}
