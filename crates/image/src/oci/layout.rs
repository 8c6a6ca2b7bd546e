//! Images in an OCI image layout: a directory with `index.json` and blobs by digest.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use oci_spec::image::{Descriptor, ImageIndex};

use crate::oci::digest::Digest;
use crate::oci::error::Error;
use crate::oci::source::{self, Found, FoundLayer, Name, Origin};

/// What a manifest of the index is called (OCI image specification, "Annotations").
pub(crate) const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// The file that lists a layout's images.
pub(crate) const INDEX: &str = "index.json";

/// Largest manifest or configuration, bytes.
pub(crate) const MAX_DOCUMENT: u64 = 8 << 20;

/// One image of a layout.
pub(crate) struct OciLayout {
    directory: PathBuf,
    found: Found,
}

impl OciLayout {
    pub(crate) fn open(directory: &Path, tag: Option<&str>) -> Result<Self, Error> {
        let index_path = directory.join(INDEX);
        let index = fs::read(&index_path).map_err(Error::io("read the file", &index_path))?;
        let index: ImageIndex =
            serde_json::from_slice(&index).map_err(|error| Error::bad_document("index", error))?;
        let chosen = choose(index.manifests(), tag).ok_or_else(|| Error::NotFound {
            what: tag.map_or("single image".to_owned(), |tag| format!("image '{tag}'")),
            place: format!(
                "in {}; it has {}",
                directory.display(),
                tags(index.manifests())
            ),
        })?;
        let mut manifest = document(directory, source::digest(chosen.digest())?)?;
        if source::is_index(&manifest) {
            manifest = document(directory, source::choose(&manifest)?)?;
        }
        let config = source::parse_manifest(&manifest)?;
        let config = document(directory, source::digest(config.config().digest())?)?;
        Ok(Self {
            directory: directory.to_owned(),
            found: Found::new(name(directory, chosen), manifest, config)?,
        })
    }
}

impl Origin for OciLayout {
    fn found(&self) -> &Found {
        &self.found
    }

    fn layer(&self, layer: &FoundLayer, offset: u64) -> Result<Box<dyn Read + Send + '_>, Error> {
        let path = blob(&self.directory, layer.digest.unwrap_or(layer.diff_id));
        let mut file = File::open(&path).map_err(Error::io("open the file", &path))?;
        file.seek(SeekFrom::Start(offset)).map_err(Error::Data)?;
        Ok(Box::new(file))
    }
}

/// The manifest that is called so, or the only one.
fn choose<'a>(manifests: &'a [Descriptor], tag: Option<&str>) -> Option<&'a Descriptor> {
    match (tag, manifests) {
        (None, [only]) => Some(only),
        (None, _) => None,
        (Some(tag), _) => manifests.iter().find(|m| ref_name(m) == Some(tag)),
    }
}

fn ref_name(manifest: &Descriptor) -> Option<&str> {
    let annotations = manifest.annotations().as_ref()?;
    annotations.get(REF_NAME).map(String::as_str)
}

fn tags(manifests: &[Descriptor]) -> String {
    let names: Vec<&str> = manifests.iter().filter_map(ref_name).collect();
    match &*names {
        [] => "none with a name".to_owned(),
        names => names.join(", "),
    }
}

/// A whole reference where there is one, else the directory's name with the tag.
fn name(directory: &Path, manifest: &Descriptor) -> Option<Name> {
    let directory = directory.file_name()?.to_str()?.to_lowercase();
    match ref_name(manifest) {
        Some(text) if text.contains(['/', ':']) => text.parse().ok(),
        Some(tag) => format!("{directory}:{tag}").parse().ok(),
        None => directory.parse().ok(),
    }
}

fn blob(directory: &Path, digest: Digest) -> PathBuf {
    directory.join("blobs/sha256").join(digest.hex())
}

fn document(directory: &Path, digest: Digest) -> Result<Vec<u8>, Error> {
    let path = blob(directory, digest);
    let file = File::open(&path).map_err(Error::io("open the file", &path))?;
    let mut text = Vec::new();
    file.take(MAX_DOCUMENT)
        .read_to_end(&mut text)
        .map_err(Error::io("read the file", &path))?;
    if Digest::of(&text) != digest {
        return Err(Error::BadImage(format!("{} is damaged", path.display())));
    }
    Ok(text)
}
