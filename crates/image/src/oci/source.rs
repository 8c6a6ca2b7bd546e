//! Where images come from, and what they are called.

use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use oci_spec::distribution::Reference;
use oci_spec::image::{Arch, ImageConfiguration, ImageIndex, ImageManifest, Os};

use crate::oci::archive::{DockerArchive, RootFs};
use crate::oci::digest::Digest;
use crate::oci::error::Error;
use crate::oci::layout::OciLayout;
use crate::oci::registry::Registry;

/// The name of an image in the store, which is what Docker would call it: `debian` is
/// `docker.io/library/debian:latest`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name(Reference);

impl Name {
    /// The name as it is usually written: `debian:latest`.
    pub fn familiar(&self) -> String {
        let whole = self.to_string();
        let short = whole.strip_prefix("docker.io/").unwrap_or(&whole);
        short.strip_prefix("library/").unwrap_or(short).to_owned()
    }

    pub(crate) fn reference(&self) -> &Reference {
        &self.0
    }
}

impl FromStr for Name {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        text.parse().map(Self).map_err(|error| Error::BadName {
            text: text.to_owned(),
            reason: format!("{error}"),
        })
    }
}

impl fmt::Display for Name {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, formatter)
    }
}

/// Where an image is to be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// `docker://HOST/PATH:TAG`: a registry.
    Registry(Name),
    /// `oci:DIRECTORY[:TAG]`: an OCI image layout.
    Layout(PathBuf, Option<String>),
    /// `docker-archive:FILE[:NAME]`: what `docker save` writes.
    DockerArchive(PathBuf, Option<Name>),
    /// `rootfs:FILE`: a tar of a root file system, which may be compressed.
    RootFs(PathBuf),
}

impl FromStr for Source {
    type Err = Error;

    /// Reads a source as skopeo and podman write it. Without a transport it is a registry's.
    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = |reason: &str| Error::BadName {
            text: text.to_owned(),
            reason: reason.to_owned(),
        };
        // A file that is there is meant as it is; else what is after a colon is a tag or a name.
        let split = |rest: &str| match rest.split_once(':') {
            Some((file, tag)) if !Path::new(rest).exists() => {
                (PathBuf::from(file), Some(tag.to_owned()))
            }
            _ => (PathBuf::from(rest), None),
        };
        if let Some(name) = text.strip_prefix("docker://") {
            return Ok(Self::Registry(name.parse()?));
        }
        let Some((transport, rest)) = text.split_once(':') else {
            return Ok(Self::Registry(text.parse()?));
        };
        let known = ["oci", "docker-archive", "rootfs"].contains(&transport);
        if known && rest.is_empty() {
            return Err(bad("there is no file in it"));
        }
        Ok(match transport {
            "oci" => {
                let (directory, tag) = split(rest);
                Self::Layout(directory, tag)
            }
            "docker-archive" => {
                let (file, name) = split(rest);
                Self::DockerArchive(file, name.map(|name| name.parse()).transpose()?)
            }
            "rootfs" => Self::RootFs(rest.into()),
            _ if rest.starts_with("//") => return Err(bad("there is no such transport")),
            _ => Self::Registry(text.parse()?),
        })
    }
}

impl Source {
    pub(crate) fn open(&self) -> Result<Box<dyn Origin>, Error> {
        Ok(match self {
            Self::Registry(name) => Box::new(Registry::open(name)?),
            Self::Layout(directory, tag) => Box::new(OciLayout::open(directory, tag.as_deref())?),
            Self::DockerArchive(file, name) => Box::new(DockerArchive::open(file, name.as_ref())?),
            Self::RootFs(file) => Box::new(RootFs::open(file)?),
        })
    }
}

/// An image at its source.
pub(crate) trait Origin: Sync {
    /// Its documents.
    fn found(&self) -> &Found;

    /// The bytes of a layer, from `offset` on.
    fn layer(&self, layer: &FoundLayer, offset: u64) -> Result<Box<dyn Read + Send + '_>, Error>;

    /// Whether reading a layer is so slow that what was read is worth keeping.
    fn is_remote(&self) -> bool {
        false
    }
}

/// The documents of an image, as they came.
#[derive(Debug)]
pub(crate) struct Found {
    /// What it is called at its source, if it is called anything.
    pub(crate) name: Option<Name>,
    pub(crate) manifest: Vec<u8>,
    pub(crate) config: Vec<u8>,
    pub(crate) layers: Vec<FoundLayer>,
}

/// A layer at its source.
#[derive(Debug, Clone)]
pub(crate) struct FoundLayer {
    /// Digest of the bytes there, where it is known.
    pub(crate) digest: Option<Digest>,
    /// Size of the bytes there.
    pub(crate) size: u64,
    /// Digest of its tar.
    pub(crate) diff_id: Digest,
    /// Where the bytes are in a file, if they are not found by their digest.
    pub(crate) offset: u64,
}

impl Found {
    /// Puts together what a manifest and a configuration say of the layers.
    pub(crate) fn new(
        name: Option<Name>,
        manifest: Vec<u8>,
        config: Vec<u8>,
    ) -> Result<Self, Error> {
        let parsed = parse_manifest(&manifest)?;
        let diff_ids = diff_ids(&config)?;
        if parsed.layers().len() != diff_ids.len() {
            return Err(Error::BadImage(format!(
                "its manifest has {} layers and its configuration {}",
                parsed.layers().len(),
                diff_ids.len()
            )));
        }
        let layers = parsed
            .layers()
            .iter()
            .zip(diff_ids)
            .map(|(layer, diff_id)| {
                Ok(FoundLayer {
                    digest: Some(digest(layer.digest())?),
                    size: layer.size(),
                    diff_id,
                    offset: 0,
                })
            });
        let layers = layers.collect::<Result<_, Error>>()?;
        Ok(Self {
            name,
            manifest,
            config,
            layers,
        })
    }
}

pub(crate) fn digest(digest: &oci_spec::image::Digest) -> Result<Digest, Error> {
    digest.as_ref().parse().map_err(Error::BadImage)
}

pub(crate) fn parse_manifest(text: &[u8]) -> Result<ImageManifest, Error> {
    serde_json::from_slice(text).map_err(|error| Error::bad_document("manifest", error))
}

/// Reads a configuration, and refuses one that is not for the guests there are.
pub(crate) fn parse_config(text: &[u8]) -> Result<ImageConfiguration, Error> {
    let config: ImageConfiguration = serde_json::from_slice(text)
        .map_err(|error| Error::bad_document("configuration", error))?;
    if (config.os(), config.architecture()) != (&Os::Linux, &Arch::Amd64) {
        return Err(Error::BadImage(format!(
            "it is for {}/{}, and guests are linux/amd64",
            config.os(),
            config.architecture()
        )));
    }
    Ok(config)
}

/// The digests of the layers' tars, the lowest first.
pub(crate) fn diff_ids(config: &[u8]) -> Result<Vec<Digest>, Error> {
    let config = parse_config(config)?;
    let ids = config.rootfs().diff_ids().iter();
    ids.map(|id| id.parse().map_err(Error::BadImage)).collect()
}

/// The digest of the manifest for linux/amd64 that an index names.
pub(crate) fn choose(index: &[u8]) -> Result<Digest, Error> {
    let index: ImageIndex =
        serde_json::from_slice(index).map_err(|error| Error::bad_document("index", error))?;
    let fits = index.manifests().iter().find(|manifest| {
        let platform = manifest.platform().as_ref();
        platform.is_none_or(|p| (p.os(), p.architecture()) == (&Os::Linux, &Arch::Amd64))
    });
    let fits = fits.ok_or_else(|| Error::BadImage("there is none for linux/amd64".to_owned()))?;
    digest(fits.digest())
}

/// Whether a document is an index of manifests rather than one.
pub(crate) fn is_index(text: &[u8]) -> bool {
    #[derive(serde::Deserialize)]
    struct Shape {
        manifests: Option<serde::de::IgnoredAny>,
    }
    serde_json::from_slice(text).is_ok_and(|shape: Shape| shape.manifests.is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_dockers() {
        for (text, whole, short) in [
            ("debian", "docker.io/library/debian:latest", "debian:latest"),
            ("me/app:1", "docker.io/me/app:1", "me/app:1"),
            (
                "localhost:5000/a/b",
                "localhost:5000/a/b:latest",
                "localhost:5000/a/b:latest",
            ),
            ("ghcr.io/x/y:z", "ghcr.io/x/y:z", "ghcr.io/x/y:z"),
        ] {
            let name: Name = text.parse().unwrap();
            assert_eq!((&*name.to_string(), &*name.familiar()), (whole, short));
            assert_eq!(name.familiar().parse::<Name>().unwrap(), name);
        }
        let pinned = format!("debian@sha256:{}", "a".repeat(64));
        assert_eq!(pinned.parse::<Name>().unwrap().familiar(), pinned);
        for text in ["", "Debian", "a b", "a:", "-", "a@sha256:1"] {
            assert!(text.parse::<Name>().is_err(), "{text}");
        }
    }

    #[test]
    fn sources_are_skopeos() {
        let registry = |name: &str| Source::Registry(name.parse().unwrap());
        let some = |text: &str| Some(text.to_owned());
        for (text, source) in [
            ("docker://debian:bookworm", registry("debian:bookworm")),
            ("debian:bookworm", registry("debian:bookworm")),
            ("localhost:5000/a", registry("localhost:5000/a")),
            ("oci:dir:tag", Source::Layout("dir".into(), some("tag"))),
            ("oci:dir", Source::Layout("dir".into(), None)),
            (
                "docker-archive:a.tar",
                Source::DockerArchive("a.tar".into(), None),
            ),
            (
                "docker-archive:a.tar:x:1",
                Source::DockerArchive("a.tar".into(), Some("x:1".parse().unwrap())),
            ),
            ("rootfs:a:b.tar", Source::RootFs("a:b.tar".into())),
        ] {
            assert_eq!(text.parse::<Source>().unwrap(), source, "{text}");
        }
        for text in ["", "oci:", "rootfs:", "https://x/y", "docker://"] {
            assert!(text.parse::<Source>().is_err(), "{text}");
        }
    }
}
