//! Locking this process up before its guest runs, and asking a process that is to die anyway
//! what this host gives for it.

use std::io::{self, BufRead};
use std::process::{Command, Stdio};

use strata_sandbox::{Error, Layer, Report, Role, enter};

use crate::cli::Sandbox;
use crate::exit::End;
use crate::report;

/// Name of the hidden subcommand.
pub(crate) const SUBCOMMAND: &str = "sandbox-probe";

/// What a probe says before the detail of a layer that holds, and before the reason for one that
/// is missing.
const HOLDS: &str = "holds";
const MISSING: &str = "missing";

/// Why a process that has to be locked up is not.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    /// It cannot be locked up at all.
    #[error("cannot enter the sandbox")]
    Enter(#[from] strata_sandbox::Error),

    /// The host does not give all of it.
    #[error("--sandbox require: this host gives no {0}")]
    Incomplete(String),
}

/// Locks this process up as `wanted`, for good.
pub(crate) fn lock_up(wanted: Sandbox, role: Role<'_>) -> Result<(), Fault> {
    if wanted == Sandbox::Off {
        tracing::info!("no sandbox");
        return Ok(());
    }
    let report = match enter(&Layer::ALL, role) {
        Ok(report) => report,
        // A container without /proc: nothing is wrong with the process.
        Err(error @ Error::Proc(_)) if wanted == Sandbox::Auto => {
            tracing::warn!("no sandbox: {error}");
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    for (layer, state) in report.layers() {
        match state {
            Ok(detail) => tracing::info!("sandbox: {layer}: {detail}"),
            Err(reason) => tracing::info!("sandbox: no {layer} on this host: {reason}"),
        }
    }
    match missing(&report) {
        Some(list) if wanted == Sandbox::Require => Err(Fault::Incomplete(list)),
        _ => Ok(()),
    }
}

/// The layers that the host does not give, with the reasons, to be read after "no".
fn missing(report: &Report) -> Option<String> {
    let list: Vec<_> = report
        .missing()
        .map(|(layer, reason)| format!("{layer} ({reason})"))
        .collect();
    (!list.is_empty()).then(|| list.join(", no "))
}

/// One layer, as a probe found it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) layer: Layer,
    /// Details, or the reason why the host does not give it.
    pub(crate) state: Result<String, String>,
}

/// What the hidden subcommand does.
pub(crate) fn answer_probe() -> End {
    match enter(&Layer::ALL, Role::Machine) {
        Ok(report) => {
            let line = |(layer, state): (Layer, Result<&str, &str>)| match state {
                Ok(detail) => format!("{layer} {HOLDS} {detail}\n"),
                Err(reason) => format!("{layer} {MISSING} {reason}\n"),
            };
            let text: String = report.layers().map(line).collect();
            crate::print(text.as_bytes())
        }
        Err(error) => {
            report::say_error(&error);
            End::NotStarted
        }
    }
}

/// What this host gives, found out by a process that tries. A layer of which nothing came back
/// is missing too.
pub(crate) fn probe() -> io::Result<Vec<Found>> {
    let output = Command::new("/proc/self/exe")
        .arg(SUBCOMMAND)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()?;
    let lines: Vec<String> = output.stdout.lines().collect::<Result<_, _>>()?;
    Ok(Layer::ALL.map(|layer| found(layer, &lines)).into())
}

fn found(layer: Layer, lines: &[String]) -> Found {
    let state = lines.iter().find_map(|line| {
        let rest = line.strip_prefix(layer.name())?;
        let (word, text) = rest.trim_start().split_once(' ')?;
        match word {
            HOLDS => Some(Ok(text.to_owned())),
            MISSING => Some(Err(text.to_owned())),
            _ => None,
        }
    });
    let state = state.unwrap_or_else(|| Err("the process that tried it was ended".to_owned()));
    Found { layer, state }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probes_lines_say_what_became_of_each_layer() {
        let lines = [
            "Landlock holds no files (ABI 7)",
            "seccomp missing not built in",
        ];
        let lines = lines.map(str::to_owned);

        let state = |layer| found(layer, &lines).state;

        assert_eq!(state(Layer::Landlock), Ok("no files (ABI 7)".to_owned()));
        assert_eq!(state(Layer::Seccomp), Err("not built in".to_owned()));
        assert!(state(Layer::Namespaces).is_err());
    }
}
