//! Images in tar files: what `docker save` writes, and plain root file systems.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::json;

use crate::oci::digest::{Checked, Digest};
use crate::oci::error::Error;
use crate::oci::layout::MAX_DOCUMENT;
use crate::oci::source::{self, Found, FoundLayer, Name, Origin};
use crate::oci::unpack::unpack;

pub(crate) const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG_TYPE: &str = "application/vnd.oci.image.config.v1+json";
const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar";

/// What a machine does with an image that says nothing of it.
const DEFAULT_COMMAND: &str = "/bin/sh";

/// One image of a file that `docker save` wrote.
pub(crate) struct DockerArchive {
    file: PathBuf,
    found: Found,
}

/// An image in the archive's `manifest.json`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Listed {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// Where a member of the archive is.
#[derive(Debug, Clone)]
enum Member {
    At { offset: u64, size: u64 },
    Link(String),
}

impl DockerArchive {
    pub(crate) fn open(path: &Path, name: Option<&Name>) -> Result<Self, Error> {
        let members = members(path).map_err(Error::io("read the archive", path))?;
        let read = |name: &str| read_member(path, &members, name);
        let listed: Vec<Listed> = serde_json::from_slice(&read("manifest.json")?)
            .map_err(|error| Error::bad_document("manifest.json", error))?;
        let names = |listed: &Listed| -> Vec<Name> {
            let tags = listed.repo_tags.iter().flatten();
            tags.filter_map(|tag| tag.parse().ok()).collect()
        };
        let chosen = match (name, &*listed) {
            (None, [only]) => Some(only),
            (None, _) => None,
            (Some(name), all) => all.iter().find(|listed| names(listed).contains(name)),
        };
        let chosen = chosen.ok_or_else(|| Error::NotFound {
            what: name.map_or("single image".to_owned(), |name| format!("image '{name}'")),
            place: format!("in {}, which has {}", path.display(), listed.len()),
        })?;

        let config = read(&chosen.config)?;
        let diff_ids = source::diff_ids(&config)?;
        if diff_ids.len() != chosen.layers.len() {
            return Err(Error::BadImage("its lists of layers differ".to_owned()));
        }
        let mut layers = Vec::new();
        for (layer, diff_id) in chosen.layers.iter().zip(diff_ids) {
            let (offset, size) = find(&members, layer).ok_or_else(|| missing(path, layer))?;
            layers.push(FoundLayer {
                digest: None,
                size,
                diff_id,
                offset,
            });
        }
        let manifest = manifest(&config, &layers);
        Ok(Self {
            file: path.to_owned(),
            found: Found {
                name: name.cloned().or_else(|| names(chosen).into_iter().next()),
                manifest,
                config,
                layers,
            },
        })
    }
}

impl Origin for DockerArchive {
    fn found(&self) -> &Found {
        &self.found
    }

    fn layer(&self, layer: &FoundLayer, offset: u64) -> Result<Box<dyn Read + Send + '_>, Error> {
        let file = part(&self.file, layer.offset + offset, layer.size - offset)?;
        Ok(Box::new(file))
    }
}

/// A tar of a root file system.
pub(crate) struct RootFs {
    file: PathBuf,
    found: Found,
}

impl RootFs {
    /// Reads the whole file once, for its digest.
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let io = |error| Error::io("read the file", path)(error);
        let file = File::open(path).map_err(io)?;
        let size = file.metadata().map_err(io)?.len();
        let tar = unpack(file).map_err(io)?;
        let diff_id = Checked::new(tar, "tar", None, None).finish().map_err(io)?;
        let layer = FoundLayer {
            digest: None,
            size,
            diff_id,
            offset: 0,
        };
        let config = json!({
            "architecture": "amd64",
            "os": "linux",
            "config": { "Cmd": [DEFAULT_COMMAND] },
            "rootfs": { "type": "layers", "diff_ids": [diff_id.to_string()] },
        });
        let config = config.to_string().into_bytes();
        let stem = path.file_name().and_then(|name| name.to_str());
        let stem = stem.and_then(|name| name.split('.').next());
        Ok(Self {
            file: path.to_owned(),
            found: Found {
                name: stem.and_then(|stem| stem.to_lowercase().parse().ok()),
                manifest: manifest(&config, std::slice::from_ref(&layer)),
                config,
                layers: vec![layer],
            },
        })
    }
}

impl Origin for RootFs {
    fn found(&self) -> &Found {
        &self.found
    }

    fn layer(&self, layer: &FoundLayer, offset: u64) -> Result<Box<dyn Read + Send + '_>, Error> {
        Ok(Box::new(part(&self.file, offset, layer.size - offset)?))
    }
}

/// A manifest for an image that came without one. Its layers are named by their tars' digests.
pub(crate) fn manifest(config: &[u8], layers: &[FoundLayer]) -> Vec<u8> {
    let layers: Vec<_> = layers
        .iter()
        .map(|layer| {
            let digest = layer.diff_id.to_string();
            json!({ "mediaType": LAYER_TYPE, "digest": digest, "size": layer.size })
        })
        .collect();
    let digest = Digest::of(config).to_string();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": { "mediaType": CONFIG_TYPE, "digest": digest, "size": config.len() },
        "layers": layers,
    });
    manifest.to_string().into_bytes()
}

fn members(path: &Path) -> std::io::Result<HashMap<String, Member>> {
    let mut members = HashMap::new();
    let mut archive = tar::Archive::new(File::open(path)?);
    for entry in archive.entries_with_seek()? {
        let entry = entry?;
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let member = match entry.link_name_bytes() {
            Some(target) if !target.is_empty() => {
                let target = String::from_utf8_lossy(&target).into_owned();
                let is_symlink = entry.header().entry_type().is_symlink();
                Member::Link(if is_symlink {
                    beside(&name, &target)
                } else {
                    target
                })
            }
            _ => Member::At {
                offset: entry.raw_file_position(),
                size: entry.size(),
            },
        };
        members.insert(name, member);
    }
    Ok(members)
}

/// The member that a symbolic link at `name` leads to.
fn beside(name: &str, target: &str) -> String {
    let mut names: Vec<&str> = name.split('/').collect();
    names.pop();
    for part in target.split('/') {
        match part {
            ".." => drop(names.pop()),
            "." | "" => {}
            part => names.push(part),
        }
    }
    names.join("/")
}

fn find(members: &HashMap<String, Member>, name: &str) -> Option<(u64, u64)> {
    match members.get(name)? {
        Member::At { offset, size } => Some((*offset, *size)),
        // one step, as Docker makes them
        Member::Link(target) => match members.get(target)? {
            Member::At { offset, size } => Some((*offset, *size)),
            Member::Link(_) => None,
        },
    }
}

fn read_member(
    path: &Path,
    members: &HashMap<String, Member>,
    name: &str,
) -> Result<Vec<u8>, Error> {
    let (offset, size) = find(members, name).ok_or_else(|| missing(path, name))?;
    let mut text = Vec::new();
    part(path, offset, size.min(MAX_DOCUMENT))?
        .read_to_end(&mut text)
        .map_err(Error::io("read the archive", path))?;
    Ok(text)
}

fn missing(path: &Path, member: &str) -> Error {
    Error::NotFound {
        what: format!("'{}'", member.escape_debug()),
        place: format!("in {}, so 'docker save' has not written it", path.display()),
    }
}

fn part(path: &Path, offset: u64, size: u64) -> Result<std::io::Take<File>, Error> {
    let mut file = File::open(path).map_err(Error::io("open the file", path))?;
    file.seek(SeekFrom::Start(offset)).map_err(Error::Data)?;
    Ok(file.take(size))
}
