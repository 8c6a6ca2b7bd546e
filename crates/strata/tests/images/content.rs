//! Images for the tests, as blobs.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use strata_image::oci::Digest;
use tar::{Builder, Header};

/// An image in the making.
#[derive(Clone)]
pub(crate) struct Content {
    /// By digest.
    pub(crate) blobs: BTreeMap<String, Vec<u8>>,
    pub(crate) manifest: Vec<u8>,
    /// Digests of the layers as they are stored.
    pub(crate) layers: Vec<String>,
}

/// A layer of one file, with `size` bytes that compress badly.
pub(crate) fn layer(file: &str, size: usize) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    let mut header = Header::new_gnu();
    header.set_mode(0o644);
    header.set_size(size as u64);
    let mut random = 0x9e37_79b9_7f4a_7c15_u64 ^ file.len() as u64;
    let data: Vec<u8> = (0..size)
        .map(|_| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random as u8
        })
        .collect();
    builder.append_data(&mut header, file, &*data).unwrap();
    builder.into_inner().unwrap()
}

impl Content {
    /// An image of these layers, each packed by a program or, with none, as it is.
    pub(crate) fn new(layers: &[(Vec<u8>, Option<&str>)], config: &Value) -> Self {
        let mut blobs = BTreeMap::new();
        let mut described = Vec::new();
        let mut diff_ids = Vec::new();
        let mut digests = Vec::new();
        for (tar, packer) in layers {
            diff_ids.push(Digest::of(tar).to_string());
            let stored = packer.map_or_else(|| tar.clone(), |packer| packed(packer, tar));
            let digest = Digest::of(&stored).to_string();
            let suffix = packer.map_or(String::new(), |packer| format!("+{packer}"));
            described.push(json!({
                "mediaType": format!("application/vnd.oci.image.layer.v1.tar{suffix}"),
                "digest": digest,
                "size": stored.len(),
            }));
            blobs.insert(digest.clone(), stored);
            digests.push(digest);
        }
        let config = json!({
            "architecture": "amd64",
            "os": "linux",
            "config": config,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = config.to_string().into_bytes();
        let config_digest = Digest::of(&config).to_string();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": config_digest,
                "size": config.len(),
            },
            "layers": described,
        });
        blobs.insert(config_digest, config);
        Self {
            blobs,
            manifest: manifest.to_string().into_bytes(),
            layers: digests,
        }
    }

    /// A small image of two layers, one of them packed.
    pub(crate) fn small() -> Self {
        let layers = [
            (layer("a", 10_000), Some("gzip")),
            (layer("bb", 5_000), None),
        ];
        Self::new(&layers, &json!({ "Cmd": ["/a"], "Volumes": null }))
    }

    /// An index with this image for linux/amd64 and another that nobody has.
    pub(crate) fn index(&self) -> Vec<u8> {
        let one = |architecture: &str, manifest: &[u8]| {
            json!({
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "digest": Digest::of(manifest).to_string(),
                "size": manifest.len(),
                "platform": { "os": "linux", "architecture": architecture },
            })
        };
        let manifests = [one("arm64", b"missing"), one("amd64", &self.manifest)];
        let index = json!({ "schemaVersion": 2, "manifests": manifests });
        index.to_string().into_bytes()
    }

    /// Writes it as an OCI image layout.
    pub(crate) fn write_layout(&self, directory: &Path, tag: &str) {
        let blobs = directory.join("blobs/sha256");
        fs::create_dir_all(&blobs).unwrap();
        let manifest = Digest::of(&self.manifest);
        fs::write(blobs.join(manifest.hex()), &self.manifest).unwrap();
        for (digest, blob) in &self.blobs {
            fs::write(blobs.join(&digest["sha256:".len()..]), blob).unwrap();
        }
        let index = json!({
            "schemaVersion": 2,
            "manifests": [{
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "digest": manifest.to_string(),
                "size": self.manifest.len(),
                "annotations": { "org.opencontainers.image.ref.name": tag },
            }],
        });
        fs::write(directory.join("index.json"), index.to_string()).unwrap();
        fs::write(
            directory.join("oci-layout"),
            r#"{"imageLayoutVersion":"1.0.0"}"#,
        )
        .unwrap();
    }
}

fn packed(program: &str, data: &[u8]) -> Vec<u8> {
    let mut child = Command::new(program)
        .arg("-c")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    let data = data.to_vec();
    let writer = std::thread::spawn(move || input.write_all(&data).unwrap());
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    output.stdout
}
