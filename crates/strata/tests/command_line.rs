//! The binary's behaviour that needs no guest: usage, bad input, help, doctor.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// Runs the binary with a cache of its own, so that nothing of the user's is touched.
fn strata(args: &[&str]) -> Output {
    command(args).output().expect("strata starts")
}

fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_strata"));
    command
        .args(args)
        .stdin(Stdio::null())
        .env_remove("STRATA_LOG")
        .env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"));
    command
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn wrong_usage_ends_with_2() {
    for args in [
        &["run", "--memory", "512"][..],
        &["run", "--cpus", "0"],
        &["run", "--cpus", "17"],
        &["run", "--initrd", "x"],
        &["run", "--kernel", "x", "--", "ls"],
        &["run", "uname"],
        &["fly"],
        &[],
    ] {
        assert_eq!(strata(args).status.code(), Some(2), "{args:?}");
    }
}

#[test]
fn a_size_without_a_unit_is_explained() {
    let output = strata(&["run", "--memory", "512"]);
    assert!(stderr(&output).contains("512M"), "{}", stderr(&output));
}

#[test]
fn help_tells_the_exit_statuses_and_the_keys() {
    let help = stdout(&strata(&["run", "--help"]));
    for text in ["124", "240", "triple fault", "Ctrl-A x"] {
        assert!(help.contains(text), "no {text} in {help}");
    }
}

#[test]
fn a_missing_kernel_is_named_and_ends_with_125() {
    let output = strata(&["run", "--kernel", "/nonexistent/vmlinuz"]);
    assert_eq!(output.status.code(), Some(125));
    let message = stderr(&output);
    assert!(
        message.starts_with("strata: ") && message.contains("/nonexistent/vmlinuz"),
        "{message}"
    );
    assert!(output.stdout.is_empty());
}

#[test]
fn what_cannot_be_shared_is_explained() {
    let directory = tempfile::tempdir().unwrap();
    let share = |host: &Path| {
        let output = strata(&["run", "-v", &format!("{}:/srv", host.display())]);
        assert_eq!(output.status.code(), Some(125));
        stderr(&output)
    };
    let message = share(&directory.path().join("missing"));
    assert!(message.contains("missing'"), "{message}");
    assert!(
        message.contains("make the folder or file first"),
        "{message}"
    );
    let message = share(Path::new("/dev/null"));
    assert!(
        message.contains("null': it is neither a folder nor a file"),
        "{message}"
    );
    assert!(message.contains("share the folder"), "{message}");
}

#[test]
fn a_volume_that_is_none_is_explained_as_wrong_usage() {
    for (args, word) in [
        (&["-v", "/tmp"][..], "HOST:GUEST"),
        (&["-v", "/tmp:srv"], "not absolute"),
        (&["-v", "/tmp:/srv:xx"], "neither ro nor rw"),
        (&["-v", "/tmp:/"], "root"),
        (&["-v", "/tmp:/srv", "-v", "/:/srv"], "a path of its own"),
    ] {
        let output = strata(&[&["run"], args].concat());
        assert_eq!(output.status.code(), Some(2), "{args:?}");
        assert!(stderr(&output).contains(word), "{}", stderr(&output));
    }
}

#[test]
fn without_apt_the_message_says_which_files_to_pass() {
    let cache = tempfile::tempdir().unwrap();
    let output = command(&["run"])
        .env("XDG_CACHE_HOME", cache.path())
        .env("PATH", "/nonexistent")
        .output()
        .unwrap();

    assert_eq!(output.status.code(), Some(125));
    let message = stderr(&output);
    assert!(
        message.contains("--kernel") && message.contains("--initrd"),
        "{message}"
    );
}

#[test]
fn without_a_home_the_message_names_the_variable_to_set() {
    let output = command(&["run"])
        .env_remove("XDG_CACHE_HOME")
        .env_remove("HOME")
        .output()
        .unwrap();

    assert_eq!(output.status.code(), Some(125));
    assert!(stderr(&output).contains("XDG_CACHE_HOME"));
}

#[test]
fn a_console_log_that_cannot_be_made_is_named() {
    let kernel = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
    let log = "/nonexistent/console.log";
    let output = strata(&[
        "run",
        "--kernel",
        kernel.to_str().unwrap(),
        "--console-log",
        log,
    ]);
    assert_eq!(output.status.code(), Some(125));
    assert!(stderr(&output).contains(log), "{}", stderr(&output));
}

#[test]
fn doctor_names_the_accelerator_in_both_forms() {
    let text = strata(&["doctor"]);
    assert!(stdout(&text).contains("Accelerator: soft"));

    let json = strata(&["doctor", "--output", "json"]);
    let value: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(value["accelerator"]["name"], "soft");
    assert_eq!(json.status.success(), value["can_run_guests"] == true);
}

#[test]
fn a_reader_that_leaves_early_is_no_error() {
    let mut child = command(&["completions", "bash"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());

    let output = child.wait_with_output().unwrap();

    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn the_manual_page_of_run_is_roff() {
    let output = strata(&["man", "run"]);
    assert!(output.status.success());
    assert!(
        stdout(&output).contains(".TH strata-run 1"),
        "{}",
        stdout(&output)
    );
}

/// Writes a Debian package that holds `files`, as far as Strata looks into one.
fn package(path: &Path, files: &[(&str, &[u8])]) {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, data) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        tar.append_data(&mut header, name, *data).unwrap();
    }
    let data = tar.into_inner().unwrap();
    let mut package = ar::Builder::new(File::create(path).unwrap());
    let header = ar::Header::new(b"data.tar".to_vec(), data.len() as u64);
    package.append(&header, &*data).unwrap();
}

/// An apt whose own lists name versions that the mirror no longer has: a download works only
/// after an update into private directories.
const STALE_APT: &str = r#"#!/bin/sh
here=${0%/*}
case "$*" in *Dir::State=*) private=yes ;; esac
for last; do :; done
case "$*" in
*" show "*)
    echo "Package: $last"
    echo "Version: 1"
    [ "$last" = linux-image-cloud-amd64 ] && echo "Depends: linux-image-9-cloud-amd64 (= 1)"
    ;;
*" update") [ "$private" ] && touch "$here/updated" ;;
*" download "*)
    if ! [ -f "$here/updated" ]; then
        echo "E: Failed to fetch http://mirror/$last 404" >&2
        exit 100
    fi
    /bin/cp "$here/${last%%=*}.package" "./${last%%=*}.deb"
    ;;
esac
"#;

#[test]
fn out_of_date_package_lists_are_renewed_and_the_appliance_is_built() {
    let dir = tempfile::tempdir().unwrap();
    for program in ["apt-get", "apt-cache"] {
        let path = dir.path().join(program);
        fs::write(&path, STALE_APT.replace("touch", "/bin/touch")).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    }
    let builtin = b"virtio_pci.ko\nvirtio_blk.ko\nvirtio_console.ko\n";
    package(
        &dir.path().join("linux-image-9-cloud-amd64.package"),
        &[
            ("./boot/vmlinuz-9", b"no kernel at all"),
            ("./lib/modules/9/modules.builtin", builtin),
        ],
    );
    package(
        &dir.path().join("busybox-static.package"),
        &[("./bin/busybox", b"tools")],
    );

    let output = command(&["run", "--timeout", "1m"])
        .env("XDG_CACHE_HOME", dir.path())
        .env("PATH", dir.path())
        .output()
        .unwrap();

    // The appliance is built, its kernel is refused.
    assert_eq!(output.status.code(), Some(125), "{}", stderr(&output));
    assert!(stderr(&output).contains("vmlinuz"), "{}", stderr(&output));
    let built = dir.path().join("strata/appliance");
    let manifests: Vec<_> = fs::read_dir(built)
        .unwrap()
        .filter(|entry| {
            entry
                .as_ref()
                .unwrap()
                .path()
                .join("manifest.json")
                .exists()
        })
        .collect();
    assert_eq!(manifests.len(), 1, "{}", stderr(&output));
}
