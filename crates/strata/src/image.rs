//! `strata image`: container images in the user's store.

use std::fmt::Write;

use clap::{Args, Subcommand};
use serde::Serialize;
use strata_image::oci::{self, Error, Image, Name, Source, Store};

use crate::cli::OutputForm;
use crate::exit::End;
use crate::machines;
use crate::progress::Rows;
use crate::units::display_size;
use crate::{print, report};

/// Digits of an ID that are shown, as with Docker.
const ID_DIGITS: usize = 12;

const SOURCES: &str = "\
Sources:
  docker://debian:bookworm        Docker's registry; also without docker://
  docker://HOST[:PORT]/PATH:TAG   any other registry
  docker://PATH@sha256:DIGEST     exactly this image
  oci:DIRECTORY[:TAG]             an OCI image layout, as skopeo and umoci write it
  docker-archive:FILE[:NAME]      what 'docker save' writes
  rootfs:FILE                     a tar of a root file system; gzip, zstd or xz is undone

Credentials are those of 'docker login': ~/.docker/config.json and the helpers it names. A registry
on this host may do without TLS.";

/// Arguments of `strata image`.
#[derive(Debug, Args)]
pub(crate) struct ImageArgs {
    #[command(subcommand)]
    command: ImageCommand,
}

#[derive(Debug, Subcommand)]
enum ImageCommand {
    /// Fetch an image and keep it
    ///
    /// Layers become file systems that images share. What a broken or killed pull has fetched is
    /// not fetched again.
    #[command(after_long_help = SOURCES)]
    Pull(PullArgs),
    /// List the images that are here
    #[command(visible_alias = "list")]
    Ls(FormArgs),
    /// Forget images; 'strata image gc' then frees what no image needs any more
    Rm {
        /// Names, or first digits of IDs
        #[arg(required = true, value_name = "IMAGE")]
        images: Vec<String>,
    },
    /// Tell all about an image
    Inspect {
        /// Its name, or the first digits of its ID
        #[arg(value_name = "IMAGE")]
        image: String,
        #[command(flatten)]
        form: FormArgs,
    },
    /// Write an image to files that other tools read
    ///
    /// The layers' tars are those that were pulled, so the image keeps its ID. An OCI layout that is
    /// there keeps the images that are in it.
    Export {
        /// Its name, or the first digits of its ID
        #[arg(value_name = "IMAGE")]
        image: String,
        /// Where to: oci:DIRECTORY[:TAG] or docker-archive:FILE[:NAME]
        #[arg(value_name = "TARGET")]
        target: String,
    },
    /// Remove layers that no image needs, and what broken pulls have left
    ///
    /// It waits for pulls to end. Layers that a machine is using stay.
    Gc(FormArgs),
}

#[derive(Debug, Args)]
struct PullArgs {
    /// Where it is: docker://NAME, oci:DIRECTORY, docker-archive:FILE or rootfs:FILE
    #[arg(value_name = "SOURCE")]
    source: String,
    /// What to call it here, instead of what it is called at its source
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
}

#[derive(Debug, Args)]
struct FormArgs {
    /// Form of the report
    #[arg(long, value_enum, default_value_t = OutputForm::Text)]
    output: OutputForm,
}

/// An image as programs are told of it.
#[derive(Debug, Serialize)]
struct Told<'a> {
    name: String,
    id: String,
    manifest: String,
    /// Seconds since 1970.
    pulled: u64,
    /// Size of the layers' file systems, bytes.
    size: u64,
    layers: Vec<ToldLayer>,
    #[serde(skip_serializing_if = "Option::is_none")]
    config: Option<&'a oci::ImageConfiguration>,
}

#[derive(Debug, Serialize)]
struct ToldLayer {
    diff_id: String,
    path: String,
    size: u64,
}

impl<'a> Told<'a> {
    fn of(image: &'a Image) -> Self {
        let layers = image.layers.iter().map(|layer| ToldLayer {
            diff_id: layer.diff_id.to_string(),
            path: layer.path.display().to_string(),
            size: layer.size,
        });
        Self {
            name: image.name.familiar(),
            id: image.id.to_string(),
            manifest: image.manifest.to_string(),
            pulled: image.pulled,
            size: image.layers.iter().map(|layer| layer.size).sum(),
            layers: layers.collect(),
            config: None,
        }
    }
}

/// Does what `strata image` is asked for.
pub(crate) fn image(args: &ImageArgs) -> End {
    match run(&args.command) {
        Ok(text) => print(text.as_bytes()),
        Err(error) => {
            report::say_error(&error);
            if let Some(advice) = error.advice() {
                report::say(advice);
            }
            End::Failed
        }
    }
}

fn run(command: &ImageCommand) -> Result<String, Error> {
    let store = Store::of_user()?;
    match command {
        ImageCommand::Pull(args) => {
            let source: Source = args.source.parse()?;
            let name: Option<Name> = args.name.as_ref().map(|name| name.parse()).transpose()?;
            let image = oci::pull(&store, &source, name.as_ref(), &Rows::default())?;
            Ok(format!("{}\n", image.name.familiar()))
        }
        ImageCommand::Ls(form) => {
            let images = store.images()?;
            Ok(match form.output {
                OutputForm::Text => table(&images),
                OutputForm::Json => report::json(&images.iter().map(Told::of).collect::<Vec<_>>()),
            })
        }
        ImageCommand::Rm { images } => {
            let _lease = store.lease()?;
            for image in images {
                store.remove(&store.find(image)?)?;
            }
            Ok(String::new())
        }
        ImageCommand::Inspect { image, form } => {
            let image = store.find(image)?;
            Ok(match form.output {
                OutputForm::Text => details(&image),
                OutputForm::Json => report::json(&Told {
                    config: Some(&image.config),
                    ..Told::of(&image)
                }),
            })
        }
        ImageCommand::Export { image, target } => {
            let _lease = store.lease()?;
            oci::export(&store, &store.find(image)?, &target.parse()?)?;
            Ok(String::new())
        }
        ImageCommand::Gc(form) => {
            let collected = store.collect(&machines::pinned_images())?;
            Ok(match form.output {
                OutputForm::Text => format!(
                    "{} files, {}, removed\n",
                    collected.files,
                    display_size(collected.bytes)
                ),
                OutputForm::Json => report::json(&collected),
            })
        }
    }
}

fn table(images: &[Image]) -> String {
    let rows: Vec<[String; 4]> = images
        .iter()
        .map(|image| {
            let told = Told::of(image);
            let id = image.id.hex();
            [
                told.name,
                id[..ID_DIGITS].to_owned(),
                told.layers.len().to_string(),
                display_size(told.size),
            ]
        })
        .collect();
    report::table(["NAME", "ID", "LAYERS", "SIZE"], &rows)
}

fn details(image: &Image) -> String {
    let config = image.config.config().clone().unwrap_or_default();
    let words = |words: &Option<Vec<String>>| words.clone().unwrap_or_default().join(" ");
    let mut text = String::new();
    let mut line = |key: &str, value: &str| {
        if !value.is_empty() {
            let _ = writeln!(text, "{key:<12} {}", value.escape_debug());
        }
    };
    line("Name", &image.name.familiar());
    line("ID", &image.id.to_string());
    line("Manifest", &image.manifest.to_string());
    line(
        "Created",
        image.config.created().as_deref().unwrap_or_default(),
    );
    line("Entrypoint", &words(config.entrypoint()));
    line("Command", &words(config.cmd()));
    line("User", config.user().as_deref().unwrap_or_default());
    line(
        "Directory",
        config.working_dir().as_deref().unwrap_or_default(),
    );
    line(
        "Stop signal",
        config.stop_signal().as_deref().unwrap_or_default(),
    );
    for (key, values) in [
        ("Environment", config.env()),
        ("Volume", config.volumes()),
        ("Port", config.exposed_ports()),
    ] {
        let mut values = values.clone().unwrap_or_default();
        values.sort();
        for value in values {
            line(key, &value);
        }
    }
    for layer in &image.layers {
        let layer = format!("{}, {}", layer.diff_id, display_size(layer.size));
        line("Layer", &layer);
    }
    text
}
