//! The command line of `strata disk`.

use std::path::PathBuf;

use clap::builder::{PathBufValueParser, TypedValueParser};
use clap::{Args, Subcommand, ValueEnum};
use strata_disk::{Cipher, Format, Hash, Passphrase};

use crate::cli::OutputForm;
use crate::units;

/// `strata disk`.
#[derive(Debug, Subcommand)]
pub(crate) enum DiskCommand {
    /// Make an image that is zeroes, or a clone of another
    ///
    /// An image of a disk takes little room until the disk is written. With --backing it shows what
    /// is in another image, and keeps only what is changed; that is done at once, however large the
    /// other is, and the other must not change from then on.
    Create(CreateArgs),
    /// Make a clone: an image that shows what is in another and keeps only what is changed
    Clone {
        /// The image to clone. It must not change from then on
        from: PathBuf,
        /// The clone to make
        to: PathBuf,
        /// Format of the image to clone; without, its name decides
        #[arg(long, value_name = "FORMAT", value_parser = units::format)]
        format: Option<Format>,
        /// The file with the passphrase of the image, if it is encrypted; the clone has it too
        #[arg(long, value_name = "FILE", value_parser = passphrase())]
        key_file: Option<Passphrase>,
    },
    /// Tell what an image is like
    Info(LookArgs),
    /// Check that an image is whole
    ///
    /// Exit status: 0 all is well, 2 something is damaged, 3 there is nothing but leaks, which is
    /// room that is not used and not free.
    Check {
        #[command(flatten)]
        look: LookArgs,
        /// Mend what can be mended without losing data
        #[arg(long, value_name = "WHAT", num_args = 0..=1, default_missing_value = "all")]
        repair: Option<Mend>,
    },
    /// Tell which parts of a disk are where
    Map(LookArgs),
    /// Copy an image, in another format if that is asked for
    Convert(ConvertArgs),
    /// Make an image of a real disk: physical to virtual
    ///
    /// Zeroes are left out, and the image is compared with the disk in the end. What was interrupted
    /// goes on where it was when the command is given again.
    Capture {
        /// The disk, such as /dev/sdb. Nothing on it may be mounted to be written to
        device: PathBuf,
        /// The image to make
        image: PathBuf,
        /// Do not compare
        #[arg(long)]
        no_verify: bool,
    },
    /// Write an image to a real disk: virtual to physical
    ///
    /// All that is on the disk is lost. It is compared with the image in the end. What was interrupted
    /// goes on where it was when the command is given again.
    Restore {
        /// The image
        image: PathBuf,
        /// The disk to write to, such as /dev/sdb
        device: PathBuf,
        /// The file with the passphrase of the image, if it is encrypted
        #[arg(long, value_name = "FILE", value_parser = passphrase())]
        key_file: Option<Passphrase>,
        /// Do not ask
        #[arg(long)]
        yes: bool,
        /// Do not compare
        #[arg(long)]
        no_verify: bool,
    },
    /// Make a disk larger or smaller
    Resize {
        /// The image
        path: PathBuf,
        /// The new size, such as 20G; with + or - before it, so much more or less
        #[arg(allow_hyphen_values = true)]
        size: String,
        /// Allow to cut off what is behind the new size, for good
        #[arg(long)]
        shrink: bool,
        /// Format of the image; without, its name decides
        #[arg(long, value_name = "FORMAT", value_parser = units::format)]
        format: Option<Format>,
        /// The file with the passphrase of the image, if it is encrypted
        #[arg(long, value_name = "FILE", value_parser = passphrase())]
        key_file: Option<Passphrase>,
    },
    /// Write what a clone has changed to the image that it is a clone of
    Commit {
        /// The clone, which is empty afterwards
        path: PathBuf,
        /// The file with the passphrase of the images that are encrypted
        #[arg(long, value_name = "FILE", value_parser = passphrase())]
        key_file: Option<Passphrase>,
    },
    /// Let an image be based on another, or on none; what is on the disk stays the same
    Rebase {
        /// The image
        path: PathBuf,
        /// What it is to be based on; without, on nothing
        onto: Option<PathBuf>,
        /// Format of that; without, its name decides
        #[arg(long, value_name = "FORMAT", value_parser = units::format, requires = "onto")]
        onto_format: Option<Format>,
        /// Only write the name down, as after the other was moved: what is on the disk changes if it
        /// is not the same
        #[arg(long)]
        name_only: bool,
        /// The file with the passphrase of the images that are encrypted
        #[arg(long, value_name = "FILE", value_parser = passphrase())]
        key_file: Option<Passphrase>,
    },
    /// Keep what is on a disk within its image, and go back to it
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
}

/// Arguments of `strata disk create`.
#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// The image to make
    pub(super) path: PathBuf,
    /// Size of the disk, such as 20G [default: that of --backing]
    #[arg(value_parser = units::size, required_unless_present = "backing")]
    pub(super) size: Option<u64>,
    /// Format of the image [default: what the name ends like: .raw and .img are raw, else qcow2]
    #[arg(long, value_name = "FORMAT", value_parser = units::format)]
    pub(super) format: Option<Format>,
    /// The image to show the content of
    #[arg(long, value_name = "FILE")]
    pub(super) backing: Option<PathBuf>,
    /// Its format; without, its name decides
    #[arg(long, value_name = "FORMAT", value_parser = units::format, requires = "backing")]
    pub(super) backing_format: Option<Format>,
    #[command(flatten)]
    pub(super) layout: LayoutArgs,
}

/// How a qcow2 image is laid out.
#[derive(Debug, Args)]
pub(super) struct LayoutArgs {
    /// Bytes that are kept together: a power of two from 512 to 2M
    #[arg(long, value_name = "SIZE", value_parser = units::size, default_value = "64K")]
    pub(super) cluster_size: u64,
    /// How clusters are compressed
    #[arg(long, value_enum, value_name = "KIND", default_value_t = Packing::Zlib)]
    pub(super) compression: Packing,
    /// Keep parts of clusters, a 32nd each, by themselves: clones grow less
    #[arg(long)]
    pub(super) extended_l2: bool,
    /// Encrypt the image with LUKS: the file with its passphrase, all of which counts, also the end
    /// of its last line
    #[arg(long, value_name = "FILE", value_parser = passphrase())]
    pub(super) encrypt: Option<Passphrase>,
    /// How: aes, serpent or twofish, the bits of the key, xts or cbc, and plain64 or essiv with a hash
    #[arg(long, requires = "encrypt", default_value_t)]
    pub(super) cipher: Cipher,
    /// What makes a key of the passphrase: sha1, sha224, sha256, sha384 or sha512
    #[arg(long, requires = "encrypt", default_value_t = Hash::Sha256)]
    pub(super) hash: Hash,
}

/// Reads a passphrase from the file that is named.
fn passphrase() -> impl TypedValueParser<Value = Passphrase> {
    PathBufValueParser::new().try_map(|path| Passphrase::read(&path))
}

/// How clusters are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Packing {
    Zlib,
    Zstd,
}

/// Which image to look at.
#[derive(Debug, Args)]
pub(crate) struct LookArgs {
    /// The image
    pub(super) path: PathBuf,
    /// Its format; without, its name decides
    #[arg(long, value_name = "FORMAT", value_parser = units::format)]
    pub(super) format: Option<Format>,
    /// Form of the report
    #[arg(long, value_enum, default_value_t = OutputForm::Text)]
    pub(super) output: OutputForm,
}

/// What to mend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Mend {
    /// Free what is not used
    Leaks,
    /// All that can be
    All,
}

/// Arguments of `strata disk convert`.
#[derive(Debug, Args)]
pub(crate) struct ConvertArgs {
    /// The image to copy
    pub(super) from: PathBuf,
    /// The image to make
    pub(super) to: PathBuf,
    /// Format of the first; without, its name decides
    #[arg(long, value_name = "FORMAT", value_parser = units::format)]
    pub(super) from_format: Option<Format>,
    /// Format of the second [default: what the name ends like: .raw and .img are raw, else qcow2]
    #[arg(long, value_name = "FORMAT", value_parser = units::format)]
    pub(super) to_format: Option<Format>,
    /// The file with the passphrase of the image to copy, if it is encrypted
    #[arg(long, value_name = "FILE", value_parser = passphrase())]
    pub(super) key_file: Option<Passphrase>,
    /// Compress the copy
    #[arg(short, long)]
    pub(super) compress: bool,
    #[command(flatten)]
    pub(super) layout: LayoutArgs,
}

/// `strata disk snapshot`.
#[derive(Debug, Subcommand)]
pub(crate) enum SnapshotCommand {
    /// List the snapshots in an image
    Ls(LookArgs),
    /// Keep what is on the disk now
    Create {
        /// The image
        path: PathBuf,
        /// What to call it
        name: String,
    },
    /// Make the disk what it was
    Apply {
        /// The image
        path: PathBuf,
        /// Name or ID of the snapshot
        name: String,
    },
    /// Forget a snapshot
    Rm {
        /// The image
        path: PathBuf,
        /// Name or ID of the snapshot
        name: String,
    },
}
