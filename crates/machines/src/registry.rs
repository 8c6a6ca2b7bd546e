//! All machines of a user: `$XDG_STATE_HOME/strata/machines`, else
//! `~/.local/state/strata/machines`.
//!
//! ```text
//! lock            held for a moment by whoever creates, claims, looks at or removes a machine
//! <ID>/           a machine
//! .new-<ID>/      one that is being created, while the lock is held
//! .gone-<ID>/     one that has been removed; whoever finds it deletes it
//! ```

use std::env;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use crate::claim::{self, Claim};
use crate::error::{Error, Result};
use crate::files::{self, Outlives};
use crate::machine::{self, Asked, Image, Machine};
use crate::name;

const LOCK: &str = "lock";
const NEW: &str = ".new-";
const GONE: &str = ".gone-";

/// The machines of a user.
#[derive(Debug, Clone)]
pub struct Registry {
    root: PathBuf,
}

/// What a machine is to be.
#[derive(Debug, Clone, Default)]
pub struct Spec {
    /// What it is to be called: see [`crate::is_name`]. One is generated if there is none.
    pub name: Option<String>,
    /// The arguments it is run with.
    pub arguments: Vec<String>,
    /// The directory they were given in: relative paths among them start there.
    pub directory: PathBuf,
    /// The image it runs.
    pub image: Option<Image>,
}

/// While it lives, nobody else creates, claims, looks at or removes a machine. Its process must
/// not wait for anything but files meanwhile.
#[derive(Debug)]
pub(crate) struct Guard {
    _lock: File,
}

impl Registry {
    /// The machines of the user who runs this process.
    pub fn of_user() -> Result<Self> {
        // The XDG Base Directory Specification has relative paths ignored.
        let absolute = |name| {
            env::var_os(name)
                .map(PathBuf::from)
                .filter(|path| path.is_absolute())
        };
        let state = absolute("XDG_STATE_HOME");
        let state = state.or_else(|| Some(absolute("HOME")?.join(".local/state")));
        let state = state.ok_or(Error::NoStateDirectory)?;
        Ok(Self::at(&state.join("strata/machines")))
    }

    /// Machines in the directory `root`, which need not exist yet.
    pub fn at(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    /// The directory of all machines.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Adds a machine that stays until it is removed. Of two that are created with one name, at
    /// the same time or not, the second is refused with [`Error::NameTaken`].
    pub fn create(&self, spec: &Spec) -> Result<Machine> {
        let guard = self.guard()?;
        let machine = self.add(&guard, spec, false)?;
        self.release(guard);
        Ok(machine)
    }

    /// Adds a machine that is this process, and vanishes with it: once nobody holds the claim,
    /// whoever looks at the registry next removes it.
    pub fn create_ephemeral(&self, spec: &Spec) -> Result<(Machine, Claim)> {
        let guard = self.guard()?;
        let machine = self.add(&guard, spec, true)?;
        let claim = Claim::take(&guard, &machine)?;
        self.release(guard);
        Ok((machine, claim))
    }

    /// The machine of this name, or the only one whose ID begins so.
    pub fn find(&self, text: &str) -> Result<Machine> {
        let found = |(id, machine): (String, Result<Machine>)| {
            let named = matches!(&machine, Ok(machine) if machine.name() == text);
            let begins = name::is_hex(text) && !text.is_empty() && id.starts_with(text);
            (named || begins).then_some((named, id, machine))
        };
        let mut found: Vec<_> = self.all()?.into_iter().filter_map(found).collect();
        if found.iter().any(|(named, ..)| *named) {
            found.retain(|(named, ..)| *named);
        }
        match (found.len(), found.pop()) {
            (1, Some((_, _, machine))) => machine,
            (0, _) | (_, None) => Err(Error::NoSuchMachine(text.to_owned())),
            (_, Some(last)) => {
                let mut ids: Vec<String> = found.into_iter().map(|(_, id, _)| id).collect();
                ids.push(last.1);
                let text = text.to_owned();
                Err(Error::Ambiguous { text, ids })
            }
        }
    }

    /// All machines, the oldest first; last those that cannot be read, with the reason.
    pub fn list(&self) -> Result<Vec<Result<Machine>>> {
        let mut machines: Vec<_> = self
            .all()?
            .into_iter()
            .map(|(_, machine)| machine)
            .collect();
        machines.sort_by_key(|machine| {
            let readable = machine.as_ref().ok();
            let age = readable.map(|machine| (machine.asked().created, machine.name().to_owned()));
            (age.is_none(), age)
        });
        Ok(machines)
    }

    /// The directory of the machine of this ID.
    pub(crate) fn directory_of(&self, id: &str) -> PathBuf {
        self.root.join(id)
    }

    /// Waits until nobody else uses the registry.
    pub(crate) fn guard(&self) -> Result<Guard> {
        files::create_directory(&self.root)?;
        files::make_private(&self.root)?;
        let path = self.root.join(LOCK);
        let lock = files::open_or_create(&path)?;
        loop {
            match lock.lock() {
                Ok(()) => return Ok(Guard { _lock: lock }),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io("lock the file", &path)(error)),
            }
        }
    }

    /// Lets others in, and deletes what has been removed: that may take long.
    fn release(&self, guard: Guard) {
        drop(guard);
        for path in files::entries(&self.root).unwrap_or_default() {
            if file_name(&path).starts_with(GONE)
                && let Err(error) = delete(&path)
            {
                tracing::warn!(%error, "cannot delete what is left of a machine");
            }
        }
    }

    /// Takes the directory of a machine out of the registry, and then deletes it.
    pub(crate) fn discard(&self, guard: Guard, id: &str) -> Result<()> {
        let gone = self.retire(&guard, &self.directory_of(id), id)?;
        // Who swept has forgotten it anyway, and would again.
        files::sync_directory(&self.root)?;
        drop(guard);
        delete(&gone)
    }

    fn retire(&self, _: &Guard, directory: &Path, id: &str) -> Result<PathBuf> {
        let gone = self.root.join(format!("{GONE}{id}"));
        fs::rename(directory, &gone).map_err(Error::io("rename the directory", directory))?;
        Ok(gone)
    }

    fn add(&self, guard: &Guard, spec: &Spec, ephemeral: bool) -> Result<Machine> {
        if let Some(name) = &spec.name
            && !name::is_name(name)
        {
            return Err(Error::BadName(name.clone()));
        }
        if spec.directory.to_str().is_none() {
            return Err(Error::NotUtf8(spec.directory.clone()));
        }
        let others = self.sweep(guard)?;
        let holder = |name: &str| {
            let mut readable = others.iter().filter_map(|(_, other)| other.as_ref().ok());
            readable.find(|other| other.name() == name)
        };
        let id = name::new_id();
        let name = match &spec.name {
            None => name::new_name(&id, |name| holder(name).is_some()),
            Some(name) => match holder(name) {
                None => name.clone(),
                Some(other) => {
                    return Err(Error::NameTaken {
                        name: name.clone(),
                        id: other.id().to_owned(),
                    });
                }
            },
        };
        let asked = Asked {
            id,
            name,
            created: machine::now(),
            arguments: spec.arguments.clone(),
            directory: spec.directory.clone(),
            image: spec.image.clone(),
            ephemeral,
        };
        let partial = self.root.join(format!("{NEW}{}", asked.id));
        files::create_directory(&partial)?;
        files::create(&partial.join(claim::LOCK))?;
        machine::write(&partial, &asked)?;
        let directory = self.directory_of(&asked.id);
        fs::rename(&partial, &directory).map_err(Error::io("rename a directory to", &directory))?;
        if asked.outlives() == Outlives::Power {
            files::sync_directory(&self.root)?;
        }
        Ok(Machine::new(self, asked))
    }

    /// All machines with their IDs; those that could not be read, with the reason.
    fn all(&self) -> Result<Vec<(String, Result<Machine>)>> {
        let is_there = self.root.try_exists();
        if !is_there.map_err(Error::io("look at", &self.root))? {
            return Ok(Vec::new());
        }
        let guard = self.guard()?;
        let machines = self.sweep(&guard)?;
        self.release(guard);
        Ok(machines)
    }

    /// Retires what a crash has left, and ephemeral machines whose process has gone. The others.
    fn sweep(&self, guard: &Guard) -> Result<Vec<(String, Result<Machine>)>> {
        let mut machines = Vec::new();
        for path in files::entries(&self.root)? {
            let name = file_name(&path);
            if let Some(id) = name.strip_prefix(NEW) {
                self.retire(guard, &path, id)?;
            } else if name::is_id(name) {
                let machine = Machine::read(self, name);
                if let Ok(machine) = &machine
                    && machine.asked().ephemeral
                    && !claim::is_held(guard, &path)?
                {
                    self.retire(guard, &path, name)?;
                } else {
                    machines.push((name.to_owned(), machine));
                }
            }
        }
        Ok(machines)
    }
}

fn file_name(path: &Path) -> &str {
    path.file_name()
        .and_then(|name| name.to_str())
        .unwrap_or("")
}

/// Deletes a directory, unless somebody else has.
fn delete(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::io("delete the directory", path)(error))
        }
        _ => Ok(()),
    }
}
