//! Images from files, and what is done with images that are here.

use std::fs::{self, File};
use std::process::Command;

use serde_json::json;
use strata_image::oci::Digest;

use crate::content::{Content, layer};
use crate::{User, said};

#[test]
fn a_layout_is_named_by_its_directory_and_tag() {
    let user = User::new();
    Content::small().write_layout(&user.home().join("Stuff"), "v2");
    assert_eq!(user.done(&["pull", "oci:Stuff:v2"]), "stuff:v2\n");
    assert_eq!(
        user.done(&["pull", "oci:Stuff", "--name", "x.example/y"]),
        "x.example/y:latest\n"
    );
    let err = user.refused(&["pull", "oci:Stuff:v3"]);
    assert!(err.contains("'v3'") && err.contains("v2"), "{err}");
}

#[test]
fn what_docker_saves_is_read() {
    let user = User::new();
    Content::small().write_layout(&user.home().join("layout"), "latest");
    let copy = Command::new("skopeo")
        .args(["--insecure-policy", "copy", "--quiet", "oci:layout"])
        .arg("docker-archive:saved.tar:some/thing:7")
        .current_dir(user.home())
        .output()
        .expect("skopeo is installed by 'cargo xtask test'");
    assert!(copy.status.success(), "{}", said(copy).err);

    assert_eq!(
        user.done(&["pull", "docker-archive:saved.tar"]),
        "some/thing:7\n"
    );
    user.done(&["pull", "docker-archive:saved.tar:some/thing:7"]);
    user.refused(&["pull", "docker-archive:saved.tar:other"]);
    assert_eq!(user.kept("layers").len(), 2);
}

#[test]
fn a_tar_of_a_root_file_system_is_an_image_with_a_shell() {
    let user = User::new();
    let tar = layer("etc/file", 5000);
    fs::write(user.home().join("root.tar"), &tar).unwrap();
    assert_eq!(user.done(&["pull", "rootfs:root.tar"]), "root:latest\n");
    assert_eq!(user.kept("layers"), [Digest::of(&tar).hex()]);
    assert!(user.done(&["inspect", "root"]).contains("/bin/sh"));
    fs::write(user.home().join("bad.tar"), "no tar at all").unwrap();
    user.refused(&["pull", "rootfs:bad.tar"]);
}

#[test]
fn damaged_layouts_are_refused() {
    let user = User::new();
    let content = Content::small();
    content.write_layout(&user.home().join("layout"), "1");
    let blobs = user.home().join("layout/blobs/sha256");
    let layer = blobs.join(&content.layers[1][7..]);
    let good = fs::read(&layer).unwrap();
    for bad in [&good[..good.len() - 1], &[&good[..], b"x"].concat(), b""] {
        fs::write(&layer, bad).unwrap();
        user.refused(&["pull", "oci:layout"]);
        assert!(user.kept("names").is_empty());
    }
    fs::write(&layer, good).unwrap();
    user.done(&["pull", "oci:layout"]);
}

#[test]
fn an_image_for_another_processor_is_refused() {
    let user = User::new();
    let mut content = Content::small();
    let (old, config) = content
        .blobs
        .iter()
        .find(|(_, blob)| blob.starts_with(b"{"))
        .unwrap();
    let config = String::from_utf8(config.clone())
        .unwrap()
        .replace("amd64", "arm64");
    let new = Digest::of(config.as_bytes()).to_string();
    let manifest = String::from_utf8(content.manifest.clone())
        .unwrap()
        .replace(old, &new);
    content.manifest = manifest.into_bytes();
    content.blobs.insert(new, config.into_bytes());
    content.write_layout(&user.home().join("layout"), "1");
    let err = user.refused(&["pull", "oci:layout"]);
    assert!(err.contains("arm64"), "{err}");
}

#[test]
fn removed_images_are_collected_but_for_what_others_need_or_a_machine_uses() {
    let user = User::new();
    let shared = (layer("shared", 5000), None);
    let own = (layer("own", 5000), None);
    let own_layer = Digest::of(&own.0).hex();
    let shared_layer = Digest::of(&shared.0).hex();
    Content::new(&[shared.clone(), own], &json!({})).write_layout(&user.home().join("a"), "1");
    Content::new(&[shared], &json!({})).write_layout(&user.home().join("b"), "1");
    user.done(&["pull", "oci:a"]);
    user.done(&["pull", "oci:b"]);

    user.done(&["rm", "a:1"]);
    assert_eq!(user.kept("layers").len(), 2);
    // as a machine locks its disks
    let path = user
        .home()
        .join("data/strata/images/layers")
        .join(&own_layer);
    let used = File::open(path).unwrap();
    used.lock_shared().unwrap();
    user.done(&["gc"]);
    assert_eq!(user.kept("layers").len(), 2);
    drop(used);
    user.done(&["gc"]);

    assert_eq!(user.kept("layers"), [shared_layer]);
    assert_eq!(user.kept("blobs").len(), 2);
    let err = user.refused(&["inspect", "a:1"]);
    assert!(err.contains("strata image ls"), "{err}");
}

#[test]
fn an_image_is_found_by_the_beginning_of_its_id() {
    let user = User::new();
    Content::small().write_layout(&user.home().join("a"), "1");
    user.done(&["pull", "oci:a"]);
    let list = user.done(&["ls", "--output", "json"]);
    let list: serde_json::Value = serde_json::from_str(&list).unwrap();
    let id = list[0]["id"].as_str().unwrap();
    for text in [id, &id[7..19], &id[7..11]] {
        assert!(user.done(&["inspect", text]).contains("a:1"), "{text}");
    }
    user.refused(&["inspect", &id[7..10]]);
}

#[test]
fn a_source_that_is_none_is_explained() {
    let err = User::new().refused(&["pull", "https://x/y"]);
    assert!(
        err.contains("docker://") && err.contains("rootfs:"),
        "{err}"
    );
}

#[test]
fn an_exported_image_is_the_one_that_was_pulled() {
    let user = User::new();
    let content = Content::small();
    content.write_layout(&user.home().join("a"), "1");
    user.done(&["pull", "oci:a"]);

    for target in [
        "oci:out:x",
        "oci:out:x",
        "oci:out:y",
        "docker-archive:out.tar:z",
    ] {
        user.done(&["export", "a:1", target]);
    }

    let id = |image: &str| -> String {
        let told = user.done(&["inspect", image, "--output", "json"]);
        let told: serde_json::Value = serde_json::from_str(&told).unwrap();
        told["id"].as_str().unwrap().to_owned()
    };
    for source in ["oci:out:x", "oci:out:y", "docker-archive:out.tar"] {
        let name = user.done(&["pull", source]);
        assert_eq!(id(name.trim()), id("a:1"), "{source}");
        let digest = Command::new("skopeo")
            .args(["--insecure-policy", "inspect", "--config", "--raw", source])
            .current_dir(user.home())
            .output()
            .expect("skopeo is installed by 'cargo xtask test'");
        assert_eq!(
            Digest::of(&digest.stdout).to_string(),
            id("a:1"),
            "{source}"
        );
    }
    let index = fs::read_to_string(user.home().join("out/index.json")).unwrap();
    assert_eq!(index.matches("ref.name").count(), 2, "{index}");
    // as they were before they were packed
    let tar = layer("a", 10_000);
    let exported = user
        .home()
        .join("out/blobs/sha256")
        .join(Digest::of(&tar).hex());
    assert!(fs::read(exported).unwrap() == tar);
    user.refused(&["export", "a:1", "rootfs:out"]);
}
