//! Manual pages and shell completions, both made from the definition of the command line.

use clap::CommandFactory;
use clap::error::ErrorKind;

use crate::cli::Cli;

/// The completion script for a shell.
pub(crate) fn completions(shell: clap_complete::Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "strata", &mut script);
    script
}

/// The manual page of a subcommand, given by the words that lead to it, or of `strata` itself.
pub(crate) fn page(subcommand: &[String]) -> Result<Vec<u8>, clap::Error> {
    let mut command = Cli::command();
    command.build();
    let mut title = "strata".to_owned();
    for name in subcommand {
        command = command.find_subcommand(name).cloned().ok_or_else(|| {
            let text = format!("there is no subcommand '{name}'\n");
            clap::Error::raw(ErrorKind::InvalidSubcommand, text)
        })?;
        title = format!("{title}-{}", command.get_name());
    }
    // man(1) joins the names with a dash.
    let command = command.display_name(title);
    let mut page = Vec::new();
    clap_mangen::Man::new(command).render(&mut page)?;
    Ok(page)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page_of(words: &[&str]) -> Result<String, clap::Error> {
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        page(&words).map(|page| String::from_utf8(page).unwrap())
    }

    #[test]
    fn the_page_of_run_tells_the_exit_statuses() {
        let page = page_of(&["run"]).unwrap();
        assert!(page.contains("strata\\-run") && page.contains("triple fault"));
    }

    #[test]
    fn subcommands_of_subcommands_have_pages() {
        let page = page_of(&["image", "pull"]).unwrap();
        assert!(page.contains("strata\\-image\\-pull") && page.contains("docker\\-archive:FILE"));
    }

    #[test]
    fn an_unknown_subcommand_has_no_page() {
        assert!(page_of(&["fly"]).is_err());
        assert!(page_of(&["run", "fly"]).is_err());
    }

    #[test]
    fn every_shell_has_completions() {
        use clap::ValueEnum;
        for shell in clap_complete::Shell::value_variants() {
            assert!(!completions(*shell).is_empty());
        }
    }
}
