//! Machines in the background: a process of their own that outlives the terminal. There is no
//! daemon; `run -d` and `start` start it, and it says on its standard error when it has begun.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::process::{Command, Stdio};

use rustix::process::setsid;
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use strata_image::oci::Store;
use strata_machines::{Image, Machine, Spec};

use super::{Fault, arguments, each, find, logs, registry};
use crate::cli::RunArgs;
use crate::exit::End;
use crate::run::{self, Life};

/// Name of the hidden subcommand.
pub(crate) const MACHINE: &str = "machine";

/// What the process says when the machine runs. All before it is text for people.
const STARTED: u8 = 0;

/// Lines of a log that are shown when a machine could not be started.
const SHOWN: usize = 20;

/// `strata run -d`: makes a machine that stays until it is removed, and starts it. Gives its name.
pub(crate) fn run_detached(args: &RunArgs) -> Result<String, Fault> {
    let spec = spec(args)?;
    let machine = registry()?.create(&spec)?;
    if let Err(fault) = launch(&machine) {
        // It was never there, and its name is free again.
        let _ = machine.remove();
        return Err(fault);
    }
    Ok(machine.name().to_owned())
}

/// What is remembered of a machine that is run with `args`.
pub(crate) fn spec(args: &RunArgs) -> Result<Spec, Fault> {
    let words = std::env::args_os().skip(1).map(OsString::into_string);
    let words: Result<Vec<String>, OsString> = words.collect();
    let arguments = words.map_err(|word| {
        Fault::Usage(format!(
            "the argument '{}' is not UTF-8, and a machine's arguments are kept as such",
            word.display()
        ))
    })?;
    let image = match &args.image {
        None => None,
        Some(name) => {
            let image = Store::of_user().and_then(|store| store.find(name));
            let image = image.map_err(run::Fault::from).map_err(Box::new)?;
            Some(Image {
                name: image.name.familiar(),
                id: image.manifest.to_string(),
            })
        }
    };
    Ok(Spec {
        name: args.name.clone(),
        arguments,
        directory: std::env::current_dir().map_err(Fault::host("find the current directory"))?,
        image,
    })
}

/// `strata start`: starts machines that have ended, with what they were run with.
pub(crate) fn start(names: &[String]) -> End {
    each(names, |machine| {
        if machine.state()?.is_running() {
            return Err(strata_machines::Error::AlreadyRunning(machine.name().to_owned()).into());
        }
        launch(machine)
    })
}

/// Starts the machine's process, and waits until the machine runs.
fn launch(machine: &Machine) -> Result<(), Fault> {
    let failed = || Fault::host("start the machine's process");
    let mut child = Command::new("/proc/self/exe")
        .args([MACHINE, machine.id()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed())?;
    let mut said = Vec::new();
    let mut started = false;
    if let Some(stderr) = &mut child.stderr {
        let mut byte = [0];
        while stderr.read(&mut byte).map_err(failed())? > 0 {
            if byte[0] == STARTED {
                started = true;
                break;
            }
            said.push(byte[0]);
        }
    }
    let _ = io::stderr().write_all(&said);
    if started {
        return Ok(());
    }
    let _ = child.wait();
    if said.is_empty() {
        for line in logs::last_lines(machine, SHOWN) {
            eprintln!("{line}");
        }
    }
    Err(Fault::NotStarted(machine.name().to_owned()))
}

/// What the hidden subcommand does: is the machine of this ID until its end.
pub(crate) fn become_machine(id: &str) -> End {
    match prepare(id) {
        Ok((args, life)) => run::in_background(&args, life),
        Err(fault) => super::say(&fault),
    }
}

fn prepare(id: &str) -> Result<(RunArgs, Life), Fault> {
    // The terminal of who started it is none of its business, nor is that one's end.
    setsid().map_err(Fault::host("leave the terminal"))?;
    let machine = find(id)?;
    let args = arguments(&machine)?;
    let claim = machine.claim()?;
    let directory = &machine.asked().directory;
    std::env::set_current_dir(directory).map_err(Fault::host(format!(
        "go to '{}', where the machine was made",
        directory.display()
    )))?;
    let life = Life {
        machine,
        claim,
        detached: true,
    };
    Ok((args, life))
}

/// Tells who started this process that the machine runs, and that nothing more will be said.
pub(crate) fn tell_started() -> io::Result<()> {
    io::stderr().write_all(&[STARTED])?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    dup2_stderr(&null)?;
    Ok(())
}
