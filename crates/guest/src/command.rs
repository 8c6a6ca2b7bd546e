//! From words to a program that can be started. Called by `init` and by the agent.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::place::{DEFAULT_PATH, Place, word};
use crate::sys;

/// Why a program cannot be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Unable {
    /// The status that shells give for it: 126 or 127; 125 where it is not the program's fault.
    pub(crate) status: u8,
    pub(crate) message: String,
}

impl Unable {
    /// Something of the guest's is amiss.
    pub(crate) fn guest(message: impl Into<String>) -> Self {
        Self {
            status: 125,
            message: message.into(),
        }
    }
}

/// The program that `words` name, in `place`; it leads a session of its own, on the terminal that
/// is its standard input if `terminal`.
pub(crate) fn prepare(words: &[Vec<u8>], place: &Place, terminal: bool) -> Result<Command, Unable> {
    let Some((first, arguments)) = words.split_first() else {
        return Err(Unable::guest("there is no command"));
    };
    if place.make_directory {
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o755);
        builder.create(&place.directory).map_err(|error| {
            let directory = place.directory.display();
            Unable::guest(format!(
                "the directory '{directory}' cannot be made: {error}"
            ))
        })?;
    }
    let program = find(word(first), place)?;
    let mut command = Command::new(program);
    command
        .arg0(word(first))
        .args(arguments.iter().map(|bytes| word(bytes)))
        .env_clear()
        .envs(&place.environment);
    if fs::metadata(&place.directory).is_ok_and(|metadata| metadata.is_dir()) {
        command.current_dir(&place.directory);
    } else {
        command.current_dir("/");
    }
    sys::set_up(&mut command, place.identity.as_ref(), terminal);
    Ok(command)
}

/// What to say of a program that was found and did not start.
pub(crate) fn not_started(words: &[Vec<u8>], error: &std::io::Error) -> Unable {
    let name = words.first().map(|bytes| word(bytes)).unwrap_or_default();
    Unable {
        status: 126,
        message: format!("{}: {error}", name.display()),
    }
}

/// The file that a word names: looked for where `PATH` says if it has no slash.
fn find(name: &OsStr, place: &Place) -> Result<PathBuf, Unable> {
    let given = Path::new(name);
    if name.as_encoded_bytes().contains(&b'/') {
        let path = place.directory.join(given);
        return match fs::metadata(&path) {
            Ok(metadata) if is_program(&metadata) => Ok(path),
            Ok(_) => Err(Unable {
                status: 126,
                message: format!(
                    "{}: not an executable file in the {}",
                    name.display(),
                    place.name
                ),
            }),
            Err(_) => Err(not_found(name, place)),
        };
    }
    let path = place.environment.get(OsStr::new("PATH"));
    let path = path.map_or(OsStr::new(DEFAULT_PATH), |path| path.as_os_str());
    std::env::split_paths(path)
        .map(|directory| place.directory.join(directory).join(given))
        .find(|path| fs::metadata(path).is_ok_and(|metadata| is_program(&metadata)))
        .filter(|_| !name.is_empty())
        .ok_or_else(|| not_found(name, place))
}

fn not_found(name: &OsStr, place: &Place) -> Unable {
    Unable {
        status: 127,
        message: format!(
            "{}: command not found in the {}",
            name.display(),
            place.name
        ),
    }
}

fn is_program(metadata: &fs::Metadata) -> bool {
    metadata.is_file() && metadata.permissions().mode() & 0o111 != 0
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn place(path: &str) -> Place {
        Place {
            environment: BTreeMap::from([("PATH".into(), path.into())]),
            identity: None,
            directory: "/".into(),
            make_directory: false,
            name: "image",
        }
    }

    #[test]
    fn programs_are_looked_for_as_a_shell_does() {
        let place = place("/nowhere:/bin");
        let found = |name: &str| find(OsStr::new(name), &place);
        assert_eq!(found("sh").unwrap(), Path::new("/bin/sh"));
        assert_eq!(found("bin/sh").unwrap(), Path::new("/bin/sh"));
        assert_eq!(found("no-such-program").unwrap_err().status, 127);
        assert_eq!(found("").unwrap_err().status, 127);
        assert_eq!(found("/etc/passwd").unwrap_err().status, 126);
        assert_eq!(found("/etc").unwrap_err().status, 126);
        assert_eq!(found("/no/such").unwrap_err().status, 127);
    }

    #[test]
    fn a_program_has_the_places_environment_and_no_other() {
        let words = [b"sh".to_vec(), b"-c".to_vec(), b"echo $0 $HOME $X".to_vec()];
        let mut place = place("/bin");
        place.environment.insert("X".into(), "y".into());
        let output = prepare(&words, &place, false).unwrap().output().unwrap();
        assert_eq!(output.stdout, b"sh y\n");
    }
}
