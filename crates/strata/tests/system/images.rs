//! Container images in machines: what runs, as whom, where, and on which files.

use std::fs;

use std::process::Command;

use serde_json::{Value, json};
use strata_image::oci::Digest;
use tar::{Builder, EntryType, Header};
use tempfile::TempDir;

use crate::guest::{Ended, STRATA, Slot, feed, run};
use crate::programs::compile;

struct Layer(Builder<Vec<u8>>);

impl Layer {
    fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    fn add(mut self, path: &str, mode: u32, data: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        let is_directory = path.ends_with('/');
        header.set_entry_type(if is_directory {
            EntryType::Directory
        } else {
            EntryType::Regular
        });
        header.set_mode(mode);
        header.set_size(data.len() as u64);
        self.0.append_data(&mut header, path, data).unwrap();
        self
    }

    fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

/// A store with one image, `test`.
struct Store(TempDir);

impl Store {
    fn new(layers: &[Vec<u8>], config: &Value) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let blobs = directory.path().join("test/blobs/sha256");
        fs::create_dir_all(&blobs).unwrap();
        let put = |blob: &[u8], kind: &str| {
            let digest = Digest::of(blob);
            fs::write(blobs.join(digest.hex()), blob).unwrap();
            let kind = format!("application/vnd.oci.image.{kind}");
            json!({ "mediaType": kind, "digest": digest.to_string(), "size": blob.len() })
        };
        let described: Vec<Value> = layers.iter().map(|tar| put(tar, "layer.v1.tar")).collect();
        let diff_ids: Vec<&Value> = described.iter().map(|layer| &layer["digest"]).collect();
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": config,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = put(config.to_string().as_bytes(), "config.v1+json");
        let manifest = json!({ "schemaVersion": 2, "config": config, "layers": described });
        let manifest = put(manifest.to_string().as_bytes(), "manifest.v1+json");
        let index = json!({ "schemaVersion": 2, "manifests": [manifest] });
        fs::write(directory.path().join("test/index.json"), index.to_string()).unwrap();
        let store = Self(directory);
        let mut pull = Command::new(STRATA);
        pull.args(["image", "pull", "oci:test"]);
        let pulled = store.home(pull).output().unwrap();
        assert!(pulled.status.success(), "{pulled:?}");
        store
    }

    fn home(&self, mut command: Command) -> Command {
        command
            .current_dir(self.0.path())
            .env("XDG_DATA_HOME", self.0.path());
        command
    }

    fn run(&self, words: &[&str], input: &[u8]) -> Ended {
        self.run_with(&[], words, input)
    }

    fn run_with(&self, options: &[&str], words: &[&str], input: &[u8]) -> Ended {
        let mut command = run(&[&["--image", "test"], options].concat());
        if !words.is_empty() {
            command.arg("--").args(words);
        }
        feed(self.home(command), input)
    }
}

fn base() -> Layer {
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("tell");
    compile("tell", &[], &program);
    Layer::new()
        .add("bin/tell", 0o755, &fs::read(program).unwrap())
        .add(
            "etc/passwd",
            0o644,
            b"root:x:0:0::/root:/bin/sh\nme:x:1234:55::/home:/bin/sh\n",
        )
        .add("etc/group", 0o644, b"us:x:77:\n")
        .add("gone", 0o644, b"")
        .add("kept", 0o600, b"")
        .add("hidden/old", 0o644, b"")
}

fn upper() -> Layer {
    Layer::new()
        .add(".wh.gone", 0o644, b"")
        .add("hidden/", 0o755, b"")
        .add("hidden/.wh..wh..opq", 0o644, b"")
        .add("hidden/new", 0o640, b"")
}

#[test]
fn an_image_runs_as_its_configuration_says() {
    let config = json!({
        "Entrypoint": ["tell", "it's"],
        "Cmd": ["two  words"],
        "Env": ["PATH=/nowhere:/bin", "MYTEXT=a b", "MYSTATUS=7"],
        "User": "me:us",
        "WorkingDir": "/made/for it",
    });
    let store = Store::new(&[base().bytes(), upper().bytes()], &config);

    let ended = store.run(&[], b"input\n").expect(7);

    let expected = "1234:77 in /made/for it\n[tell]\n[it's]\n[two  words]\n\
        MYSTATUS=7\nMYTEXT=a b\n/kept 100600\n/hidden/new 100640\n/dev/null 20666\n\
        /proc/1 40555\nwrite no\ninput\n";
    assert_eq!(ended.text(), expected);
}

#[test]
fn a_command_that_is_given_stands_in_place_of_the_images_own() {
    let config = json!({ "Cmd": ["/not/there"] });
    let store = Store::new(&[base().bytes()], &config);

    let ended = store.run(&["tell", "x"], b"").expect(0);
    assert!(
        ended.text().starts_with("0:0 in /\n[tell]\n[x]\n"),
        "{}",
        ended.text()
    );
    assert!(ended.text().contains("/gone") && ended.text().contains("write yes"));

    // what one machine writes is not there in the next; and nothing changes the layers
    store.run(&["tell"], b"").expect(0);
    store.run(&[], b"").expect(127);
    store.run(&["/etc/passwd"], b"").expect(126);
}

#[test]
fn an_image_that_cannot_be_run_is_explained() {
    let store = Store::new(&[base().bytes()], &json!({ "User": "nobody-here" }));
    let ended = store.run(&["tell"], b"").expect(125);
    assert!(
        ended.stderr.contains("no user 'nobody-here'"),
        "{}",
        ended.stderr
    );
    let ended = store.run(&[], b"").expect(125);
    assert!(
        ended.stderr.contains("no command of its own"),
        "{}",
        ended.stderr
    );
    let missing = run(&["--image", "missing"]);
    let ended = feed(store.home(missing), b"").expect(125);
    assert!(
        ended.stderr.contains("strata image pull"),
        "{}",
        ended.stderr
    );
}

#[test]
fn what_an_image_writes_goes_to_a_disk_that_no_one_sees() {
    let store = Store::new(&[base().bytes(), upper().bytes()], &json!({}));
    let directory = tempfile::tempdir().unwrap();
    let disk = directory.path().join("own");
    fs::write(&disk, vec![0; 1 << 20]).unwrap();

    let options = ["--scratch", "3G", "--disk", disk.to_str().unwrap()];
    let ended = store.run_with(&options, &["tell", "room"], b"").expect(0);

    let text = ended.text();
    assert!(text.contains("write yes"), "{text}");
    let room = text
        .lines()
        .find_map(|line| line.strip_suffix(" MiB"))
        .unwrap();
    assert!(
        (2900..=3072).contains(&room.parse::<u32>().unwrap()),
        "{text}"
    );
    let left = fs::read_dir(store.0.path().join("strata/images/partial")).unwrap();
    let names: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
    let is_lock = |name: &std::ffi::OsString| name.to_string_lossy().ends_with(".lock");
    assert!(names.iter().all(is_lock), "{names:?}");
}

#[test]
fn an_image_has_its_machines_name_and_network() {
    let files = Layer::new().add("etc/hostname", 0o644, b"built-here\n");
    let store = Store::new(&[base().bytes(), files.bytes()], &json!({}));

    let options = ["--network", "user", "--name", "web"];
    let ended = store.run_with(&options, &["tell", "names"], b"").expect(0);

    let text = ended.text();
    for line in ["web", "127.0.0.1 localhost web", "nameserver 10.0.2.1"] {
        assert!(text.lines().any(|is| is == line), "{line}: {text}");
    }
    assert!(!text.contains("built-here"), "{text}");
}

#[test]
fn an_images_own_init_gets_the_machine() {
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("init");
    compile("init", &[], &program);
    let init = Layer::new().add("sbin/init", 0o755, &fs::read(program).unwrap());
    let store = Store::new(&[base().bytes(), init.bytes()], &json!({}));

    let ended = store.run_with(&["--init", "image"], &[], b"").expect(0);
    let expected = "process 1, file there, appliance gone";
    assert!(ended.text().contains(expected), "{}", ended.text());

    let store = Store::new(&[base().bytes()], &json!({}));
    let ended = store.run_with(&["--init", "image"], &[], b"").expect(0);
    assert!(ended.text().contains("no /sbin/init"), "{}", ended.text());
}

#[test]
fn an_image_may_have_127_layers() {
    let mut layers = vec![base().bytes()];
    for number in 1..127 {
        let name = format!("layer {number}\n");
        let layer = Layer::new().add("etc/hostname", 0o644, name.as_bytes());
        layers.push(match number {
            60 => layer.add("hidden/new", 0o640, b"").bytes(),
            126 => layer.add(".wh.gone", 0o644, b"").bytes(),
            _ => layer.bytes(),
        });
    }
    let store = Store::new(&layers, &json!({}));

    let ended = store.run(&["tell", "names"], b"").expect(0);

    let text = ended.text();
    assert!(text.contains("layer 126\n"), "{text}");
    assert!(text.contains("/kept") && text.contains("/hidden/new"));
    assert!(!text.contains("/gone"), "{text}");
}

#[test]
fn a_machine_in_the_background_keeps_what_its_image_wrote() {
    let config = json!({ "User": "me", "WorkingDir": "/home", "StopSignal": "SIGINT",
        "Env": ["PATH=/bin", "SHELL=none"], "Volumes": { "/made/volume": {} } });
    let store = Store::new(&[base().bytes(), upper().bytes()], &config);
    let _slot = Slot::take();
    let strata = |words: &[&str]| {
        let mut command = Command::new(STRATA);
        command.args(words).env("XDG_STATE_HOME", store.0.path());
        Ended::from(store.home(command).output().unwrap())
    };
    let options = ["--accel", "soft", "--timeout", "300s", "--scratch", "1G"];
    let start = [
        &["run", "-d", "--name", "kept", "--image", "test"],
        &options[..],
    ]
    .concat();
    strata(&[&start[..], &["--", "tell", "wait"]].concat()).expect(0);

    // as the image says, unless something else is asked for
    let told = strata(&["exec", "kept", "tell"]).expect(0).text();
    assert!(told.starts_with("1234:55 in /home\n[tell]\n"), "{told}");
    let told = strata(&["exec", "-u", "root", "-w", "/", "kept", "tell", "make"])
        .expect(0)
        .text();
    assert!(told.starts_with("0:0 in /\n[tell]\n[make]\n"), "{told}");
    let nobody = strata(&["exec", "-u", "nobody-here", "kept", "tell"]).expect(127);
    assert!(
        nobody.stderr.contains("no user 'nobody-here'"),
        "{}",
        nobody.stderr
    );

    let target = store.0.path().join("made");
    strata(&["cp", "kept:/made", target.to_str().unwrap()]).expect(0);
    assert!(target.join("volume").is_dir());

    // The image may be forgotten: the machine keeps to it.
    strata(&["image", "rm", "test"]).expect(0);
    strata(&["stop", "kept"]).expect(0);
    strata(&["image", "gc"]).expect(0);
    let ended = strata(&["ps", "-a"]).expect(0).text();
    assert!(ended.contains("exited (130)"), "{ended}");

    strata(&["start", "kept"]).expect(0);
    let target = store.0.path().join("again");
    strata(&["cp", "kept:/written", target.to_str().unwrap()]).expect(0);
    assert_eq!(fs::read_to_string(target).unwrap(), "made\n");
    strata(&["rm", "-f", "kept"]).expect(0);
    let removed = strata(&["image", "gc"]).expect(0).text();
    assert!(!removed.starts_with("0 files"), "{removed}");
}

#[test]
fn a_shared_folder_is_in_the_image_before_its_command_or_init_starts() {
    let directory = tempfile::tempdir().unwrap();
    compile("tell", &[], &directory.path().join("tell"));
    compile("init", &[], &directory.path().join("init"));
    let mut layer = base();
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::Symlink);
    header.set_size(0);
    let link = |layer: &mut Layer, header: &mut Header, from: &str, to: &str| {
        layer.0.append_link(header, from, to).unwrap();
    };
    link(&mut layer, &mut header, "sbin/init", "/own/init");
    // A link that leads elsewhere from outside of the image.
    link(&mut layer, &mut header, "var", "/real/var");
    let store = Store::new(
        &[layer.add("real/var/", 0o755, b"").bytes()],
        &json!({ "User": "me", "Cmd": ["/var/in/it/tell"] }),
    );
    let volume = |at: &str| format!("{}:{at}:ro", directory.path().display());

    let ended = store.run_with(&["-v", &volume("/var/in/it")], &[], b"x\n");
    let text = ended.expect(0).text();
    assert!(text.starts_with("1234:55 in /\n"), "{text}");
    assert!(text.ends_with("x\n"), "{text}");

    let file = directory.path().join("tell");
    let file = format!("{}:/var/in/it/tell:ro", file.display());
    let ended = store.run_with(&["-v", &file], &[], b"y\n");
    let text = ended.expect(0).text();
    assert!(text.ends_with("y\n"), "{text}");

    let options = ["--init", "image", "-v", &volume("/own")];
    let ended = store.run_with(&options, &[], b"").expect(0);
    let expected = "process 1, file there, appliance gone";
    assert!(ended.text().contains(expected), "{}", ended.text());
}
