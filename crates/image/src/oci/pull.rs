//! Brings an image into the store: several layers at once, each as one stream from its source
//! to its file system.

use std::collections::{BTreeSet, VecDeque};
use std::fs;
use std::io::{self, BufWriter, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use flate2::Compression;
use flate2::write::GzEncoder;

use crate::oci::digest::Checked;
use crate::oci::download::Download;
use crate::oci::error::Error;
use crate::oci::source::{FoundLayer, Name, Origin, Source};
use crate::oci::store::{Image, Making, Store};
use crate::oci::unpack::unpack;
use crate::progress::Progress;

/// Layers that are pulled at once, as with Docker.
const AT_ONCE: usize = 3;

/// Gives each layer that is pulled a progress of its own. Called from several threads.
pub trait Bars: Sync {
    /// The progress of one more layer.
    fn bar(&self) -> Box<dyn Progress + Send>;
}

/// Pulls the image at `source` into the store, and has `name` mean it, or what it is called at
/// its source.
pub fn pull(
    store: &Store,
    source: &Source,
    name: Option<&Name>,
    bars: &dyn Bars,
) -> Result<Image, Error> {
    let _lease = store.lease()?;
    let origin = source.open()?;
    let found = origin.found();
    let name = name.or(found.name.as_ref()).ok_or_else(|| Error::BadName {
        text: String::new(),
        reason: "the image has no name at its source, so give it one with --name".to_owned(),
    })?;
    let mut seen = BTreeSet::new();
    let missing: VecDeque<&FoundLayer> = found
        .layers
        .iter()
        .filter(|layer| seen.insert(layer.diff_id) && !store.has_layer(layer.diff_id))
        .collect();
    let pull = Pull {
        store,
        origin: &*origin,
        bars,
        left: Mutex::new(missing),
        stop: AtomicBool::new(false),
    };
    pull.run()?;
    store.add_blob(&found.config)?;
    let manifest = store.add_blob(&found.manifest)?;
    store.set_name(name, manifest)
}

struct Pull<'a> {
    store: &'a Store,
    origin: &'a dyn Origin,
    bars: &'a dyn Bars,
    left: Mutex<VecDeque<&'a FoundLayer>>,
    /// One has failed, so that the others need not go on.
    stop: AtomicBool,
}

impl Pull<'_> {
    fn run(&self) -> Result<(), Error> {
        thread::scope(|scope| {
            let workers: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(|| self.work())).collect();
            let results = workers.into_iter().map(|worker| {
                worker
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            });
            // The first error is the cause; that others gave up is not worth telling.
            let mut result = Ok(());
            for one in results {
                let is_given_up = |error: &Error| matches!(error, Error::Layer { source, .. } if matches!(**source, Error::GivenUp));
                match (&result, one) {
                    (Ok(()), one) => result = one,
                    (Err(old), Err(new)) if is_given_up(old) => result = Err(new),
                    _ => {}
                }
            }
            result
        })
    }

    fn work(&self) -> Result<(), Error> {
        loop {
            let next = self
                .left
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .pop_front();
            let Some(layer) = next else {
                return Ok(());
            };
            let made = self.store.make_layer(layer.diff_id, |making| {
                let result = self.layer(layer, making);
                if let Err(Error::Data(error)) = &result
                    && error.kind() == io::ErrorKind::InvalidData
                {
                    // What was fetched is not what it should be: not to be used again.
                    let _ = fs::remove_file(&making.fetched);
                }
                result
            });
            if let Err(source) = made {
                self.stop.store(true, Ordering::Relaxed);
                return Err(Error::Layer {
                    layer: layer.digest.unwrap_or(layer.diff_id),
                    source: Box::new(source),
                });
            }
        }
    }

    /// Makes the file system of one layer.
    fn layer(&self, layer: &FoundLayer, making: &mut Making) -> Result<(), Error> {
        let mut bar = self.bars.bar();
        let digits = layer.digest.unwrap_or(layer.diff_id).hex();
        bar.step(&digits[..12], Some(layer.size));
        let download = Download::new(self.origin, layer, &making.fetched, &self.stop, &mut *bar)?;
        let mut stored = Checked::new(download, "layer", layer.digest, Some(layer.size));
        let mut tar = Checked::new(
            unpack(&mut stored).map_err(data)?,
            "tar in the layer",
            Some(layer.diff_id),
            None,
        );
        let mut record = GzEncoder::new(BufWriter::new(&making.record), Compression::fast());
        let made = strata_erofs::Layer::read_recorded(&mut tar, &making.blob, &mut record)
            .map_err(file_system)?;
        tar.finish().map_err(data)?;
        drop(tar);
        // What may follow the packed tar belongs to the digest as well.
        stored.finish().map_err(data)?;
        record
            .finish()
            .and_then(|mut record| record.flush())
            .map_err(data)?;
        made.finish(layer.diff_id.uuid())?;
        Ok(())
    }
}

/// Finds the error of ours that a reader handed on.
fn data(error: io::Error) -> Error {
    match error.downcast::<Error>() {
        Ok(error) => error,
        Err(error) => Error::Data(error),
    }
}

fn file_system(error: strata_erofs::Error) -> Error {
    match error {
        strata_erofs::Error::Read(error) => data(error),
        other => Error::FileSystem(other),
    }
}
