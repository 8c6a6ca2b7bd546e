//! Folders of the host in the guest: what either side does is there on the other, and a guest
//! leaves them nowhere.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::guest::{Ended, STRATA, Slot, guest_with, run};
use crate::programs::compile;

/// A folder to share, with a secret beside it.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("folder")).unwrap();
        fs::write(directory.path().join("secret"), "the host's\n").unwrap();
        Self(directory)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join("folder").join(name)
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.path(name), content).unwrap();
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    /// The option that shares it.
    fn at(&self, guest: &str) -> String {
        format!("{}:{guest}", self.path("").display())
    }

    /// Runs a line of shell in a guest that has it at /srv, and with `mode` behind that.
    fn shell(&self, mode: &str, line: &str) -> Ended {
        let volume = self.at(&format!("/srv{mode}"));
        guest_with(&["-v", &volume], &["sh", "-c", line], b"")
    }
}

#[test]
fn what_one_side_writes_the_other_reads() {
    let folder = Folder::new();
    folder.write("hello", "from the host\n");
    folder.write("mapped", [b'h'; 10_000]);
    fs::create_dir(folder.path("sub")).unwrap();
    fs::set_permissions(folder.path("hello"), fs::Permissions::from_mode(0o640)).unwrap();
    compile("files", &[], &folder.path("files"));
    // Larger than a request, and no multiple of a page.
    let large: Vec<u8> = (0..9_000_001_u32).map(|n| (n ^ (n >> 11)) as u8).collect();
    folder.write("large", &large);

    let ended = folder.shell(
        "",
        "cat /srv/hello; stat -c '%a %s' /srv/hello; cd /srv
         cp large copy && cmp large copy && sha256sum <large
         echo from the guest >new; mkdir -m 700 dir; mv new dir/moved; rm hello
         ./files; for n in $(seq 300); do echo $n >sub/$n; done; ls sub | wc -l",
    );

    let sum = Command::new("sha256sum")
        .stdin(fs::File::open(folder.path("large")).unwrap())
        .output()
        .unwrap();
    let sum = String::from_utf8(sum.stdout).unwrap();
    let expected = format!("from the host\n640 14\n{sum}all well\n300\n");
    assert_eq!(ended.expect(0).text(), expected);
    assert!(fs::read(folder.path("copy")).unwrap() == large);
    assert_eq!(folder.read("dir/moved"), "from the guest\n");
    assert_eq!(folder.read("sub/300"), "300\n");
    assert!(!folder.path("hello").exists() && !folder.path("made").exists());
    assert_eq!(&folder.read("mapped")[4998..5007], "hhguesthh");
    let mode = |name| fs::metadata(folder.path(name)).unwrap().mode() & 0o7777;
    assert_eq!((mode("dir"), mode("kept")), (0o700, 0o755));
}

#[test]
fn a_folder_that_is_read_only_is_not_changed() {
    let folder = Folder::new();
    folder.write("hello", "from the host\n");
    let ended = folder.shell(
        ":ro",
        "cat /srv/hello; cd /srv
         { echo x >hello; echo x >new; rm hello; mv hello h; mkdir d; chmod 777 hello; touch hello
           mount -o remount,rw /srv; echo x >hello; echo x >new; rm hello; mv hello h; mkdir d
           chmod 777 hello; touch hello; ln hello l; } 2>/dev/null
         ls",
    );
    assert_eq!(ended.expect(0).text(), "from the host\nhello\n");
    assert_eq!(folder.read("hello"), "from the host\n");
    let mode = fs::metadata(folder.path("hello")).unwrap().mode();
    assert_eq!(mode & 0o111, 0);
}

#[test]
fn links_lead_to_the_guests_files_and_nowhere_else() {
    let folder = Folder::new();
    symlink(folder.0.path().join("secret"), folder.path("absolute")).unwrap();
    symlink("../secret", folder.path("up")).unwrap();
    symlink("/etc/session-of-the-guest", folder.path("own")).unwrap();
    let ended = folder.shell(
        "",
        "echo the guest\\'s >/etc/session-of-the-guest; cd /srv
         cat absolute; cat up; cat own; cat /srv/../secret
         ln -s /etc/passwd made; echo x >up; ls -1; exit 0",
    );
    let text = ended.expect(0).text();
    assert_eq!(text, "the guest's\nabsolute\nmade\nown\nup\n");
    let secret = fs::read_to_string(folder.0.path().join("secret")).unwrap();
    assert_eq!(secret, "the host's\n");
}

#[test]
fn ten_thousand_files_are_listed_and_read() {
    let folder = Folder::new();
    for number in 0..10_000 {
        folder.write(&format!("file-{number}"), "x");
    }
    let ended = folder.shell(
        ":ro",
        "cd /srv; ls | wc -l; ls -l | grep -c 'root .* 1 '; cat file-*9 | wc -c",
    );
    assert_eq!(ended.expect(0).text(), "10000\n10000\n1000\n");
}

#[test]
fn several_folders_are_where_they_were_asked_for_also_within_each_other() {
    let (outer, inner) = (Folder::new(), Folder::new());
    outer.write("a", "outer\n");
    inner.write("b", "inner\n");
    let options = [
        "-v".to_owned(),
        inner.at("/made/for it/in's"),
        "--volume".to_owned(),
        outer.at("/made/for it"),
    ];
    let line = "cat '/made/for it/a' \"/made/for it/in's/b\"; grep -c virtiofs /proc/mounts";
    let ended = guest_with(&options, &["sh", "-c", line], b"").expect(0);
    assert_eq!(ended.text(), "outer\ninner\n2\n");
    // Where it is mounted is made, by the guest, in the folder around it.
    assert!(outer.path("in's").is_dir());
}

#[test]
fn a_single_file_is_shared_without_what_is_beside_it() {
    let folder = Folder::new();
    folder.write("app.conf", "from the host\n");
    folder.write("beside", "the host's\n");
    symlink("app.conf", folder.path("link")).unwrap();
    let file = |host: &str, guest: &str| format!("{}:{guest}", folder.path(host).display());
    let options = [
        "-v".to_owned(),
        file("app.conf", "/made/for it/app.conf"),
        // A link is followed once, and a file may be where one is already.
        "-v".to_owned(),
        file("link", "/etc/passwd:ro"),
    ];
    let line = "cat '/made/for it/app.conf' /etc/passwd; ls -A '/made/for it' /run
        cd '/made/for it'; echo more >>app.conf
        { echo x >/etc/passwd; mount -o remount,rw /etc/passwd; echo x >/etc/passwd
          mv app.conf other; rm app.conf; } 2>/dev/null
        mkdir /aside; mount -t virtiofs share0 /aside; cd /aside; ls -A; cat file
        { echo x >new; rm file; mv file other; ln file other; ln -s x link; cat beside app.conf
          cat ../beside; } 2>/dev/null; ls -A";

    let ended = guest_with(&options, &["sh", "-c", line], b"");

    let text = ended.text();
    let expected = [
        "from the host\nfrom the host\n/made/for it:\napp.conf\n\n/run:\nstrata\n",
        "file\nfrom the host\nmore\nfile\n",
    ];
    assert_eq!(text, expected.concat(), "{}", ended.stderr);
    assert_eq!(folder.read("app.conf"), "from the host\nmore\n");
    assert_eq!(folder.read("beside"), "the host's\n");
    assert_eq!(fs::read_dir(folder.path("")).unwrap().count(), 3);
}

#[test]
fn a_single_file_that_the_host_replaces_stays_what_it_was() {
    let folder = Folder::new();
    folder.write("hello", "hello\n");
    let mut running = Running::start(&folder, "hello", "/srv/hello", "sleep 2; cat /srv/hello");

    folder.write("new", "another\n");
    fs::rename(folder.path("new"), folder.path("hello")).unwrap();
    let mut input = running.strata.stdin.take().unwrap();
    input.write_all(b"\n").unwrap();

    let mut text = String::new();
    running.output.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hello\n");
    assert_eq!(running.strata.wait().unwrap().code(), Some(0));
}

/// A guest that says it is ready, then waits for a line before it goes on.
struct Running {
    strata: Child,
    output: BufReader<std::process::ChildStdout>,
    server: u32,
    _slot: Slot,
}

impl Running {
    /// It has `name` of the folder at `guest`.
    fn start(folder: &Folder, name: &str, guest: &str, then: &str) -> Self {
        let slot = Slot::take();
        let volume = format!("{}:{guest}", folder.path(name).display());
        let script = format!("cat /srv/hello; read -r go; {then}");
        let mut strata = run(&["-v", &volume, "--", "sh", "-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut output = BufReader::new(strata.stdout.take().unwrap());
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        assert_eq!(line, "hello\n");
        let server = child_of(strata.id()).expect("there is a server");
        Self {
            strata,
            output,
            server,
            _slot: slot,
        }
    }
}

/// The process of a server that this process started.
fn child_of(parent: u32) -> Option<u32> {
    let children = format!("/proc/{parent}/task/{parent}/children");
    let children = fs::read_to_string(children).unwrap();
    children
        .split_whitespace()
        .filter_map(|number| number.parse().ok())
        .find(|number: &u32| {
            let words = fs::read(format!("/proc/{number}/cmdline")).unwrap_or_default();
            words.split(|byte| *byte == 0).nth(1) == Some(b"share-server")
        })
}

/// Whether a process is there and does something.
fn lives(process: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    !status.is_empty() && !status.contains("State:\tZ")
}

fn kill(process: u32) {
    let process = rustix::process::Pid::from_raw(process as i32).unwrap();
    rustix::process::kill_process(process, rustix::process::Signal::KILL).unwrap();
}

fn field(process: u32, name: &str) -> Option<String> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

#[test]
fn a_server_is_locked_up_and_when_it_dies_the_guest_gets_errors_and_goes_on() {
    let folder = Folder::new();
    folder.write("hello", "hello\n");
    let mut running = Running::start(
        &folder,
        "",
        "/srv",
        "cat /srv/hello; ls /srv; echo x >/srv/new; echo still here",
    );
    let server = running.server;
    assert_eq!(field(server, "Seccomp").as_deref(), Some("2"));
    assert_eq!(field(server, "NoNewPrivs").as_deref(), Some("1"));
    if let Ok(root) = fs::read_dir(format!("/proc/{server}/root")) {
        let names: Vec<_> = root.map(|entry| entry.unwrap().file_name()).collect();
        // The root directory is the folder, where the host gives namespaces.
        if !Path::new(&format!("/proc/{server}/root/proc/self")).exists() {
            assert_eq!(names, ["hello"]);
        }
    }

    kill(server);
    running
        .strata
        .stdin
        .take()
        .unwrap()
        .write_all(b"\n")
        .unwrap();
    let mut text = String::new();
    running.output.read_to_string(&mut text).unwrap();
    let status = running.strata.wait().unwrap();
    let mut stderr = String::new();
    let mut errors = running.strata.stderr.take().unwrap();
    errors.read_to_string(&mut stderr).unwrap();
    assert_eq!(
        (status.code(), &*text),
        (Some(0), "still here\n"),
        "{stderr}"
    );
    assert!(stderr.contains("Input/output error"), "{stderr}");
    assert!(stderr.contains("has gone"), "{stderr}");
    assert!(!folder.path("new").exists());
}

#[test]
fn a_machine_that_is_killed_leaves_no_server() {
    let folder = Folder::new();
    folder.write("hello", "hello\n");
    let mut running = Running::start(&folder, "", "/srv", "true");
    assert!(lives(running.server));

    running.strata.kill().unwrap();
    running.strata.wait().unwrap();
    // A limit for a test that fails; it takes no time.
    for _ in 0..1000 {
        if !lives(running.server) {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!("the server is still there");
}

#[test]
fn a_machine_in_the_background_has_its_folders_each_time_it_starts() {
    let folder = Folder::new();
    folder.write("hello", "hello\n");
    let state = tempfile::tempdir().unwrap();
    let _slot = Slot::take();
    let strata = |words: &[&str]| {
        let mut command = Command::new(STRATA);
        // A relative path is one of the directory in which the machine was made.
        let command = command.args(words).current_dir(folder.0.path());
        Ended::from(
            command
                .env("XDG_STATE_HOME", state.path())
                .output()
                .unwrap(),
        )
    };
    let volume = ["-v", "folder:/srv", "--timeout", "300s"];
    strata(
        &[
            &["run", "-d", "--name", "shares", "--accel", "soft"],
            &volume[..],
        ]
        .concat(),
    )
    .expect(0);
    let told = strata(&["exec", "shares", "cat", "/srv/hello"]).expect(0);
    assert_eq!(told.text(), "hello\n");
    strata(&["exec", "shares", "touch", "/srv/first"]).expect(0);

    strata(&["stop", "shares"]).expect(0);
    strata(&["start", "shares"]).expect(0);
    let told = strata(&["exec", "shares", "ls", "/srv"]).expect(0);
    assert_eq!(told.text(), "first\nhello\n");
    strata(&["rm", "-f", "shares"]).expect(0);
}
