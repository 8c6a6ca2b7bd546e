//! Where images are kept: `$XDG_DATA_HOME/strata/images`, else `~/.local/share/strata/images`.
//!
//! ```text
//! lock               shared by pulls and by machines that are being started; gc takes it alone
//! blobs/<digest>     manifests and configurations, as they came
//! layers/<diffID>    layers, as EROFS file systems
//! tars/<diffID>      for each layer what its tar has beside contents, packed with gzip
//! names/<digest>     one for each name, called by the name's digest: which manifest it means
//! scratch/<recipe>   templates of the disks for what machines write
//! partial/           what is being pulled, and a lock for each layer
//! ```
//!
//! Whatever is outside `partial` is complete: it got its name when it had been written and
//! synced. So a process may be killed at any moment, and any number may work at once.

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, BufReader, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use flate2::read::GzDecoder;
use oci_spec::image::ImageConfiguration;
use serde::{Deserialize, Serialize};
use strata_erofs::Replay;

use crate::oci::digest::Digest;
use crate::oci::error::Error;
use crate::oci::scratch;
use crate::oci::source::{self, Name};

const DIRECTORIES: [&str; 6] = ["blobs", "layers", "tars", "names", "scratch", "partial"];

/// Fewest digits that are taken for the beginning of an ID.
const MIN_ID_DIGITS: usize = 4;

/// The user's images.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

/// While it lives, nothing is removed from the store.
#[derive(Debug)]
pub struct Lease {
    _lock: File,
}

/// An image that is complete in the store.
#[derive(Debug, Clone)]
pub struct Image {
    /// What it is called.
    pub name: Name,
    /// Digest of its configuration, which is what Docker calls an image's ID.
    pub id: Digest,
    /// Digest of its manifest.
    pub manifest: Digest,
    /// Its configuration.
    pub config: ImageConfiguration,
    /// Its layers, the lowest first.
    pub layers: Vec<Layer>,
    /// When it was pulled, seconds since 1970.
    pub pulled: u64,
}

/// A layer in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Digest of the tar it was made from.
    pub diff_id: Digest,
    /// The EROFS file system.
    pub path: PathBuf,
    /// Size of that, bytes.
    pub size: u64,
}

/// What [`Store::collect`] removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Collected {
    /// Files.
    pub files: u64,
    /// What they took on the disk, bytes.
    pub bytes: u64,
}

/// The files of a layer that is being made.
pub(crate) struct Making {
    /// For the file system.
    pub(crate) blob: File,
    /// For the record of its tar.
    pub(crate) record: File,
    /// For what was fetched; need not exist.
    pub(crate) fetched: PathBuf,
}

/// The file of a name.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    name: String,
    manifest: String,
    pulled: u64,
}

impl Store {
    /// The store of the user who runs this process.
    pub fn of_user() -> Result<Self, Error> {
        // The XDG Base Directory Specification has relative paths ignored.
        let absolute = |name| {
            env::var_os(name)
                .map(PathBuf::from)
                .filter(|path| path.is_absolute())
        };
        let data = absolute("XDG_DATA_HOME");
        let data = data.or_else(|| Some(absolute("HOME")?.join(".local/share")));
        let data = data.ok_or(Error::NoDataDirectory)?;
        Ok(Self::at(&data.join("strata/images")))
    }

    /// A store in the directory `root`, which need not exist yet.
    pub fn at(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    /// Keeps everything that is in the store, or comes into it, for as long as it lives.
    pub fn lease(&self) -> Result<Lease, Error> {
        let lock = self.lock_file()?;
        let path = self.root.join("lock");
        lock.lock_shared()
            .map_err(Error::io("lock the file", &path))?;
        Ok(Lease { _lock: lock })
    }

    /// All images, by name.
    pub fn images(&self) -> Result<Vec<Image>, Error> {
        let mut images: BTreeMap<String, Image> = BTreeMap::new();
        for record in self.records()? {
            let image = self.image_of(&record)?;
            images.insert(image.name.familiar(), image);
        }
        Ok(images.into_values().collect())
    }

    /// The image of this name, or whose ID begins with it. Hold a [`Lease`] while you use it.
    pub fn find(&self, text: &str) -> Result<Image, Error> {
        if let Ok(name) = text.parse::<Name>()
            && let Some(record) = Self::record(&self.name_path(&name))?
        {
            return self.image_of(&record);
        }
        let digits = text.strip_prefix("sha256:").unwrap_or(text);
        let is_id = digits.len() >= MIN_ID_DIGITS;
        let mut found = self.images()?;
        found.retain(|image| is_id && image.id.hex().starts_with(digits));
        let mut ids: Vec<Digest> = found.iter().map(|image| image.id).collect();
        ids.dedup();
        match (ids.len(), found.pop()) {
            (1, Some(image)) => Ok(image),
            (0, _) | (_, None) => Err(Error::NoSuchImage(text.to_owned())),
            _ => Err(Error::Ambiguous(text.to_owned())),
        }
    }

    /// The image with this manifest, by whatever name it was found: one that a machine keeps to,
    /// though the name may mean another by now. Hold a [`Lease`] while you use it.
    pub fn pinned(&self, name: &str, manifest: &str) -> Result<Image, Error> {
        self.image_of(&Record {
            name: name.to_owned(),
            manifest: manifest.to_owned(),
            pulled: 0,
        })
    }

    /// Forgets a name. What no name leads to any more is for [`Store::collect`].
    pub fn remove(&self, image: &Image) -> Result<(), Error> {
        let path = self.name_path(&image.name);
        fs::remove_file(&path).map_err(Error::io("remove the file", &path))
    }

    /// Removes all that no image needs, none of those with the manifests `pinned`, and no machine
    /// uses; and the templates of scratch disks that only other versions of Strata would use.
    /// Waits for pulls to end.
    pub fn collect(&self, pinned: &[(String, String)]) -> Result<Collected, Error> {
        let lock = self.lock_file()?;
        let path = self.root.join("lock");
        lock.lock().map_err(Error::io("lock the file", &path))?;
        let mut blobs = BTreeSet::new();
        let mut layers = BTreeSet::new();
        let pinned = pinned.iter();
        // One that is not whole any more keeps nothing.
        let pinned = pinned.filter_map(|(name, manifest)| self.pinned(name, manifest).ok());
        for image in self.images()?.into_iter().chain(pinned) {
            blobs.extend([image.id.hex(), image.manifest.hex()]);
            layers.extend(image.layers.iter().map(|layer| layer.diff_id.hex()));
        }
        let templates = self.files("scratch")?.into_iter();
        let templates = templates.filter_map(|path| Some(path.file_name()?.to_str()?.to_owned()));
        let templates = templates.filter(|name| scratch::is_wanted(name)).collect();
        let mut collected = Collected::default();
        for (directory, needed) in [
            ("blobs", &blobs),
            ("layers", &layers),
            ("tars", &layers),
            ("scratch", &templates),
            ("partial", &BTreeSet::new()),
        ] {
            for path in self.files(directory)? {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                if !needed.contains(&*name) && !is_used(&path) {
                    collected.bytes += fs::metadata(&path).map_or(0, |metadata| taken(&metadata));
                    fs::remove_file(&path).map_err(Error::io("remove the file", &path))?;
                    collected.files += 1;
                }
            }
        }
        Ok(collected)
    }

    /// Makes the layer `diff_id`, unless it is there or another process makes it meanwhile.
    pub(crate) fn make_layer(
        &self,
        diff_id: Digest,
        make: impl FnOnce(&mut Making) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let digits = diff_id.hex();
        let partial = |suffix: &str| self.root.join("partial").join(format!("{digits}.{suffix}"));
        let lock_path = partial("lock");
        let lock = File::create(&lock_path).map_err(Error::io("create the file", &lock_path))?;
        lock.lock()
            .map_err(Error::io("lock the file", &lock_path))?;
        if self.has_layer(diff_id) {
            return Ok(());
        }
        let create = |path: &Path| {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(true);
            options
                .open(path)
                .map_err(Error::io("create the file", path))
        };
        let mut making = Making {
            blob: create(&partial("erofs"))?,
            record: create(&partial("tar"))?,
            fetched: partial("download"),
        };
        make(&mut making)?;
        // The layer itself comes last: where it is, its record is.
        for (file, suffix, directory) in [
            (&making.record, "tar", "tars"),
            (&making.blob, "erofs", "layers"),
        ] {
            let path = partial(suffix);
            file.sync_all().map_err(Error::io("sync the file", &path))?;
            let target = self.root.join(directory).join(&digits);
            fs::rename(&path, &target).map_err(Error::io("rename a file to", &target))?;
            sync_directory(&target)?;
        }
        match fs::remove_file(&making.fetched) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::io("remove the file", &making.fetched)(error))
            }
            _ => Ok(()),
        }
    }

    /// Has `read` read the tar of a layer, as it was pulled.
    pub(crate) fn tar<T>(
        &self,
        layer: &Layer,
        read: impl FnOnce(&mut dyn Read) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let path = self.root.join("tars").join(layer.diff_id.hex());
        let record = File::open(&path).map_err(Error::io("open the file", &path))?;
        let record = BufReader::new(GzDecoder::new(record));
        let blob = File::open(&layer.path).map_err(Error::io("open the file", &layer.path))?;
        read(&mut Replay::new(record, &blob))
    }

    /// Whether the layer is there.
    pub(crate) fn has_layer(&self, diff_id: Digest) -> bool {
        self.root.join("layers").join(diff_id.hex()).exists()
    }

    /// Keeps a manifest or a configuration.
    pub(crate) fn add_blob(&self, bytes: &[u8]) -> Result<Digest, Error> {
        let digest = Digest::of(bytes);
        let path = self.root.join("blobs").join(digest.hex());
        if !path.exists() {
            write_whole(&path, bytes)?;
        }
        Ok(digest)
    }

    /// Has `name` mean the image with this manifest, which must be complete.
    pub(crate) fn set_name(&self, name: &Name, manifest: Digest) -> Result<Image, Error> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let record = Record {
            name: name.to_string(),
            manifest: manifest.to_string(),
            pulled: now.map_or(0, |time| time.as_secs()),
        };
        let image = self.image_of(&record)?;
        let text = serde_json::to_vec(&record).map_err(|error| Error::Data(error.into()))?;
        write_whole(&self.name_path(name), &text)?;
        Ok(image)
    }

    /// The directory for what has no name yet.
    pub(crate) fn partial(&self) -> Result<PathBuf, Error> {
        self.directory("partial")
    }

    /// The directory for templates of scratch disks.
    pub(crate) fn templates(&self) -> Result<PathBuf, Error> {
        self.directory("scratch")
    }

    fn directory(&self, name: &str) -> Result<PathBuf, Error> {
        let path = self.root.join(name);
        fs::create_dir_all(&path).map_err(Error::io("create the directory", &path))?;
        Ok(path)
    }

    fn lock_file(&self) -> Result<File, Error> {
        for name in DIRECTORIES {
            self.directory(name)?;
        }
        let path = self.root.join("lock");
        File::create(&path).map_err(Error::io("create the file", &path))
    }

    fn name_path(&self, name: &Name) -> PathBuf {
        let digest = Digest::of(name.to_string().as_bytes());
        self.root.join("names").join(digest.hex())
    }

    fn records(&self) -> Result<Vec<Record>, Error> {
        let mut records = Vec::new();
        for path in self.files("names")? {
            // one may be removed meanwhile
            records.extend(Self::record(&path)?);
        }
        Ok(records)
    }

    fn record(path: &Path) -> Result<Option<Record>, Error> {
        let text = match fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("read the file", path)(error)),
        };
        let record = serde_json::from_slice(&text);
        let damaged = |error| Error::BadImage(format!("{} is damaged: {error}", path.display()));
        record.map(Some).map_err(damaged)
    }

    fn image_of(&self, record: &Record) -> Result<Image, Error> {
        let manifest: Digest = record.manifest.parse().map_err(Error::BadImage)?;
        let parsed = source::parse_manifest(&self.blob(manifest)?)?;
        let id = source::digest(parsed.config().digest())?;
        let config = self.blob(id)?;
        let mut layers = Vec::new();
        for diff_id in source::diff_ids(&config)? {
            let path = self.root.join("layers").join(diff_id.hex());
            let metadata = fs::metadata(&path).map_err(Error::io("find the layer", &path))?;
            layers.push(Layer {
                diff_id,
                path,
                size: metadata.len(),
            });
        }
        Ok(Image {
            name: record.name.parse()?,
            id,
            manifest,
            config: source::parse_config(&config)?,
            layers,
            pulled: record.pulled,
        })
    }

    pub(crate) fn blob(&self, digest: Digest) -> Result<Vec<u8>, Error> {
        let path = self.root.join("blobs").join(digest.hex());
        fs::read(&path).map_err(Error::io("read the file", &path))
    }

    /// The files of a directory of the store.
    fn files(&self, directory: &str) -> Result<Vec<PathBuf>, Error> {
        let path = self.root.join(directory);
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::io("read the directory", &path)(error)),
        };
        let paths = entries.map(|entry| Ok(entry?.path()));
        let paths: io::Result<Vec<PathBuf>> = paths.collect();
        paths.map_err(Error::io("read the directory", &path))
    }
}

/// What a file takes on the disk, bytes, which is little for one that is mostly holes.
fn taken(metadata: &Metadata) -> u64 {
    metadata.len().min(metadata.blocks().saturating_mul(512))
}

/// Whether a machine has the file as a disk: it locks what it uses.
fn is_used(path: &Path) -> bool {
    File::open(path).is_ok_and(|file| file.try_lock().is_err())
}

/// Writes a file that is there wholly or not at all.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let directory = path.parent().unwrap_or(Path::new("."));
    // in a directory of the same file system that is cleared by gc
    let partial = directory.with_file_name("partial");
    let mut file = tempfile::NamedTempFile::new_in(&partial)
        .map_err(Error::io("create a file in", &partial))?;
    let written = file
        .write_all(bytes)
        .and_then(|()| file.as_file().sync_all());
    written.map_err(Error::io("write the file", path))?;
    file.persist(path)
        .map_err(|error| Error::io("write the file", path)(error.error))?;
    sync_directory(path)
}

/// Makes the name of a file as lasting as its contents.
pub(crate) fn sync_directory(file: &Path) -> Result<(), Error> {
    let directory = file.parent().unwrap_or(Path::new("."));
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(Error::io("sync the directory", directory))
}
