//! What one run asks of the appliance, as a second initramfs segment.
//!
//! The segment holds one file, `/lib/strata/session`, that the guest's main script reads as
//! shell text. Linux unpacks segments in order, so this one only has to come after the
//! appliance's own. Called by the `strata` binary.

use std::ffi::{OsStr, OsString};
use std::net::Ipv4Addr;
use std::os::unix::ffi::OsStrExt;

use crate::cpio::Archive;

/// Names of the virtio-console ports that carry a command. The machine must have them in the
/// order of the fields: the guest concludes from the last that the first are open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ports {
    /// Host to guest: what the command reads.
    pub stdin: &'static str,
    /// Guest to host: what the command writes.
    pub stdout: &'static str,
    /// Guest to host: what the command writes as errors.
    pub stderr: &'static str,
    /// Guest to host, lines of text: `ready` when the command is about to start, then
    /// `exit N` with its status, 128 + n where signal n ended it.
    pub status: &'static str,
}

/// What one run asks of the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Session {
    /// Program and arguments to run; a shell on the console where empty.
    pub command: Vec<OsString>,
    /// `TERM` for the shell.
    pub term: Option<OsString>,
    /// Rows and columns of the terminal.
    pub size: Option<(u16, u16)>,
    /// The guest's host name: of a-z, 0-9 and hyphens.
    pub name: Option<String>,
    /// How its first network card is to be set up; not at all where `None`.
    pub network: Option<Network>,
    /// What the command runs in, if not in the appliance itself.
    pub container: Option<Container>,
}

/// What a guest is told of its network instead of having it ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    /// Its address.
    pub address: Ipv4Addr,
    /// Bits of the network's mask.
    pub bits: u8,
    /// The way out, where names are asked for, too.
    pub gateway: Ipv4Addr,
    /// The domain in which names of one label are looked for.
    pub domain: &'static str,
}

/// What of a container image runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Start {
    /// The command, on the ports.
    #[default]
    OnPorts,
    /// The command, on the console.
    OnConsole,
    /// The image's own init, which has the machine to itself.
    Init,
}

/// The file system of a container image, and how its command starts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Container {
    /// Which of the machine's disks has the layers as its partitions, the lowest first; counted
    /// from 0.
    pub first_disk: usize,
    /// How many layers there are.
    pub layers: usize,
    /// Whether the disk behind it is an ext4 file system for what is written; memory if not.
    pub has_scratch: bool,
    /// `NAME=value`, each.
    pub environment: Vec<String>,
    /// A user's name or number, and after a colon a group's; root where empty.
    pub user: String,
    /// Where the command starts; the root where empty.
    pub directory: String,
    /// What of the image runs, and where its streams are.
    pub start: Start,
}

impl Session {
    /// The names the guest looks for.
    pub const PORTS: Ports = Ports {
        stdin: "strata.stdin",
        stdout: "strata.stdout",
        stderr: "strata.stderr",
        status: "strata.status",
    };

    /// The initramfs segment, a multiple of 4 bytes long.
    pub fn segment(&self) -> Vec<u8> {
        let mut archive = Archive::new();
        archive.file("lib/strata/session", 0o600, &self.script());
        archive.finish()
    }

    fn script(&self) -> Vec<u8> {
        let mut script = Vec::new();
        if let Some(term) = &self.term {
            script.extend_from_slice(b"export TERM=");
            script.extend(quoted(term));
            script.push(b'\n');
        }
        if let Some((rows, columns)) = self.size {
            script.extend_from_slice(format!("rows={rows} columns={columns}\n").as_bytes());
        }
        if let Some(name) = &self.name {
            script.extend(b"name=");
            script.extend(quoted(name.as_ref()));
            script.push(b'\n');
        }
        if let Some(network) = &self.network {
            let Network {
                address,
                bits,
                gateway,
                domain,
            } = network;
            let line = format!("address={address}/{bits} gateway={gateway} domain={domain}\n");
            script.extend_from_slice(line.as_bytes());
        }
        let mut words = self.command.clone();
        if let Some(container) = &self.container {
            let Container {
                first_disk,
                layers,
                has_scratch,
                environment,
                user,
                directory,
                ..
            } = container;
            let directory = if directory.is_empty() { "/" } else { directory };
            let numbers = format!(
                "layers={layers} first_disk={first_disk} scratch={} environment={}",
                u8::from(*has_scratch),
                environment.len()
            );
            script.extend_from_slice(numbers.as_bytes());
            script.extend_from_slice(b" user=");
            script.extend(quoted(user.as_ref()));
            script.extend_from_slice(b" directory=");
            script.extend(quoted(directory.as_ref()));
            script.push(b'\n');
            words.splice(0..0, environment.iter().map(OsString::from));
        }
        let start = self.container.as_ref().map(|container| container.start);
        if start == Some(Start::Init) {
            script.extend_from_slice(b"mode=init\n");
        } else if !words.is_empty() {
            if start != Some(Start::OnConsole) {
                script.extend_from_slice(b"mode=command\n");
            }
            script.extend_from_slice(b"set --");
            for word in &words {
                script.push(b' ');
                script.extend(quoted(word));
            }
            script.push(b'\n');
        }
        script
    }
}

/// `word` as one shell word: in single quotes nothing is special but the quote itself.
fn quoted(word: &OsStr) -> Vec<u8> {
    let mut text = vec![b'\''];
    for byte in word.as_bytes() {
        match byte {
            b'\'' => text.extend_from_slice(b"'\\''"),
            // An argument cannot hold NUL, and the shell could not read it.
            0 => {}
            other => text.push(*other),
        }
    }
    text.push(b'\'');
    text
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::cpio::tests::read;

    fn command(words: &[&[u8]]) -> Session {
        Session {
            command: words
                .iter()
                .map(|w| OsStr::from_bytes(w).to_owned())
                .collect(),
            ..Session::default()
        }
    }

    #[test]
    fn a_shell_reads_back_every_argument_unchanged() {
        let words: [&[u8]; 7] = [
            b"printf",
            b"%s\\n",
            b"it's",
            b"two  words\nand a line",
            b"$HOME `id` \\ \"q\" *",
            b"",
            b"\xff\x81caf\xc3\xa9",
        ];
        let mut script = command(&words).script();
        script.extend_from_slice(b"\n\"$@\"\n");

        let output = Command::new("sh")
            .arg("-c")
            .arg(OsStr::from_bytes(&script))
            .output()
            .unwrap();

        let expected = [words[2..].join(&b'\n'), b"\n".to_vec()].concat();
        assert_eq!(output.stdout, expected);
    }

    #[test]
    fn a_session_without_a_command_asks_for_a_shell() {
        let session = Session {
            term: Some("xterm".into()),
            size: Some((50, 132)),
            ..Session::default()
        };
        let text = String::from_utf8(session.script()).unwrap();
        assert_eq!(text, "export TERM='xterm'\nrows=50 columns=132\n");
    }

    #[test]
    fn a_container_has_its_environment_before_its_command() {
        let session = Session {
            command: vec!["cat".into(), "it's".into()],
            container: Some(Container {
                first_disk: 2,
                layers: 3,
                environment: vec!["A=x y".into()],
                user: "me:us".into(),
                ..Container::default()
            }),
            ..Session::default()
        };
        let text = String::from_utf8(session.script()).unwrap();
        let expected = "layers=3 first_disk=2 scratch=0 environment=1 user='me:us' directory='/'\n\
            mode=command\nset -- 'A=x y' 'cat' 'it'\\''s'\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn the_segment_holds_the_session_file_for_root_only() {
        let entries = read(&command(&[b"true"]).segment());
        assert_eq!(entries.len(), 1);
        assert_eq!(entries[0].0, "lib/strata/session");
        assert_eq!(entries[0].1 & 0o777, 0o600);
    }

    #[test]
    fn the_guest_knows_the_ports_by_these_names() {
        let main = include_str!("../guest/main");
        let Ports {
            stdin,
            stdout,
            stderr,
            status,
        } = Session::PORTS;
        for name in [stdin, stdout, stderr, status] {
            assert!(main.contains(&format!("{name})")), "{name}");
        }
    }
}
