//! Where programs run: as which user, with which environment, in which directory; and who the
//! users of an image are. Called by `init` and by the agent.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use strata_protocol::{Container, Session};

use crate::sys::Identity;

/// Where programs are looked for if nothing else is said.
pub(crate) const DEFAULT_PATH: &str =
    "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What programs find around them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    /// The environment, all of it.
    pub(crate) environment: BTreeMap<OsString, OsString>,
    /// As whom; as root, with all it may, where `None`.
    pub(crate) identity: Option<Identity>,
    /// Where they start.
    pub(crate) directory: PathBuf,
    /// Makes the directory if it is not there.
    pub(crate) make_directory: bool,
    /// What this is called in messages.
    pub(crate) name: &'static str,
}

impl Place {
    /// What `session` says; within the root that it calls for.
    pub(crate) fn of(session: &Session) -> Result<Self, String> {
        match &session.container {
            None => Ok(Self::appliance()),
            Some(container) => Self::image(container, Path::new("/")),
        }
    }

    /// The appliance itself.
    fn appliance() -> Self {
        Self {
            environment: variables([("PATH", DEFAULT_PATH), ("HOME", "/root")]),
            identity: None,
            directory: "/root".into(),
            make_directory: false,
            name: "guest",
        }
    }

    /// A container image with its root there.
    fn image(container: &Container, root: &Path) -> Result<Self, String> {
        let user = find_user(root, &container.user)?;
        let mut environment = variables([("PATH", DEFAULT_PATH)]);
        environment.insert("HOME".into(), user.home);
        add_variables(&mut environment, &container.environment);
        let directory = match container.directory.as_str() {
            "" => "/",
            directory => directory,
        };
        Ok(Self {
            environment,
            identity: Some(user.identity),
            // Relative to the root, as other runtimes take it.
            directory: Path::new("/").join(directory),
            make_directory: true,
            name: "image",
        })
    }

    /// The same place for another user of the image's.
    /// What runs here has a terminal of which nobody says what it is.
    pub(crate) fn set_default_terminal(&mut self) {
        let term = self.environment.entry("TERM".into());
        term.or_insert("xterm".into());
    }

    pub(crate) fn for_user(mut self, user: &str) -> Result<Self, String> {
        let user = find_user(Path::new("/"), user)?;
        self.environment.insert("HOME".into(), user.home);
        self.identity = Some(user.identity);
        Ok(self)
    }
}

fn variables<const N: usize>(pairs: [(&str, &str); N]) -> BTreeMap<OsString, OsString> {
    pairs
        .map(|(name, value)| (name.into(), value.into()))
        .into()
}

/// Adds variables written as `NAME=value`; those without a sign mean nothing.
pub(crate) fn add_variables(to: &mut BTreeMap<OsString, OsString>, written: &[Vec<u8>]) {
    for text in written {
        let Some(at) = text.iter().position(|byte| *byte == b'=') else {
            continue;
        };
        let name = OsString::from_vec(text[..at].to_vec());
        to.insert(name, OsString::from_vec(text[at + 1..].to_vec()));
    }
}

/// A user as an image knows it.
struct User {
    identity: Identity,
    home: OsString,
}

/// Finds `NAME-OR-NUMBER[:GROUP]` in the image's passwd(5) and group(5), as the `User` of an
/// image's configuration is to be read. Root where empty.
fn find_user(root: &Path, wanted: &str) -> Result<User, String> {
    let (name, group) = wanted.split_once(':').unwrap_or((wanted, ""));
    let name = if name.is_empty() { "0" } else { name };
    let users = entries(&root.join("etc/passwd"));
    let groups = entries(&root.join("etc/group"));
    let known = find(&users, name);
    let number = |entry: &[String], at: usize| entry.get(at).and_then(|text| text.parse().ok());

    let mut user = match known {
        Some(entry) => User {
            identity: Identity {
                user: number(entry, 2).unwrap_or(u32::MAX - 1),
                group: number(entry, 3).unwrap_or(0),
                groups: Vec::new(),
            },
            home: match entry.get(5).map(String::as_str) {
                None | Some("") => "/".into(),
                Some(home) => home.into(),
            },
        },
        None => User {
            identity: Identity {
                user: name
                    .parse()
                    .map_err(|_| format!("the image has no user '{name}'"))?,
                group: 0,
                groups: Vec::new(),
            },
            home: "/".into(),
        },
    };
    if group.is_empty() {
        // The groups that have the user as a member.
        let login = known
            .and_then(|entry| entry.first())
            .map_or(name, String::as_str);
        let has = |entry: &&Vec<String>| {
            entry
                .get(3)
                .is_some_and(|members| members.split(',').any(|member| member == login))
        };
        user.identity.groups = groups
            .iter()
            .filter(has)
            .filter_map(|entry| number(entry, 2))
            .collect();
    } else {
        user.identity.group = match find(&groups, group) {
            Some(entry) => number(entry, 2).unwrap_or(u32::MAX - 1),
            None => group
                .parse()
                .map_err(|_| format!("the image has no group '{group}'"))?,
        };
    }
    Ok(user)
}

fn entries(path: &Path) -> Vec<Vec<String>> {
    let text = fs::read(path).unwrap_or_default();
    text.split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| {
            let line = String::from_utf8_lossy(line);
            line.split(':').map(str::to_owned).collect()
        })
        .collect()
}

/// By name first, then by number: a name may be digits.
fn find<'a>(entries: &'a [Vec<String>], wanted: &str) -> Option<&'a Vec<String>> {
    let with = |at: usize| {
        entries
            .iter()
            .find(|entry| entry.get(at).is_some_and(|text| text == wanted))
    };
    with(0).or_else(|| with(2))
}

/// `bytes` as a word of a command.
pub(crate) fn word(bytes: &[u8]) -> &OsStr {
    OsStr::from_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An image with these users and groups; the caller removes it.
    fn image(passwd: &str, group: &str) -> PathBuf {
        let name = format!(
            "strata-place-{}-{:x}",
            std::process::id(),
            passwd.len() + group.len()
        );
        let root = std::env::temp_dir().join(name);
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::write(root.join("etc/passwd"), passwd).unwrap();
        fs::write(root.join("etc/group"), group).unwrap();
        root
    }

    #[test]
    fn users_are_found_by_name_and_number_with_their_groups() {
        let root = image(
            "root:x:0:0::/root:/bin/sh\nme:x:1234:55::/home/me:/bin/sh\n77:x:78:79:::",
            "us:x:77:you,me\nthem:x:88:you\nall:x:99:me",
        );
        let found = |wanted: &str| {
            let user = find_user(&root, wanted)?;
            let Identity {
                user: number,
                group,
                groups,
            } = user.identity;
            Ok::<_, String>((number, group, groups, user.home.into_string().unwrap()))
        };
        let home = |path: &str| path.to_owned();
        assert_eq!(found("").unwrap(), (0, 0, vec![], home("/root")));
        assert_eq!(
            found("me").unwrap(),
            (1234, 55, vec![77, 99], home("/home/me"))
        );
        assert_eq!(
            found("1234").unwrap(),
            (1234, 55, vec![77, 99], home("/home/me"))
        );
        assert_eq!(
            found("me:us").unwrap(),
            (1234, 77, vec![], home("/home/me"))
        );
        assert_eq!(found("5:6").unwrap(), (5, 6, vec![], home("/")));
        // Digits that are a name.
        assert_eq!(found("77").unwrap(), (78, 79, vec![], home("/")));
        assert!(found("nobody").unwrap_err().contains("no user 'nobody'"));
        assert!(
            found("me:nobody")
                .unwrap_err()
                .contains("no group 'nobody'")
        );
        fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn an_image_gets_a_path_and_a_home_unless_it_has_its_own() {
        let root = image("me:x:7:7::/home/me:", "");
        let mut container = Container {
            user: "me".to_owned(),
            environment: vec![b"A=x=y".to_vec(), b"nothing".to_vec()],
            directory: "srv".to_owned(),
            ..Container::default()
        };
        let place = Place::image(&container, &root).unwrap();
        let get = |place: &Place, name: &str| place.environment.get(OsStr::new(name)).cloned();
        assert_eq!(get(&place, "HOME").unwrap(), "/home/me");
        assert_eq!(get(&place, "PATH").unwrap(), DEFAULT_PATH);
        assert_eq!(get(&place, "A").unwrap(), "x=y");
        assert_eq!(place.environment.len(), 3);
        assert_eq!(place.directory, Path::new("/srv"));

        container.environment = vec![b"PATH=/own".to_vec(), b"HOME=/there".to_vec()];
        let place = Place::image(&container, &root).unwrap();
        assert_eq!(get(&place, "HOME").unwrap(), "/there");
        assert_eq!(get(&place, "PATH").unwrap(), "/own");
        fs::remove_dir_all(root).unwrap();
    }
}
