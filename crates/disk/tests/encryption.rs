//! Encrypted images, against `qemu-img` both ways.

mod common;

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

use common::{file, read_all};
use strata_disk::qcow2::{self, Options, Qcow2, Repair, Secret};
use strata_disk::{Buffers, Disk, Error, Hash, Key, OpenError, Passphrase};
use tempfile::TempDir;

const SIZE: u64 = 1 << 20;
const PHRASE: &[u8] = b"correct horse\n";

fn phrase() -> Passphrase {
    Passphrase::new(PHRASE.to_vec())
}

/// The usual encryption, with a key that is made at once.
fn quick() -> Secret {
    Secret {
        rounds: 1000,
        ..Secret::new(phrase())
    }
}

/// A folder with a key file, and disks in it.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        fs::write(place.path("key"), PHRASE).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn try_qemu_img(&self, command: &str, arguments: &[&str]) -> Output {
        let mut qemu = Command::new("qemu-img");
        qemu.current_dir(self.0.path()).arg(command);
        qemu.args(["--object", "secret,id=s,file=key"]);
        qemu.args(arguments).output().unwrap()
    }

    fn qemu_img(&self, command: &str, arguments: &[&str]) -> String {
        let output = self.try_qemu_img(command, arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Has QEMU make an encrypted image of what is in `raw`.
    fn encrypt(&self, options: &str, raw: &[u8], name: &str) {
        fs::write(self.path("plain.raw"), raw).unwrap();
        let options = format!("encrypt.key-secret=s,{options}");
        let words = [
            "-f",
            "raw",
            "-O",
            "qcow2",
            "-o",
            &options,
            "plain.raw",
            name,
        ];
        // it measures how fast a key is made, and gives up if the host's clock is too coarse for that
        let done = (0..50).find_map(|_| {
            let output = self.try_qemu_img("convert", &words);
            let errors = String::from_utf8_lossy(&output.stderr);
            (!errors.contains("accurate CPU usage")).then_some(output)
        });
        let done = done.expect("qemu-img measures how fast a key is made");
        assert!(done.status.success(), "{options}: {done:?}");
    }

    /// Makes an encrypted image of these bytes.
    fn make(&self, model: &[u8], name: &str) {
        let options = Options {
            secret: Some(quick()),
            ..Options::new(SIZE)
        };
        qcow2::create(&file(&self.path(name), true), &options).unwrap();
        let mut data = model.to_vec();
        let image = self.open(name, true);
        image.write(0, Buffers::from(&mut data[..])).unwrap();
    }

    /// What QEMU says is in an image, which it finds whole.
    fn content(&self, name: &str) -> Vec<u8> {
        let image =
            format!("driver=qcow2,encrypt.key-secret=s,file.driver=file,file.filename={name}");
        let verdict = self.qemu_img("check", &["--image-opts", &image]);
        assert!(verdict.contains("No errors were found"), "{verdict}");
        let words = ["--image-opts", &image, "-O", "raw", "seen.raw"];
        self.qemu_img("convert", &words);
        fs::read(self.path("seen.raw")).unwrap()
    }

    fn open(&self, name: &str, write: bool) -> Qcow2 {
        let mut image = Qcow2::open(file(&self.path(name), write), None, None, write).unwrap();
        image.unlock(&phrase()).unwrap();
        image
    }
}

/// Data here and there, which differs from sector to sector.
fn model() -> Vec<u8> {
    let mut bytes = vec![0; SIZE as usize];
    for (number, sector) in bytes.chunks_mut(512).enumerate() {
        if number % 300 < 200 {
            sector.fill(number as u8 | 1);
        }
    }
    bytes
}

/// Changes the disk and the model: in the middle of clusters, over them, and to zeroes.
fn change(disk: &dyn Disk, model: &mut [u8]) {
    for (offset, length, byte) in [(512, 1024, 1), (0x2_fe00, 0x2_0400, 2), (0xf_fe00, 512, 3)] {
        let range = offset as usize..offset as usize + length;
        model[range].fill(byte);
        let mut data = vec![byte; length];
        disk.write(offset, Buffers::from(&mut data[..])).unwrap();
    }
    for (offset, length) in [(0x600, 0x200), (0x8_0000, 0x1_8000)] {
        model[offset as usize..][..length as usize].fill(0);
        disk.write_zeroes(offset, length, true).unwrap();
    }
}

// QEMU takes seconds to make an image: it measures first how fast keys are made. So most ciphers are
// tried the other way round. Keys of 24 bytes, CBC's of 192 bits, are split into no whole number of
// sectors, at which QEMU 7.2 fails.

#[test]
fn what_qemu_encrypts_is_read_and_changed() {
    let place = Place::new();
    for (cipher, mode, vector, hash) in [
        ("aes-256", "xts", "plain64", "sha256"),
        ("aes-256", "cbc", "essiv", "sha256"),
        ("twofish-256", "xts", "plain64", "sha512"),
    ] {
        let mut options = format!(
            "encrypt.format=luks,encrypt.iter-time=10,encrypt.cipher-alg={cipher},\
             encrypt.cipher-mode={mode},encrypt.ivgen-alg={vector},encrypt.hash-alg={hash}"
        );
        if vector == "essiv" {
            options += ",encrypt.ivgen-hash-alg=sha256";
        }
        let mut model = model();
        place.encrypt(&options, &model, "q.qcow2");

        let image = place.open("q.qcow2", true);
        assert_eq!(read_all(&image), model, "{options}");
        change(&image, &mut model);
        drop(image);
        assert!(place.content("q.qcow2") == model, "{options}");
    }
}

#[test]
fn what_is_encrypted_here_is_read_by_qemu_with_every_cipher() {
    let place = Place::new();
    for (cipher, hash) in [
        ("aes-256-xts-plain64", Hash::Sha256),
        ("aes-128-cbc-essiv:sha256", Hash::Sha1),
        ("aes-192-xts-plain64", Hash::Sha384),
        ("serpent-192-xts-plain64", Hash::Sha256),
        ("serpent-256-xts-plain64", Hash::Sha512),
        ("twofish-256-cbc-plain", Hash::Sha224),
        ("twofish-128-xts-plain64", Hash::Sha256),
    ] {
        let secret = Secret {
            cipher: cipher.parse().unwrap(),
            hash,
            ..quick()
        };
        let options = Options {
            secret: Some(secret),
            ..Options::new(SIZE)
        };
        let path = place.path("s.qcow2");
        let _ = fs::remove_file(&path);
        let new = file(&path, true);
        qcow2::create(&new, &options).unwrap();
        let facts = qcow2::facts(&new).unwrap();
        assert_eq!(facts.encryption, Some(format!("LUKS, {cipher}, {hash}")));
        drop(new);

        let mut model = vec![0; SIZE as usize];
        let mut image = place.open("s.qcow2", true);
        change(&image, &mut model);
        image.create_snapshot("before").unwrap();
        change(&image, &mut model);
        assert!(image.check(Repair::Nothing).unwrap().is_clean());
        drop(image);
        assert!(place.content("s.qcow2") == model, "{cipher}");
    }
}

#[test]
fn nothing_is_read_without_the_passphrase_or_with_another() {
    let place = Place::new();
    place.make(&model(), "q.qcow2");
    let path = place.path("q.qcow2");

    let refused = |key| match strata_disk::open_with(&path, None, false, key) {
        Err(OpenError::Image { source, .. }) => source,
        other => panic!("{other:?}"),
    };
    assert!(matches!(refused(Key::None), Error::Locked));
    let wrong = Passphrase::new(b"correct horse".to_vec());
    assert!(matches!(
        refused(Key::Passphrase(&wrong)),
        Error::WrongPassphrase
    ));

    let locked = strata_disk::open_with(&path, None, false, Key::NotNeeded).unwrap();
    assert!(!locked.extent(0, 512).unwrap().kind.is_zero());
    let read = locked.read(0, Buffers::from(&mut [0; 512][..]));
    assert!(matches!(read, Err(Error::Locked)));
    let bytes = fs::read(&path).unwrap();
    let sector = [1; 512];
    assert!(!bytes.windows(512).step_by(512).any(|part| part == sector));
}

#[test]
fn the_legacy_encryption_is_read_and_not_written() {
    let place = Place::new();
    let model = model();
    place.encrypt("encrypt.format=aes", &model, "q.qcow2");

    assert_eq!(read_all(&place.open("q.qcow2", false)), model);

    let mut image = Qcow2::open(file(&place.path("q.qcow2"), true), None, None, true).unwrap();
    let error = image.unlock(&phrase()).unwrap_err();
    assert!(matches!(error, Error::Unsupported(what) if what.contains("--encrypt")));
}

#[test]
fn a_clone_of_an_encrypted_image_shows_it_and_keeps_its_own_secret_too() {
    let place = Place::new();
    let mut model = model();
    place.make(&model, "base.qcow2");
    let options = Options {
        backing: Some(("base.qcow2".to_owned(), "qcow2".to_owned())),
        secret: Some(quick()),
        ..Options::new(SIZE)
    };
    let path = place.path("clone.qcow2");
    qcow2::create(&file(&path, true), &options).unwrap();

    let phrase = phrase();
    let disk = strata_disk::open_with(&path, None, true, Key::Passphrase(&phrase)).unwrap();
    assert_eq!(read_all(&*disk), model);
    change(&*disk, &mut model);
    assert_eq!(read_all(&*disk), model);
}

#[test]
fn a_damaged_luks_header_is_refused_and_nothing_panics() {
    let place = Place::new();
    place.make(&model(), "q.qcow2");
    let whole = fs::read(place.path("q.qcow2")).unwrap();
    let luks = whole
        .windows(6)
        .position(|bytes| bytes == b"LUKS\xba\xbe")
        .unwrap();
    let extension = whole[..4096]
        .windows(4)
        .position(|bytes| bytes == [5, 0x37, 0xbe, 0x77]);
    let extension = extension.unwrap();

    let fields = (luks..luks + 256)
        .step_by(4)
        .chain(extension..extension + 24);
    for at in fields {
        let mut bytes = whole.clone();
        // neither rounds that take long, nor a slot that is just not there
        bytes[at] = bytes[at].wrapping_add(0x41);
        fs::write(place.path("d.qcow2"), &bytes).unwrap();
        let opened = Qcow2::open(file(&place.path("d.qcow2"), false), None, None, false);
        if let Ok(mut image) = opened {
            let _ = image.unlock(&phrase());
        }
    }
}
