//! Sizes, times, disks and the like as they are written on the command line.

use std::ffi::OsStr;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, SystemTime};

use strata_disk::{Format, Passphrase};
use strata_net::{Forward, Protocol};

/// Granularity of guest memory: a page, in bytes.
const PAGE: u64 = 4096;

/// Parses a memory size with a unit, such as `512M`, `2G` or `1GiB`; powers of 1024. Bytes.
pub(crate) fn memory(text: &str) -> Result<u64, String> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err("a size needs a unit: K, M, G or T, as in 512M".to_owned());
    }
    let bytes = bytes(text)?;
    if bytes == 0 || bytes % PAGE != 0 {
        return Err("a size of memory is a multiple of 4K and not zero".to_owned());
    }
    Ok(bytes)
}

fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(format!("'{unit}' is not a unit of size; use K, M, G or T")),
    };
    let number: u64 = number
        .parse()
        .map_err(|_| "a size is a number and a unit, as in 512M".to_owned())?;
    let bytes = number.checked_mul(1 << shift);
    Ok(bytes.ok_or("the size is too large")?)
}

/// Parses the size of a disk, with or without a unit: `20G`, `512`. Bytes, whole sectors.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let bytes = bytes(text)?;
    if bytes % strata_disk::SECTOR_SIZE != 0 {
        return Err("the size of a disk is a multiple of 512".to_owned());
    }
    Ok(bytes)
}

/// Parses a time such as `30s`, `500ms`, `5m`, `1h`; a bare number is in seconds.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let is_number = |byte: &u8| byte.is_ascii_digit() || *byte == b'.';
    let digits = text.bytes().take_while(is_number).count();
    let (number, unit) = text.split_at(digits);
    let seconds = match unit {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        _ => return Err(format!("'{unit}' is not a unit of time; use ms, s, m or h")),
    };
    let number: f64 = number
        .parse()
        .map_err(|_| "a time is a number and a unit, as in 30s".to_owned())?;
    match Duration::try_from_secs_f64(number * seconds) {
        Ok(Duration::ZERO) => Err("the time must be more than zero".to_owned()),
        Ok(time) => Ok(time),
        Err(_) => Err("the time is too long".to_owned()),
    }
}

/// A disk as given with `--disk`.
#[derive(Debug, Clone)]
pub(crate) struct Disk {
    pub(crate) path: PathBuf,
    pub(crate) format: Option<Format>,
    pub(crate) read_only: bool,
    /// What opens it, if it is encrypted.
    pub(crate) passphrase: Option<Passphrase>,
}

/// Parses `PATH` with any of `,ro`, `,rw`, `,format=FORMAT` and `,key-file=FILE` behind, and reads
/// the latter file. Any other comma belongs to the path.
pub(crate) fn disk(text: &OsStr) -> Result<Disk, String> {
    let mut path = text.as_bytes();
    let (mut read_only, mut format, mut passphrase) = (false, None, None);
    while let Some(comma) = path.iter().rposition(|byte| *byte == b',') {
        match &path[comma + 1..] {
            b"ro" => read_only = true,
            b"rw" => read_only = false,
            option => {
                if let Some(name) = option.strip_prefix(b"format=") {
                    format = Some(self::format(&String::from_utf8_lossy(name))?);
                } else if let Some(file) = option.strip_prefix(b"key-file=") {
                    let file = Path::new(OsStr::from_bytes(file));
                    let read = Passphrase::read(file).map_err(|error| {
                        format!("the key file {} cannot be read: {error}", file.display())
                    });
                    passphrase = Some(read?);
                } else {
                    break;
                }
            }
        }
        path = &path[..comma];
    }
    if path.is_empty() {
        return Err("a disk is a file: PATH, or PATH,ro to keep it unchanged".to_owned());
    }
    Ok(Disk {
        path: OsStr::from_bytes(path).into(),
        format,
        read_only,
        passphrase,
    })
}

/// Parses the name of an image format.
pub(crate) fn format(name: &str) -> Result<Format, String> {
    Format::from_name(name).ok_or_else(|| {
        let known: Vec<_> = Format::ALL.into_iter().map(Format::name).collect();
        format!(
            "there is no image format {name:?}; there are {}",
            known.join(", ")
        )
    })
}

/// A module as given with `--module`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Module {
    pub(crate) path: PathBuf,
    pub(crate) arguments: String,
}

/// Parses `FILE` or `FILE ARGS`; the first space ends the file's name.
pub(crate) fn module(text: &OsStr) -> Result<Module, String> {
    let bytes = text.as_bytes();
    let space = bytes.iter().position(|byte| *byte == b' ');
    let (path, arguments) = bytes.split_at(space.unwrap_or(bytes.len()));
    if path.is_empty() {
        return Err("a module is a file: FILE, or \"FILE ARGS\"".to_owned());
    }
    let arguments = str::from_utf8(arguments).map_err(|_| "the arguments are not UTF-8")?;
    Ok(Module {
        path: OsStr::from_bytes(path).into(),
        arguments: arguments.trim_start_matches(' ').to_owned(),
    })
}

/// A shared folder as given with `--volume`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Volume {
    /// Where it is on this host.
    pub(crate) host: PathBuf,
    /// Where the guest has it: an absolute path, not the root, without `..`.
    pub(crate) guest: PathBuf,
    pub(crate) read_only: bool,
}

/// Parses `HOST:GUEST`, or the same with `:ro` or `:rw` behind. The path in the guest has no colon.
pub(crate) fn volume(text: &OsStr) -> Result<Volume, String> {
    let form = || "a volume is HOST:GUEST or HOST:GUEST:ro, such as ./site:/srv:ro".to_owned();
    let split = |bytes: &[u8]| {
        let colon = bytes.iter().rposition(|byte| *byte == b':')?;
        Some((bytes[..colon].to_vec(), bytes[colon + 1..].to_vec()))
    };
    let (before, last) = split(text.as_bytes()).ok_or_else(form)?;
    let shown = String::from_utf8_lossy(&last).into_owned();
    let (host, guest, read_only) = if last.starts_with(b"/") {
        (before, last, false)
    } else {
        let read_only = match &*last {
            b"ro" => Some(true),
            b"rw" => Some(false),
            _ => None,
        };
        match (split(&before), read_only) {
            (Some((host, guest)), Some(read_only)) => (host, guest, read_only),
            (Some((_, guest)), None) if guest.starts_with(b"/") => {
                return Err(format!("'{shown}' is neither ro nor rw"));
            }
            (None, Some(_)) => return Err(form()),
            (_, None) => return Err(format!("the path in the guest, '{shown}', is not absolute")),
        }
    };
    let guest = PathBuf::from(OsStr::from_bytes(&guest));
    if host.is_empty() {
        return Err(form());
    }
    if !guest.is_absolute() {
        let guest = guest.display();
        return Err(format!("the path in the guest, '{guest}', is not absolute"));
    }
    if guest.components().any(|part| part == Component::ParentDir) {
        return Err("the path in the guest goes back with '..'; give it without".to_owned());
    }
    // As it is, without "." and doubled or trailing slashes.
    let guest: PathBuf = guest.components().collect();
    if guest == Path::new("/") {
        return Err("a volume cannot be the guest's root; give it a folder of its own".to_owned());
    }
    Ok(Volume {
        host: OsStr::from_bytes(&host).into(),
        guest,
        read_only,
    })
}

/// Which network a machine is on, as given with `--network`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Network {
    pub(crate) wire: Wire,
    /// Guests reach this host.
    pub(crate) host: bool,
    /// Guests reach nobody but each other.
    pub(crate) isolated: bool,
}

/// Whom a machine shares its network with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Wire {
    /// There is none.
    None,
    /// Nobody.
    User,
    /// Whoever names the same.
    Named(String),
    /// Whoever names the same, on a bridge of the host's.
    Bridge(String),
}

impl Network {
    /// No network.
    pub(crate) const NONE: Self = Self::plain(Wire::None);
    /// One of the machine's own.
    pub(crate) const USER: Self = Self::plain(Wire::User);

    const fn plain(wire: Wire) -> Self {
        Self {
            wire,
            host: false,
            isolated: false,
        }
    }
}

/// Parses `user`, `none`, a name or `bridge:` and a name, then `,host` or `,isolated`.
pub(crate) fn network(text: &str) -> Result<Network, String> {
    let (first, options) = text.split_once(',').unwrap_or((text, ""));
    let mut network = Network::plain(match first {
        "none" => Wire::None,
        "user" => Wire::User,
        "bridge" => return Err("a bridge has a name, such as bridge:lab".to_owned()),
        other => match other.strip_prefix("bridge:") {
            Some(bridge) if strata_net::is_bridge_name(bridge) => Wire::Bridge(bridge.to_owned()),
            Some(_) => {
                let text = "a bridge's name is of a-z, 0-9 and hyphens between them, at most 8";
                return Err(text.to_owned());
            }
            None => Wire::Named(name(other)?),
        },
    });
    match options {
        "" => {}
        "host" => network.host = true,
        "isolated" => network.isolated = true,
        other => return Err(format!("'{other}' is neither host nor isolated")),
    }
    Ok(network)
}

/// Parses a name: a host name of one label.
pub(crate) fn name(text: &str) -> Result<String, String> {
    if strata_net::is_host_name(text) {
        Ok(text.to_owned())
    } else {
        Err("a name is of a-z, 0-9 and hyphens between them, at most 63".to_owned())
    }
}

/// Parses `[ADDRESS:]HOST:GUEST[/udp]`; an IPv6 address is in brackets.
pub(crate) fn forward(text: &str) -> Result<Forward, String> {
    let (ports, protocol) = match text.rsplit_once('/') {
        None => (text, Protocol::Tcp),
        Some((ports, "tcp")) => (ports, Protocol::Tcp),
        Some((ports, "udp")) => (ports, Protocol::Udp),
        Some((_, other)) => return Err(format!("'{other}' is neither tcp nor udp")),
    };
    let form = || "a port is published as [ADDRESS:]HOST:GUEST, such as 8080:80".to_owned();
    let (host, guest) = ports.rsplit_once(':').ok_or_else(form)?;
    let (address, host) = match host.rsplit_once(':') {
        None => (IpAddr::V4(Ipv4Addr::LOCALHOST), host),
        Some((address, host)) => {
            let bare = address.strip_prefix('[').and_then(|a| a.strip_suffix(']'));
            let parsed = bare.unwrap_or(address).parse();
            (
                parsed.map_err(|_| format!("'{address}' is no IP address"))?,
                host,
            )
        }
    };
    let number = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0);
    Ok(Forward {
        protocol,
        host: (address, number(host).ok_or_else(form)?).into(),
        guest: number(guest).ok_or_else(form)?,
    })
}

/// The last I/O port that has three after it.
const LAST_OF_FOUR: u16 = 0xfffc;

/// Parses the first of four I/O ports, decimal or hexadecimal after `0x`.
pub(crate) fn port(text: &str) -> Result<u16, String> {
    let port = match text.strip_prefix("0x") {
        Some(digits) => u16::from_str_radix(digits, 16),
        None => text.parse(),
    };
    port.ok()
        .filter(|port| *port <= LAST_OF_FOUR)
        .ok_or_else(|| "a port is a number from 0 to 0xfffc, such as 0xf4".to_owned())
}

/// The first real-time signal that programs may use (signal(7)).
const SIGRTMIN: u8 = 34;
const SIGRTMAX: u8 = 64;

/// Parses a signal: its number, or its name with or without SIG, such as TERM or SIGRTMIN+3.
pub(crate) fn signal(text: &str) -> Result<u8, String> {
    let fault = || format!("'{text}' is no signal: give a name such as TERM, or a number");
    let name = text.to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    let number = match name.parse() {
        Ok(number) => Some(number),
        Err(_) => match name.strip_prefix("RTMIN") {
            Some("") => Some(SIGRTMIN),
            Some(more) => more
                .strip_prefix('+')
                .and_then(|more| SIGRTMIN.checked_add(more.parse().ok()?)),
            None => (1..SIGRTMIN).find(|number| {
                let known = signal_hook::low_level::signal_name((*number).into());
                known.and_then(|known| known.strip_prefix("SIG")) == Some(name)
            }),
        },
    };
    number
        .filter(|number| (1..=SIGRTMAX).contains(number))
        .ok_or_else(fault)
}

/// A moment for people and programs to read, such as `2026-11-21T19:08:03.123Z` (RFC 3339).
pub(crate) fn display_time(time: SystemTime) -> String {
    humantime::format_rfc3339_millis(time).to_string()
}

/// A time in seconds for people to read, such as `42 s` or `3 h`, rounded down.
pub(crate) fn display_age(seconds: u64) -> String {
    const UNITS: [(u64, &str); 3] = [(86_400, "d"), (3600, "h"), (60, "min")];
    let unit = UNITS.iter().find(|(size, _)| seconds >= 2 * size);
    let (size, name) = unit.unwrap_or(&(1, "s"));
    format!("{} {name}", seconds / size)
}

/// A size in bytes for people to read, such as `512 MiB`.
pub(crate) fn display_size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    let mut scale = 1_u64;
    while bytes / scale >= 1024 && unit + 1 < UNITS.len() {
        scale *= 1024;
        unit += 1;
    }
    // In tenths, rounded down: what is shown is there.
    let tenths = u128::from(bytes) * 10 / u128::from(scale);
    match (tenths / 10, tenths % 10) {
        (whole, 0) => format!("{whole} {}", UNITS[unit]),
        (whole, tenth) => format!("{whole}.{tenth} {}", UNITS[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_any_usual_unit() {
        assert_eq!(memory("512M"), Ok(512 << 20));
        assert_eq!(memory("2G"), Ok(2 << 30));
        assert_eq!(memory("1GiB"), Ok(1 << 30));
        assert_eq!(memory("65536k"), Ok(64 << 20));
        assert_eq!(memory("1tb"), Ok(1 << 40));
    }

    #[test]
    fn sizes_without_sense_are_refused() {
        for text in [
            "",
            "M",
            "512",
            "0G",
            "1K",
            "5X",
            "-1G",
            "1.5G",
            "99999999999T",
            "1 G",
        ] {
            assert!(memory(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_port_is_read_in_either_base() {
        assert_eq!(port("0xf4"), Ok(0xf4));
        assert_eq!(port("1281"), Ok(0x501));
        for text in ["", "0x", "-1", "f4", "0xfffd", "65536", "0xf4 "] {
            assert!(port(text).is_err(), "{text}");
        }
    }

    #[test]
    fn times_are_read_with_any_usual_unit() {
        assert_eq!(duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("30"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("1.5m"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("2h"), Ok(Duration::from_hours(2)));
    }

    #[test]
    fn times_without_sense_are_refused() {
        for text in [
            "",
            "s",
            "0",
            "0s",
            "-1s",
            "1d",
            "1..5s",
            "1e400s",
            "99999999999999999999999h",
        ] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_disk_is_writable_unless_said_otherwise() {
        let parse = |text: &str| disk(OsStr::new(text)).unwrap();
        assert!(!parse("a.img").read_only);
        assert!(!parse("a.img,rw").read_only);
        assert!(parse("a.img,ro").read_only);
        assert_eq!(parse("a,b.img,ro").path, PathBuf::from("a,b.img"));
        let image = parse("a.img,ro,format=qcow2");
        assert_eq!((image.format, image.read_only), (Some(Format::Qcow2), true));
        assert_eq!(parse("a.qcow2").format, None);
        assert!(disk(OsStr::new("a,format=floppy")).is_err());
        assert!(disk(OsStr::new(",ro")).is_err());
    }

    #[test]
    fn sizes_are_shown_short() {
        assert_eq!(display_size(512 << 20), "512 MiB");
        assert_eq!(display_size(3 << 29), "1.5 GiB");
        assert_eq!(display_size(17), "17 bytes");
    }

    #[test]
    fn a_network_is_a_word_with_at_most_one_option() {
        assert_eq!(network("none"), Ok(Network::NONE));
        assert_eq!(network("user"), Ok(Network::USER));
        let shared = network("lab,isolated").unwrap();
        assert_eq!(shared.wire, Wire::Named("lab".to_owned()));
        assert!(shared.isolated && !shared.host);
        let bridge = network("bridge:lab,host").unwrap();
        assert_eq!(bridge.wire, Wire::Bridge("lab".to_owned()));
        let wrong = ["", "a/b", "../x", "lab,host,isolated", "user,rw", "bridge"];
        for wrong in wrong.into_iter().chain(["bridge:", "bridge:too-long1"]) {
            assert!(network(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_published_port_may_have_an_address_and_a_protocol() {
        let of = |text: &str| {
            let f = forward(text).unwrap();
            (f.host.to_string(), f.guest, f.protocol)
        };
        assert_eq!(
            of("8080:80"),
            ("127.0.0.1:8080".to_owned(), 80, Protocol::Tcp)
        );
        assert_eq!(
            of("0.0.0.0:53:5353/udp"),
            ("0.0.0.0:53".to_owned(), 5353, Protocol::Udp)
        );
        assert_eq!(
            of("[::1]:1:2/tcp"),
            ("[::1]:1".to_owned(), 2, Protocol::Tcp)
        );
        for wrong in ["80", "x:80", "1:2:3", "70000:1", "1:2/sctp", ":80"] {
            assert!(forward(wrong).is_err(), "{wrong}");
        }
    }

    fn shared(text: &str) -> Result<(String, String, bool), String> {
        let volume = volume(OsStr::new(text))?;
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        Ok((text(&volume.host), text(&volume.guest), volume.read_only))
    }

    #[test]
    fn a_volume_is_two_paths_and_perhaps_how_it_is_shared() {
        let of = |host: &str, guest: &str, ro| Ok((host.to_owned(), guest.to_owned(), ro));
        assert_eq!(shared("./site:/srv:ro"), of("./site", "/srv", true));
        assert_eq!(shared("/a:/b"), of("/a", "/b", false));
        assert_eq!(shared("/a:/b:rw"), of("/a", "/b", false));
        assert_eq!(shared("a:b:/c//d/./"), of("a:b", "/c/d", false));
        assert_eq!(shared("a:/ro"), of("a", "/ro", false));
    }

    #[test]
    fn a_volume_that_is_none_says_what_is_wrong() {
        for (text, word) in [
            ("site", "HOST:GUEST"),
            (":/srv", "HOST:GUEST"),
            ("site:ro", "HOST:GUEST"),
            ("site:srv", "not absolute"),
            ("site:srv:ro", "not absolute"),
            ("site:", "not absolute"),
            ("site:/srv:rx", "neither ro nor rw"),
            ("site:/srv:", "neither ro nor rw"),
            ("site:/srv/../etc", ".."),
            ("site:/", "root"),
            ("site://./:ro", "root"),
        ] {
            let error = shared(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
