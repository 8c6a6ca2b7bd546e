//! Where a machine's output goes and its input comes from.

use std::fs::File;
use std::io::{self, IsTerminal};

use strata_vmm::{ConsolePort, SerialConsole};

use super::Fault;
use super::boot::Talk;
use crate::cli::RunArgs;
use crate::command::{self, Control};
use crate::console::{KeyInput, Output, PipeInput, Ring, Show, Tail, Typist};
use crate::guard::Guard;
use crate::supervisor::Supervisor;
use crate::terminal::RawMode;

/// What a machine is given for its console and ports, and what is known through them.
pub(super) struct Streams {
    pub(super) console: SerialConsole,
    pub(super) ports: Vec<ConsolePort>,
    /// The command, if there is one.
    pub(super) control: Option<Control>,
    /// The console's last output, where nobody sees it.
    pub(super) hidden: Option<Tail>,
    /// The terminal that the console is on.
    pub(super) terminal: Option<Terminal>,
}

/// A terminal that becomes the guest's console.
pub(super) struct Terminal {
    guard: Option<Guard>,
    typist: Typist,
}

impl Terminal {
    /// Makes it raw, and lets what is typed through. Only when all else is well.
    pub(super) fn start(self) -> io::Result<Option<RawMode>> {
        let raw = RawMode::enter(self.guard)?;
        self.typist.start()?;
        Ok(raw)
    }
}

impl Streams {
    /// Those of this process, or of a machine in the background `ring`. The guest greets with
    /// `greeting` when it is ready for input.
    pub(super) fn new(
        args: &RunArgs,
        verbose: bool,
        talk: Talk,
        ring: Option<&Ring>,
        greeting: &'static str,
        supervisor: &Supervisor,
    ) -> Result<Self, Fault> {
        let log = args.console_log.as_deref().map(|path| {
            let action = format!("create the console log '{}'", path.display());
            File::create(path).map_err(Fault::host(action))
        });
        let show = match talk {
            _ if ring.is_some() => Show::Hidden,
            _ if talk.is_on_console() => Show::Stdout,
            _ if verbose => Show::Stderr,
            _ => Show::Hidden,
        };
        let stopper = supervisor.stopper();
        let output = Output::new(
            show,
            log.transpose()?,
            ring.cloned(),
            greeting,
            stopper.clone(),
        );
        let hidden = (show == Show::Hidden).then(|| output.tail());
        let gate = output.gate();
        let mut streams = Self {
            console: SerialConsole {
                output: Box::new(output),
                input: None,
            },
            ports: Vec::new(),
            control: None,
            hidden,
            terminal: None,
        };
        if talk.is_on_console() {
            if io::stdin().is_terminal() {
                let guard = Guard::start()
                    .inspect_err(|error| tracing::warn!(%error, "no guard for the terminal"))
                    .ok();
                let (keys, typist) = KeyInput::new(gate, stopper);
                streams.console.input = Some(Box::new(keys));
                streams.terminal = Some(Terminal { guard, typist });
            } else {
                streams.console.input = Some(Box::new(PipeInput::new(gate)));
            }
        } else if let Talk::Command(_) = talk {
            streams.ports = command::ports(&stopper, ring);
        }
        if let Talk::Command(_) = talk {
            // Behind the others: the guest concludes from it that they are there.
            let (control, port) = Control::new();
            streams.control = Some(control);
            streams.ports.push(port);
        }
        Ok(streams)
    }
}
