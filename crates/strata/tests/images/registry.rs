//! Pulls from registries.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use serde_json::json;
use strata_image::oci::Digest;

use crate::content::{Content, layer};
use crate::server::{Behaviour, Server};
use crate::{User, said};

fn pull(user: &User, server: &Server, tag: &str) -> String {
    user.done(&["pull", &format!("docker://{}/test:{tag}", server.host)])
}

#[test]
fn an_image_is_kept_under_its_name() {
    let content = Content::small();
    let server = Server::start(&content, Behaviour::default());
    let user = User::new();

    let name = pull(&user, &server, "1");

    assert_eq!(name, format!("{}/test:1\n", server.host));
    let list = user.done(&["ls"]);
    assert!(
        list.contains(name.trim()) && list.lines().count() == 2,
        "{list}"
    );
    assert_eq!(user.kept("layers").len(), 2);
    user.check_layers();
    let told = user.done(&["inspect", name.trim(), "--output", "json"]);
    let told: serde_json::Value = serde_json::from_str(&told).unwrap();
    assert_eq!(told["manifest"], Digest::of(&content.manifest).to_string());
    assert_eq!(told["config"]["config"]["Cmd"], json!(["/a"]));
}

#[test]
fn the_image_for_this_processor_is_chosen_from_an_index() {
    let content = Content::small();
    let server = Server::start(&content, Behaviour::default());
    let user = User::new();
    pull(&user, &server, "index");
    let list = user.done(&["ls", "--output", "json"]);
    assert!(list.contains(&Digest::of(&content.manifest).to_string()));
}

#[test]
fn a_digest_in_the_name_is_held_to() {
    let content = Content::small();
    let server = Server::start(&content, Behaviour::default());
    let user = User::new();
    let digest = Digest::of(&content.manifest);
    user.done(&["pull", &format!("{}/test@{digest}", server.host)]);
    let other = Digest::of(b"x");
    let err = user.refused(&["pull", &format!("{}/test@{other}", server.host)]);
    assert!(err.contains("there is no image"), "{err}");
}

#[test]
fn a_layer_that_is_here_is_not_fetched_again() {
    let shared = (layer("shared", 5000), None);
    let one = Content::new(std::slice::from_ref(&shared), &json!({}));
    let two = Content::new(&[shared, (layer("own", 5000), Some("zstd"))], &json!({}));
    let user = User::new();
    pull(&user, &Server::start(&one, Behaviour::default()), "1");
    let server = Server::start(&two, Behaviour::default());

    pull(&user, &server, "1");

    assert_eq!(server.requests(&two.layers[0]), 0);
    assert_eq!(server.requests(&two.layers[1]), 1);
    assert_eq!(user.kept("layers").len(), 2);
}

#[test]
fn a_broken_connection_is_taken_up_where_it_broke() {
    for ignores_ranges in [false, true] {
        let layers = [(layer("a", 300_000), Some("gzip"))];
        let content = Content::new(&layers, &json!({}));
        let behaviour = Behaviour {
            cut_after: (!ignores_ranges).then_some(100_000),
            ignores_ranges,
            ..Behaviour::default()
        };
        let server = Server::start(&content, behaviour);
        let user = User::new();
        if ignores_ranges {
            // as a pull that was killed leaves it
            let directory = user.home().join("data/strata/images/partial");
            fs::create_dir_all(&directory).unwrap();
            let diff_id = Digest::of(&layers[0].0).hex();
            let half = &content.blobs[&content.layers[0]][..150_000];
            fs::write(directory.join(format!("{diff_id}.download")), half).unwrap();
        }

        pull(&user, &server, "1");

        user.check_layers();
        let wanted = if ignores_ranges {
            "bytes=150000-"
        } else {
            "bytes=200000-"
        };
        assert_eq!(server.requests(wanted), 1);
    }
}

#[test]
fn what_is_not_what_was_promised_is_refused_and_not_kept() {
    let content = Content::small();
    let behaviour = Behaviour {
        damages: true,
        ..Behaviour::default()
    };
    let server = Server::start(&content, behaviour);
    let user = User::new();
    let err = user.refused(&["pull", &format!("{}/test:1", server.host)]);
    assert!(err.contains("digest"), "{err}");
    assert!(user.kept("layers").is_empty() && user.kept("names").is_empty());

    // the configuration names other tars than the layers are
    let mut content = Content::small();
    let (digest, config) = content
        .blobs
        .iter()
        .find(|(_, blob)| blob.starts_with(b"{"))
        .unwrap();
    let diff_id = Digest::of(b"other").to_string();
    let text = String::from_utf8(config.clone()).unwrap();
    let at = text.find("sha256:").unwrap();
    let text = text.replace(&text[at..at + 71], &diff_id).into_bytes();
    let manifest = String::from_utf8(content.manifest.clone()).unwrap();
    let new_digest = Digest::of(&text).to_string();
    content.manifest = manifest.replace(digest, &new_digest).into_bytes();
    content.blobs.insert(new_digest, text);
    let server = Server::start(&content, Behaviour::default());
    let err = user.refused(&["pull", &format!("{}/test:1", server.host)]);
    assert!(err.contains("tar in the layer is damaged"), "{err}");
    assert!(user.kept("names").is_empty());
}

#[test]
fn several_pulls_at_once_fetch_each_layer_once() {
    let layers = [
        (layer("a", 2_000_000), Some("gzip")),
        (layer("bb", 2_000_000), None),
    ];
    let content = Content::new(&layers, &json!({}));
    let server = Server::start(&content, Behaviour::default());
    let user = User::new();
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| pull(&user, &server, "1"));
        }
    });
    for digest in &content.layers {
        assert_eq!(server.requests(digest), 1);
    }
    user.check_layers();
}

#[test]
fn a_pull_that_is_killed_at_any_moment_breaks_nothing() {
    let layers = [
        (layer("a", 4_000_000), Some("gzip")),
        (layer("bb", 4_000_000), None),
    ];
    let content = Content::new(&layers, &json!({}));
    let server = Server::start(&content, Behaviour::default());
    let user = User::new();
    let source = format!("{}/test:1", server.host);
    for moment in (0..200).step_by(15) {
        let mut child = user
            .command(&["pull", &source])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        thread::sleep(Duration::from_millis(moment));
        child.kill().unwrap();
        child.wait().unwrap();
        // All that has a name is whole.
        user.check_layers();
        for image in user.done(&["ls"]).lines().skip(1) {
            user.done(&["inspect", image.split(' ').next().unwrap()]);
        }
    }
    user.done(&["pull", &source]);
    user.check_layers();
    user.done(&["gc"]);
    assert!(user.kept("partial").is_empty());
    assert_eq!(user.kept("layers").len(), 2);
}

#[test]
fn tokens_are_asked_for_as_the_registry_says() {
    let content = Content::small();
    let behaviour = Behaviour {
        challenge: Some(r#"Bearer realm="http://{host}/token",service="here""#),
        authorization: "Bearer T",
        ..Behaviour::default()
    };
    let server = Server::start(&content, behaviour);
    pull(&User::new(), &server, "1");
    assert_eq!(server.requests("/token"), 1);
}

#[test]
fn credentials_of_docker_login_are_used() {
    // "me:secret"
    let basic = "Basic bWU6c2VjcmV0";
    let content = Content::small();
    for behaviour in [
        Behaviour {
            challenge: Some("Basic realm=\"x\""),
            authorization: basic,
            ..Behaviour::default()
        },
        Behaviour {
            challenge: Some("Bearer service=here,realm=\"http://{host}/token\""),
            authorization: "Bearer T",
            token_authorization: Some(basic),
            ..Behaviour::default()
        },
    ] {
        let server = Server::start(&content, behaviour);
        let user = User::new();
        let err = user.refused(&["pull", &format!("{}/test:1", server.host)]);
        assert!(err.contains("docker login"), "{err}");
        let config = json!({ "auths": { server.host.clone(): { "auth": &basic[6..] } } });
        fs::write(user.home().join("config.json"), config.to_string()).unwrap();
        pull(&user, &server, "1");
    }
}

#[test]
fn a_registry_that_is_not_there_is_named() {
    let gone = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let err = User::new().refused(&["pull", &format!("docker://{gone}/test")]);
    assert!(
        err.contains(&format!("the registry {gone} cannot be reached")),
        "{err}"
    );
}

/// Debian's docker-registry, until dropped.
struct DockerRegistry {
    process: Child,
    host: String,
    _directory: tempfile::TempDir,
}

impl DockerRegistry {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let config = directory.path().join("config.yml");
        let root = directory.path().join("data");
        let text = format!(
            "version: 0.1\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n\
             http: {{addr: 127.0.0.1:0}}\nlog: {{level: info}}\n",
            root.display()
        );
        fs::write(&config, text).unwrap();
        let mut process = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .env("OTEL_TRACES_EXPORTER", "none")
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("docker-registry is installed by 'cargo xtask test'");
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let host = lines
            .by_ref()
            .find_map(|line| {
                let line = line.unwrap();
                let (_, rest) = line.split_once("listening on ")?;
                Some(rest.split(['"', ' ', ',']).next()?.to_owned())
            })
            .expect("it says where it listens");
        // It must be able to go on writing.
        thread::spawn(move || lines.for_each(drop));
        Self {
            process,
            host,
            _directory: directory,
        }
    }
}

impl Drop for DockerRegistry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn images_come_from_debians_registry_as_skopeo_put_them_there() {
    let registry = DockerRegistry::start();
    let user = User::new();
    let content = Content::small();
    content.write_layout(&user.home().join("layout"), "latest");
    for (tag, options) in [
        ("oci", &["--format", "oci"][..]),
        ("docker", &["--format", "v2s2"]),
        (
            "zstd",
            &[
                "--format",
                "oci",
                "--dest-compress-format",
                "zstd",
                "--dest-compress",
            ],
        ),
    ] {
        let copy = Command::new("skopeo")
            .args([
                "--insecure-policy",
                "copy",
                "--quiet",
                "--dest-tls-verify=false",
            ])
            .args(options)
            .arg("oci:layout")
            .arg(format!("docker://{}/some/test:{tag}", registry.host))
            .current_dir(user.home())
            .output()
            .expect("skopeo is installed by 'cargo xtask test'");
        assert!(copy.status.success(), "{}", said(copy).err);

        user.done(&[
            "pull",
            &format!("docker://{}/some/test:{tag}", registry.host),
        ]);
    }
    // one and the same, however it was packed on the way
    assert_eq!(user.kept("layers").len(), 2);
    user.check_layers();
}
