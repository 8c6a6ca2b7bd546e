//! Writes images from the store to files that other tools read.
//!
//! Each layer's tar is put together again from its file system and its record, and is the one
//! that was pulled, byte for byte; so the image keeps its configuration and its ID. Layers are
//! not packed: their digests are then their diffIDs, and the same image is always the same files.

use std::fs;
use std::io::{self, Read, Write};
use std::path::Path;

use serde_json::{Value, json};
use tar::{Builder, Header};

use crate::oci::archive;
use crate::oci::digest::{Checked, Digest};
use crate::oci::error::Error;
use crate::oci::layout::{INDEX, REF_NAME};
use crate::oci::source::{FoundLayer, Name, Source};
use crate::oci::store::{Image, Layer, Store};

/// Writes `image` to an OCI layout, beside what is in it, or to a file as `docker save` does.
/// Hold a [`Lease`](crate::oci::Lease) meanwhile.
pub fn export(store: &Store, image: &Image, target: &Source) -> Result<(), Error> {
    let export = Export { store, image };
    match target {
        Source::Layout(directory, tag) => export.layout(directory, tag.as_deref()),
        Source::DockerArchive(file, name) => export.archive(file, name.as_ref()),
        Source::Registry(_) | Source::RootFs(_) => Err(Error::BadName {
            text: image.name.familiar(),
            reason: "an image is exported to oci:DIRECTORY or docker-archive:FILE".to_owned(),
        }),
    }
}

struct Export<'a> {
    store: &'a Store,
    image: &'a Image,
}

impl Export<'_> {
    fn layout(&self, directory: &Path, tag: Option<&str>) -> Result<(), Error> {
        let blobs = directory.join("blobs/sha256");
        fs::create_dir_all(&blobs).map_err(Error::io("create the directory", &blobs))?;
        let mut layers = Vec::new();
        for layer in &self.image.layers {
            let path = blobs.join(layer.diff_id.hex());
            let size = match fs::metadata(&path) {
                Ok(metadata) => metadata.len(),
                Err(_) => write(&path, |to| self.tar(layer, to))?,
            };
            layers.push(FoundLayer {
                digest: Some(layer.diff_id),
                size,
                diff_id: layer.diff_id,
                offset: 0,
            });
        }
        let config = self.store.blob(self.image.id)?;
        let manifest = archive::manifest(&config, &layers);
        for blob in [&config, &manifest] {
            let path = blobs.join(Digest::of(blob).hex());
            write(&path, |to| copy(blob, to, &path))?;
        }
        let path = directory.join("oci-layout");
        let version = br#"{"imageLayoutVersion":"1.0.0"}"#;
        write(&path, |to| copy(&version[..], to, &path))?;

        let path = directory.join(INDEX);
        let index = self.index(&path, &manifest, tag)?;
        write(&path, |to| copy(&index, to, &path))?;
        Ok(())
    }

    /// The layout's index, with this image in place of one that is called the same.
    fn index(&self, path: &Path, manifest: &[u8], tag: Option<&str>) -> Result<Vec<u8>, Error> {
        let name = tag.map_or_else(|| self.image.name.to_string(), str::to_owned);
        let mut index: Value = match fs::read(path) {
            Ok(text) => {
                serde_json::from_slice(&text).map_err(|error| Error::bad_document(INDEX, error))?
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                json!({ "schemaVersion": 2, "manifests": [] })
            }
            Err(error) => return Err(Error::io("read the file", path)(error)),
        };
        let others = index["manifests"].as_array_mut();
        let others = others.ok_or_else(|| Error::bad_document(INDEX, "it has no manifests"))?;
        others.retain(|other| other["annotations"][REF_NAME] != name.as_str());
        others.push(json!({
            "mediaType": archive::MANIFEST_TYPE,
            "digest": Digest::of(manifest).to_string(),
            "size": manifest.len(),
            "annotations": { REF_NAME: name },
            "platform": { "os": "linux", "architecture": "amd64" },
        }));
        Ok(index.to_string().into_bytes())
    }

    fn archive(&self, file: &Path, name: Option<&Name>) -> Result<(), Error> {
        let config = self.store.blob(self.image.id)?;
        let config_name = format!("{}.json", self.image.id.hex());
        let layer_name = |layer: &Layer| format!("{}.tar", layer.diff_id.hex());
        let layers: Vec<String> = self.image.layers.iter().map(layer_name).collect();
        let listed = json!([{
            "Config": config_name,
            "RepoTags": [name.unwrap_or(&self.image.name).familiar()],
            "Layers": layers,
        }]);
        let failed = |error| Error::io("write the file", file)(error);
        let add = |tar: &mut Builder<&mut dyn Write>, name: &str, size, data: &mut dyn Read| {
            let mut header = Header::new_gnu();
            header.set_mode(0o644);
            header.set_size(size);
            tar.append_data(&mut header, name, data).map_err(failed)
        };
        write(file, |to| {
            let mut tar = Builder::new(to);
            let mut done = Vec::new();
            for layer in &self.image.layers {
                if done.contains(&layer.diff_id) {
                    continue;
                }
                done.push(layer.diff_id);
                // once for its size, which comes first
                let size = self.tar(layer, &mut io::sink())?;
                self.store.tar(layer, |data| {
                    let mut data = Checked::new(data, "tar", Some(layer.diff_id), Some(size));
                    add(&mut tar, &layer_name(layer), size, &mut data)
                })?;
            }
            let listed = listed.to_string();
            for (name, text) in [
                (&*config_name, &*config),
                ("manifest.json", listed.as_bytes()),
            ] {
                add(&mut tar, name, text.len() as u64, &mut &*text)?;
            }
            tar.finish().map_err(failed)?;
            Ok(0)
        })?;
        Ok(())
    }

    /// Writes a layer's tar, and gives its size. What is not the layer that was pulled is an error.
    fn tar(&self, layer: &Layer, to: &mut dyn Write) -> Result<u64, Error> {
        self.store.tar(layer, |data| {
            let mut data = Checked::new(data, "tar", Some(layer.diff_id), None);
            io::copy(&mut data, to).map_err(Error::Data)
        })
    }
}

fn copy(mut from: &[u8], to: &mut dyn Write, path: &Path) -> Result<u64, Error> {
    io::copy(&mut from, to).map_err(Error::io("write the file", path))
}

/// Writes a file that is there wholly or not at all. Gives what `fill` gives.
fn write(
    path: &Path,
    fill: impl FnOnce(&mut dyn Write) -> Result<u64, Error>,
) -> Result<u64, Error> {
    let parent = path.parent().filter(|parent| *parent != Path::new(""));
    let mut file = tempfile::Builder::new()
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
        .tempfile_in(parent.unwrap_or(Path::new(".")))
        .map_err(Error::io("create the file", path))?;
    let filled = fill(&mut file)?;
    file.as_file()
        .sync_all()
        .map_err(Error::io("write the file", path))?;
    let kept = file.persist(path);
    kept.map_err(|error| Error::io("write the file", path)(error.error))?;
    Ok(filled)
}
