//! `strata exec`: a program in a running guest, as if it ran here.

use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use clap::Args;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};
use strata_protocol::{Exec, Reply, Request, Stream};

use super::agent::Agent;
use super::proxy::{Proxy, make_raw, size};
use super::{Fault, find};
use crate::exit::End;
use crate::streams;

/// Arguments of `strata exec`.
#[derive(Debug, Args)]
pub(crate) struct ExecArgs {
    /// Give the program this process's standard input; it has none otherwise
    #[arg(short, long)]
    interactive: bool,

    /// Give it a terminal of this one's size
    #[arg(short, long)]
    tty: bool,

    /// As whom it runs: a name or number of the image's, with a group after a colon
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,

    /// Where it starts
    #[arg(short, long, value_name = "DIRECTORY")]
    workdir: Option<OsString>,

    /// A variable of its environment; without a value, as it is here. Repeat for more
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<OsString>,

    /// The machine: its name, or the first digits of its ID
    #[arg(value_name = "MACHINE")]
    machine: String,

    /// The program and its arguments
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "CMD"
    )]
    command: Vec<OsString>,
}

/// Runs it; gives its end as this process's.
pub(crate) fn exec(args: &ExecArgs) -> Result<End, Fault> {
    if args.tty && !io::stdin().is_terminal() {
        return Err(Fault::Usage(
            "-t needs a terminal on standard input; leave it out".to_owned(),
        ));
    }
    let machine = find(&args.machine)?;
    let terminal = args.tty.then(size);
    let mut environment: Vec<Vec<u8>> = args.env.iter().filter_map(variable).collect();
    if let (true, Some(term)) = (args.tty, std::env::var_os("TERM")) {
        environment.insert(0, [b"TERM=", term.as_bytes()].concat());
    }
    let request = Request::Exec(Exec {
        words: args
            .command
            .iter()
            .map(|word| word.as_bytes().to_vec())
            .collect(),
        environment,
        user: args.user.clone(),
        directory: args.workdir.clone().map(OsString::into_vec),
        terminal,
        input: args.interactive || args.tty,
    });
    let mut agent = Agent::ask(&machine, &request)?;
    // Nothing else comes before.
    while !matches!(agent.reply()?, Reply::Started { .. }) {}
    let proxy = Proxy::of(&agent)?;
    let raw = if args.tty { make_raw()? } else { None };
    if args.tty {
        proxy.pass_signals(&[SIGTERM, SIGHUP], true)?;
    } else {
        let wanted = [SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2];
        proxy.pass_signals(&wanted, false)?;
    }
    if args.interactive || args.tty {
        proxy.pass_input(Some)?;
    }
    let status = forward(&mut agent, &proxy);
    proxy.close();
    drop(raw);
    status
}

/// Writes what the program writes, until it ends.
fn forward(agent: &mut Agent, proxy: &Proxy) -> Result<End, Fault> {
    loop {
        match agent.reply()? {
            Reply::Output(stream, bytes) => {
                let stream = match stream {
                    Stream::Stdout => streams::Stream::Stdout,
                    Stream::Stderr => streams::Stream::Stderr,
                };
                match stream.write(&bytes) {
                    Ok(()) => {}
                    // Whoever read it has had enough; the program hears of it when we go.
                    Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                        return Ok(End::Signal(signal_hook::consts::SIGPIPE));
                    }
                    Err(error) => {
                        let action = format!("write {}", stream.name());
                        return Err(Fault::host(action)(error));
                    }
                }
            }
            Reply::Taken(count) => proxy.taken(count),
            Reply::Ended(status) => return Ok(End::Command(status.code())),
            _ => {}
        }
    }
}

/// `NAME=value` as it is; a name alone with the value that it has here, if it has one.
fn variable(text: &OsString) -> Option<Vec<u8>> {
    if text.as_bytes().contains(&b'=') {
        return Some(text.as_bytes().to_vec());
    }
    let value = std::env::var_os(text)?;
    Some([text.as_bytes(), b"=", value.as_bytes()].concat())
}
