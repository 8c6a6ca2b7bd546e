//! Manual pages and shell completions, both made from the definition of the command line.

use clap::error::ErrorKind;
use clap::{Command, CommandFactory};

use crate::cli::Cli;

/// The completion script for a shell.
pub(crate) fn completions(shell: clap_complete::Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "strata", &mut script);
    script
}

/// The manual page of a subcommand, or of `strata` itself.
pub(crate) fn page(subcommand: Option<&str>) -> Result<Vec<u8>, clap::Error> {
    let mut strata = Cli::command();
    strata.build();
    let command = match subcommand {
        None => strata,
        Some(name) => find(&strata, name)?,
    };
    let mut page = Vec::new();
    clap_mangen::Man::new(command).render(&mut page)?;
    Ok(page)
}

fn find(strata: &Command, name: &str) -> Result<Command, clap::Error> {
    let command = strata.find_subcommand(name).cloned().ok_or_else(|| {
        let text = format!("there is no subcommand '{name}'\n");
        clap::Error::raw(ErrorKind::InvalidSubcommand, text)
    })?;
    // The page's title; man(1) joins the names with a dash.
    Ok(command.display_name(format!("strata-{name}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_of_run_tells_the_exit_statuses() {
        let page = String::from_utf8(page(Some("run")).unwrap()).unwrap();
        assert!(page.contains("strata\\-run") && page.contains("triple fault"));
    }

    #[test]
    fn an_unknown_subcommand_has_no_page() {
        assert!(page(Some("fly")).is_err());
    }

    #[test]
    fn every_shell_has_completions() {
        use clap::ValueEnum;
        for shell in clap_complete::Shell::value_variants() {
            assert!(!completions(*shell).is_empty());
        }
    }
}
