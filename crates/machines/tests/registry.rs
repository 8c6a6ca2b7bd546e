//! Machines as one process sees them.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use strata_machines::{End, Error, Image, Registry, Signal, Spec, State};
use tempfile::TempDir;

fn registry() -> (TempDir, Registry) {
    let directory = TempDir::new().unwrap();
    let registry = Registry::at(&directory.path().join("state/machines"));
    (directory, registry)
}

fn named(name: &str) -> Spec {
    Spec {
        name: Some(name.to_owned()),
        ..Spec::default()
    }
}

fn names(registry: &Registry) -> Vec<String> {
    let machines = registry.list().unwrap().into_iter();
    machines
        .map(|machine| machine.unwrap().name().to_owned())
        .collect()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn what_was_asked_for_is_read_back() {
    let (_directory, registry) = registry();
    let spec = Spec {
        name: Some("web".to_owned()),
        arguments: vec!["--memory".to_owned(), "1G".to_owned(), "ä b".to_owned()],
        directory: PathBuf::from("/srv/web"),
        image: Some(Image {
            name: "nginx".to_owned(),
            id: "sha256:12".to_owned(),
        }),
    };

    let created = registry.create(&spec).unwrap();
    let found = registry.find("web").unwrap();

    assert_eq!(found.asked(), created.asked());
    let asked = found.asked();
    assert_eq!(asked.arguments, spec.arguments);
    assert_eq!(asked.directory, spec.directory);
    assert_eq!(asked.image, spec.image);
    assert!(!asked.ephemeral);
    assert!(asked.created > 1_700_000_000);
    assert_eq!(found.state().unwrap(), State::Created);
    assert_eq!(found.directory(), registry.root().join(found.id()));
}

#[test]
fn files_are_their_owners_alone() {
    let (_directory, registry) = registry();
    fs::create_dir_all(registry.root()).unwrap();
    fs::set_permissions(registry.root(), PermissionsExt::from_mode(0o755)).unwrap();

    let machine = registry.create(&named("web")).unwrap();
    machine.claim().unwrap().end(End::now(0, "exited")).unwrap();

    assert_eq!(mode(registry.root()), 0o700);
    assert_eq!(mode(&machine.directory()), 0o700);
    for entry in fs::read_dir(machine.directory()).unwrap() {
        let path = entry.unwrap().path();
        assert_eq!(mode(&path), 0o600, "{}", path.display());
    }
}

#[test]
fn a_registry_that_is_not_there_has_no_machines_and_is_not_created() {
    let (_directory, registry) = registry();

    assert!(registry.list().unwrap().is_empty());
    assert!(matches!(registry.find("web"), Err(Error::NoSuchMachine(_))));
    assert!(!registry.root().exists());
}

#[test]
fn a_second_machine_of_a_name_is_refused_with_the_first_ones_id() {
    let (_directory, registry) = registry();
    let first = registry.create(&named("web")).unwrap();

    let error = registry.create(&named("web")).unwrap_err();

    let text = error.to_string();
    assert!(matches!(error, Error::NameTaken { name, id } if name == "web" && id == first.id()));
    assert!(text.contains("choose another name"), "{text}");
    assert_eq!(names(&registry), ["web"]);
}

#[test]
fn of_many_creates_of_one_name_exactly_one_succeeds() {
    const THREADS: usize = 16;
    let (_directory, registry) = registry();
    let barrier = Barrier::new(THREADS);

    let created: Vec<bool> = thread::scope(|scope| {
        let create = || {
            barrier.wait();
            match registry.create(&named("web")) {
                Ok(_) => true,
                Err(Error::NameTaken { .. }) => false,
                Err(error) => panic!("{error}"),
            }
        };
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(create)).collect();
        threads.into_iter().map(|it| it.join().unwrap()).collect()
    });

    assert_eq!(created.into_iter().filter(|it| *it).count(), 1);
    assert_eq!(names(&registry), ["web"]);
}

#[test]
fn of_many_claims_of_a_machine_exactly_one_succeeds_while_others_look_at_it() {
    const THREADS: usize = 16;
    let (_directory, registry) = registry();
    let machine = registry.create(&named("web")).unwrap();
    let barrier = Barrier::new(THREADS);

    for run in 1..20 {
        let claims: Vec<_> = thread::scope(|scope| {
            let claim = |index: usize| {
                barrier.wait();
                if index.is_multiple_of(2) {
                    machine.state().unwrap();
                    return None;
                }
                match machine.claim() {
                    Ok(claim) => Some(claim),
                    Err(Error::AlreadyRunning(_)) => None,
                    Err(error) => panic!("{error}"),
                }
            };
            let threads: Vec<_> = (0..THREADS)
                .map(|index| scope.spawn(move || claim(index)))
                .collect();
            let claims = threads.into_iter().map(|it| it.join().unwrap());
            claims.flatten().collect()
        });
        assert_eq!(claims.len(), 1);
        assert_eq!(claims[0].run(), run);
    }
}

#[test]
fn generated_names_are_names_and_differ() {
    let (_directory, registry) = registry();
    for _ in 0..40 {
        registry.create(&Spec::default()).unwrap();
    }

    let mut names = names(&registry);

    assert!(names.iter().all(|name| strata_machines::is_name(name)));
    names.sort();
    names.dedup();
    assert_eq!(names.len(), 40);
}

#[test]
fn names_that_are_none_and_directories_that_cannot_be_written_down_are_refused() {
    let (_directory, registry) = registry();
    let directory = PathBuf::from(std::ffi::OsString::from_vec(vec![b'/', 0xff]));
    let spec = Spec {
        directory,
        ..Spec::default()
    };

    for bad in ["", "-a", "A", "../web", "a.b"] {
        let error = registry.create(&named(bad)).unwrap_err();
        assert!(matches!(error, Error::BadName(_)), "{bad}: {error}");
    }
    assert!(matches!(registry.create(&spec), Err(Error::NotUtf8(_))));
    assert!(registry.list().unwrap().is_empty());
}

#[test]
fn a_machine_is_found_by_its_name_before_any_id_and_by_the_beginning_of_its_id() {
    let (_directory, registry) = registry();
    let first = registry.create(&named("first")).unwrap();
    let decoy = registry.create(&named(&first.id()[..3])).unwrap();

    assert_eq!(registry.find(&first.id()[..6]).unwrap().name(), "first");
    assert_eq!(registry.find(first.id()).unwrap().name(), "first");
    assert_eq!(registry.find(&first.id()[..3]).unwrap().id(), decoy.id());
    for nothing in ["", "fir", "0123456789abc", "zz"] {
        let error = registry.find(nothing).unwrap_err();
        assert!(matches!(error, Error::NoSuchMachine(_)), "{nothing}");
    }
}

#[test]
fn the_beginning_of_two_ids_is_refused_with_both() {
    let (_directory, registry) = registry();
    // Of 17 IDs two begin with the same digit.
    let mut ids: Vec<String> = Vec::new();
    let (digit, first) = loop {
        let id = registry.create(&Spec::default()).unwrap().id().to_owned();
        let digit = id[..1].to_owned();
        if let Some(first) = ids.iter().find(|other| other.starts_with(&digit)) {
            break (digit, first.clone());
        }
        ids.push(id);
    };

    let error = registry.find(&digit).unwrap_err();

    assert!(
        matches!(error, Error::Ambiguous { ids, .. } if ids.len() == 2 && ids.contains(&first))
    );
}

#[test]
fn a_machine_goes_from_created_over_starting_and_running_to_its_end_and_again() {
    let (_directory, registry) = registry();
    let machine = registry.create(&named("web")).unwrap();
    let own = std::process::id();

    for run in 1..4 {
        let mut claim = machine.claim().unwrap();
        assert_eq!(claim.run(), run);
        assert!(matches!(machine.state().unwrap(), State::Starting { pid, .. } if pid == own));
        claim.started().unwrap();
        assert!(matches!(machine.state().unwrap(), State::Running { pid, .. } if pid == own));
        let end = End::now(run as u8, "exited");
        claim.end(end.clone()).unwrap();
        assert_eq!(machine.state().unwrap(), State::Ended(end));
    }
}

#[test]
fn a_run_without_an_end_is_lost_whatever_the_run_before_said() {
    let (_directory, registry) = registry();
    let machine = registry.create(&named("web")).unwrap();
    machine.claim().unwrap().end(End::now(0, "exited")).unwrap();

    drop(machine.claim().unwrap());

    assert!(matches!(machine.state().unwrap(), State::Lost { .. }));
}

#[test]
fn an_end_that_was_cut_by_a_power_failure_is_none() {
    let (_directory, registry) = registry();
    let machine = registry.create(&named("web")).unwrap();
    machine.claim().unwrap().end(End::now(0, "exited")).unwrap();
    let path = machine.directory().join("end.json");
    let whole = fs::read(&path).unwrap();

    for length in 0..whole.len() {
        fs::write(&path, &whole[..length]).unwrap();
        assert!(matches!(machine.state().unwrap(), State::Lost { .. }));
    }
    fs::write(&path, vec![0; whole.len()]).unwrap();
    assert!(matches!(machine.state().unwrap(), State::Lost { .. }));
}

#[test]
fn what_a_machine_gives_as_its_end_is_bounded_and_has_no_control_characters() {
    let (_directory, registry) = registry();
    let machine = registry.create(&named("web")).unwrap();
    let reason = format!("\x1b[2J{}", "ä".repeat(4000));

    let end = End::now(1, reason);
    machine.claim().unwrap().end(end).unwrap();

    let State::Ended(end) = machine.state().unwrap() else {
        panic!("not ended");
    };
    assert!(end.reason.starts_with("?[2Jää"));
    assert_eq!(end.reason.len(), 1024);
}

#[test]
fn a_running_machine_cannot_be_claimed_or_removed() {
    let (_directory, registry) = registry();
    let machine = registry.create(&named("web")).unwrap();
    let claim = machine.claim().unwrap();

    assert!(matches!(machine.claim(), Err(Error::AlreadyRunning(_))));
    assert!(matches!(machine.remove(), Err(Error::StillRunning(_))));

    drop(claim);
    machine.remove().unwrap();
    assert!(names(&registry).is_empty());
}

#[test]
fn a_removed_machine_is_gone_with_its_files_and_its_name_is_free() {
    let (_directory, registry) = registry();
    let machine = registry.create(&named("web")).unwrap();
    fs::create_dir(machine.directory().join("disks")).unwrap();
    fs::write(machine.directory().join("disks/0"), "data").unwrap();

    machine.remove().unwrap();

    let left: Vec<_> = fs::read_dir(registry.root()).unwrap().collect();
    assert_eq!(left.len(), 1, "only the lock: {left:?}");
    assert!(matches!(machine.state(), Err(Error::Gone(_))));
    assert!(matches!(machine.claim(), Err(Error::Gone(_))));
    assert!(matches!(machine.remove(), Err(Error::Gone(_))));
    assert!(matches!(machine.signal(Signal::TERM), Err(Error::Gone(_))));
    assert!(matches!(machine.wait(None), Err(Error::Gone(_))));
    registry.create(&named("web")).unwrap();
}

#[test]
fn what_a_crash_left_of_creating_and_removing_is_cleaned_up() {
    let (_directory, registry) = registry();
    registry.create(&named("web")).unwrap();
    for left in [".new-0123456789ab", ".gone-0123456789ac"] {
        fs::create_dir(registry.root().join(left)).unwrap();
        fs::write(registry.root().join(left).join("disk"), "data").unwrap();
    }

    assert_eq!(names(&registry), ["web"]);

    assert_eq!(fs::read_dir(registry.root()).unwrap().count(), 2);
}

#[test]
fn an_ephemeral_machine_vanishes_with_its_claim_and_its_name_is_free() {
    let (_directory, registry) = registry();
    let (machine, mut claim) = registry.create_ephemeral(&named("web")).unwrap();
    claim.started().unwrap();
    assert_eq!(names(&registry), ["web"]);
    assert!(machine.state().unwrap().is_running());
    assert!(matches!(
        registry.create_ephemeral(&named("web")),
        Err(Error::NameTaken { .. })
    ));

    claim.end(End::now(0, "exited")).unwrap();

    assert!(matches!(machine.state().unwrap(), State::Ended(_)));
    registry.create(&named("web")).unwrap();
    assert!(matches!(machine.state(), Err(Error::Gone(_))));
    assert_eq!(names(&registry), ["web"]);
}

#[test]
fn damaged_and_newer_machines_are_errors_of_their_own_and_the_others_are_listed() {
    let (_directory, registry) = registry();
    let good = registry.create(&named("good")).unwrap();
    let spoiled = |text: &str| {
        let machine = registry.create(&Spec::default()).unwrap();
        fs::write(machine.directory().join("machine.json"), text).unwrap();
        machine.id().to_owned()
    };
    let ids = [
        spoiled("{ no"),
        spoiled(r#"{"version": 0}"#),
        spoiled(r#"{"version": 1, "id": 7}"#),
        spoiled(&fs::read_to_string(good.directory().join("machine.json")).unwrap()),
    ];
    let newer = spoiled(r#"{"version": 2, "shape": "unknown"}"#);
    let empty = "0123456789ab";
    fs::create_dir(registry.root().join(empty)).unwrap();
    fs::write(registry.root().join("notes.txt"), "not a machine").unwrap();

    let listed = registry.list().unwrap();

    assert_eq!(listed.len(), 7);
    assert_eq!(listed[0].as_ref().unwrap().name(), "good");
    assert!(listed[1..].iter().all(Result::is_err));
    for id in ids.iter().map(String::as_str).chain([empty]) {
        let error = registry.find(id).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::Damaged { .. }), "{text}");
        assert!(text.contains(id) && text.contains("remove"), "{text}");
    }
    let error = registry.find(&newer).unwrap_err();
    assert!(matches!(error, Error::Newer { version: 2, .. }), "{error}");
    registry.create(&named("other")).unwrap();
}

#[test]
fn a_damaged_run_is_an_error_and_the_machine_can_be_removed() {
    let (_directory, registry) = registry();
    let machine = registry.create(&named("web")).unwrap();
    fs::write(machine.directory().join("run.json"), "{").unwrap();

    assert!(matches!(machine.state(), Err(Error::Damaged { .. })));
    assert!(matches!(machine.claim(), Err(Error::Damaged { .. })));

    machine.remove().unwrap();
}

#[test]
fn a_machine_that_does_not_run_gets_no_signal_and_is_not_waited_for() {
    let (_directory, registry) = registry();
    let machine = registry.create(&named("web")).unwrap();

    let error = machine.signal(Signal::TERM).unwrap_err();

    assert!(matches!(error, Error::NotRunning(_)), "{error}");
    assert_eq!(machine.wait(None).unwrap(), Some(State::Created));
}

#[test]
fn a_machine_of_another_container_gets_no_signal() {
    let (_directory, registry) = registry();
    let machine = registry.create(&named("web")).unwrap();
    let _claim = machine.claim().unwrap();
    let path = machine.directory().join("run.json");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("pid:[", "pid:[9")).unwrap();

    let error = machine.signal(Signal::KILL).unwrap_err();

    assert!(matches!(error, Error::Elsewhere(_)), "{error}");
    let waited = machine.wait(Some(Duration::from_millis(1)));
    assert_eq!(waited.unwrap(), None);
}

#[test]
fn a_program_that_the_machine_executes_does_not_hold_the_claim() {
    let (_directory, registry) = registry();
    let machine = registry.create(&named("web")).unwrap();
    let claim = machine.claim().unwrap();
    let mut program = Command::new("sleep").arg("600").spawn().unwrap();

    drop(claim);

    let state = machine.state();
    program.kill().unwrap();
    program.wait().unwrap();
    assert!(matches!(state.unwrap(), State::Lost { .. }));
}

#[test]
fn a_root_that_is_no_directory_is_an_error_with_its_path() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("file");
    fs::write(&path, "").unwrap();

    let error = Registry::at(&path).create(&Spec::default()).unwrap_err();

    assert!(error.to_string().contains(path.to_str().unwrap()));
    assert!(matches!(error, Error::Io { source, .. } if source.kind() == ErrorKind::AlreadyExists));
}
