//! The `strata` binary: command line, terminal, exit status. What it does is in the crates
//! below; here is only what belongs to a process and its user.
#![forbid(unsafe_code)]

mod appliance;
mod bridge;
mod cli;
mod command;
mod console;
mod disk;
mod doctor;
mod exit;
mod guard;
mod image;
mod keys;
mod machines;
mod manual;
mod network;
mod progress;
mod report;
mod resolvers;
mod run;
mod sandbox;
mod share;
mod sockets;
mod stats;
mod streams;
mod supervisor;
mod terminal;
mod units;

use std::io::ErrorKind;
use std::panic;
use std::process::{self, ExitCode};

use clap::Parser;

use crate::cli::{Cli, Command};
use crate::exit::End;
use crate::streams::Stream;

fn main() -> ExitCode {
    end_on_panic();
    let cli = Cli::parse();
    report::start_log(cli.verbose);
    let end = match cli.command {
        Command::Run(args) => {
            if let Err(error) = args.check() {
                error.exit();
            }
            if args.detach {
                told(machines::run_detached(&args).map(|name| name + "\n"))
            } else {
                run::run(&args, cli.verbose > 0).unwrap_or_else(|fault| {
                    report::say_error(&fault);
                    if let Some(advice) = fault.advice() {
                        report::say(advice);
                    }
                    End::NotStarted
                })
            }
        }
        Command::Ps(args) => told(machines::ps(&args)),
        Command::Exec(args) => ended(machines::exec(&args)),
        Command::Attach(args) => ended(machines::attach(&args)),
        Command::Logs(args) => ended(machines::logs(&args)),
        Command::Cp(args) => told(machines::copy(&args).map(|()| String::new())),
        Command::Stop(args) => machines::stop(&args),
        Command::Kill(args) => machines::kill(&args),
        Command::Wait(args) => ended(machines::wait(&args)),
        Command::Start { machines } => machines::start(&machines),
        Command::Rm(args) => machines::remove(&args),
        Command::Stats(args) => ended(machines::stats(&args)),
        Command::Machine { id } => machines::become_machine(&id),
        Command::Disk(command) => disk::run(command).unwrap_or_else(|fault| disk::say(&fault)),
        Command::TerminalGuard => match guard::watch() {
            Ok(()) => End::Done,
            Err(_) => End::NotStarted,
        },
        Command::NetworkWarden(args) => bridge::warden(&args),
        Command::NetworkResolvers => resolvers::watch(),
        Command::NetworkSwitch(args) => network::switch(&args),
        Command::ShareServer(args) => share::server(&args),
        Command::SandboxProbe => sandbox::answer_probe(),
        Command::Image(args) => image::image(&args),
        Command::Doctor(args) => doctor::doctor(args.output),
        Command::Completions { shell } => print(&manual::completions(shell)),
        Command::Man { subcommand } => match manual::page(&subcommand) {
            Ok(page) => print(&page),
            Err(error) => error.exit(),
        },
    };
    end.into()
}

/// The end of what was done with machines.
fn ended(result: Result<End, machines::Fault>) -> End {
    result.unwrap_or_else(|fault| machines::say(&fault))
}

/// The end of what has something to tell.
fn told(result: Result<String, machines::Fault>) -> End {
    match result {
        Ok(text) => print(text.as_bytes()),
        Err(fault) => machines::say(&fault),
    }
}

/// Writes to standard output; a reader that has gone is no error.
fn print(bytes: &[u8]) -> End {
    match Stream::Stdout.write(bytes) {
        Ok(()) => End::Done,
        Err(error) if error.kind() == ErrorKind::BrokenPipe => End::Done,
        Err(error) => {
            report::say(&format!("cannot write standard output: {error}"));
            End::NotStarted
        }
    }
}

/// A panic in any thread is a fault of ours that the machine cannot outlive. The terminal is
/// given back before the message, and the whole process ends.
fn end_on_panic() {
    let tell = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        terminal::restore();
        tell(info);
        report::say("this is a fault in Strata; please report it with the lines above");
        process::exit(i32::from(End::MachineFailed.status()));
    }));
}
