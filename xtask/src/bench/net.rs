//! The network: iperf3 between a guest and the host, both ways, and how long a packet takes there
//! and back; Strata with `--network user`, QEMU's TCG with `-netdev user` and, where there are the
//! privileges, with `-netdev tap`, in turn.
//!
//! The guest has iperf3 of the host's own Debian, with the libraries that it asks for. The servers
//! listen on the host's loopback, which both user networks map to an address of theirs, and on the
//! tap device.

use std::fmt;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde::Serialize;
use strata_image::{Archive, Cache};
use tempfile::TempDir;

use super::guests::LIMITS;
use crate::progress::Lines;
use crate::{Error, packages, process};

/// Seconds that each direction is measured.
const SECONDS: u32 = 5;
/// What the script prints before its figures, and at the end.
const FIGURES: &str = "NET ";
const DONE: &str = "NET-DONE";

/// What was measured on one side: medians.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Figures {
    /// From the guest to the host, and back, in Mbit/s.
    pub(crate) to_host: f64,
    pub(crate) to_guest: f64,
    /// There and back, between guest and gateway, in ms.
    pub(crate) round_trip: f64,
}

/// All sides.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Net {
    pub(crate) strata: Option<Figures>,
    pub(crate) tcg: Option<Figures>,
    /// TCG on a tap device, which needs privileges.
    pub(crate) tcg_tap: Option<Figures>,
}

impl fmt::Display for Net {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let strata = self.strata.unwrap_or_default();
        let peers = [("TCG user", self.tcg), ("TCG tap", self.tcg_tap)];
        for (name, peer) in peers {
            let Some(peer) = peer else { continue };
            let ratio = format!("Strata/{name}");
            writeln!(
                f,
                "{:<28} {:>10} {name:>10} {ratio:>16}",
                "network", "Strata"
            )?;
            let rows = [
                ("guest to host, Mbit/s", strata.to_host, peer.to_host),
                ("host to guest, Mbit/s", strata.to_guest, peer.to_guest),
                ("round trip, ms", strata.round_trip, peer.round_trip),
            ];
            for (name, strata, peer) in rows {
                let ratio = strata / peer;
                writeln!(f, "{name:<28} {strata:>10.2} {peer:>10.2} {ratio:>16.2}")?;
            }
        }
        Ok(())
    }
}

/// A server of iperf3's, ended when dropped.
struct Server(Child);

impl Server {
    fn start(iperf: &Path, address: &str, port: u16) -> Result<Self, Error> {
        let mut command = Command::new(iperf);
        command
            .args(["-s", "-B", address, "-p", &port.to_string()])
            .stdout(Stdio::null());
        let child = command.spawn().map_err(|source| Error::Start {
            what: "iperf3".to_owned(),
            source,
        })?;
        Ok(Self(child))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A tap device for QEMU, with an address of the host's; gone when dropped.
struct Tap;

impl Tap {
    const NAME: &str = "bench-tap";
    /// In a network for benchmarks of such kind (RFC 2544 §C.2.2).
    const HOST: &str = "198.19.83.1";
    const GUEST: &str = "198.19.83.2/24";

    /// `None`, and word of it, where this process may not make one.
    fn make() -> Option<Self> {
        let ip = |words: &str| {
            let done = Command::new("ip").args(words.split(' ')).output();
            done.is_ok_and(|output| output.status.success())
        };
        let (name, host) = (Self::NAME, Self::HOST);
        if !ip(&format!("tuntap add dev {name} mode tap vnet_hdr")) {
            eprintln!("network: TCG on a tap device is left out: 'ip tuntap add' needs root here");
            return None;
        }
        let tap = Self;
        let ready =
            ip(&format!("address add {host}/24 dev {name}")) && ip(&format!("link set {name} up"));
        if !ready {
            eprintln!("network: TCG on a tap device is left out: it takes no address");
        }
        ready.then_some(tap)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["tuntap", "del", "dev", Self::NAME, "mode", "tap"])
            .status();
    }
}

/// Measures all sides `runs` times, in turn.
pub(crate) fn measure(
    strata: Option<&Path>,
    qemu: Option<&Path>,
    memory: &str,
    runs: u32,
) -> Result<Net, Error> {
    packages::provide(&[packages::IPERF3])?;
    let iperf = packages::IPERF3.require()?;
    let parts = Parts::make(&iperf)?;
    let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    let port = free
        .map_err(Error::file("find a port of", Path::new("127.0.0.1")))?
        .port();
    let tap = qemu.and_then(|_| Tap::make());
    let mut servers = vec![Server::start(&iperf, "127.0.0.1", port)?];
    if tap.is_some() {
        servers.push(Server::start(&iperf, Tap::HOST, port)?);
    }
    let mut seen: [Vec<Figures>; 3] = Default::default();
    for run in 1..=runs {
        let on_tap = qemu.filter(|_| tap.is_some());
        let commands = [
            strata.map(|program| parts.strata(program, memory, port)),
            qemu.map(|program| parts.tcg(program, memory, "user", port)),
            on_tap.map(|program| parts.tcg(program, memory, "tap", port)),
        ];
        let sides = ["Strata", "Tcg", "Tcg on tap"];
        for ((what, command), seen) in sides.iter().zip(commands).zip(&mut seen) {
            let Some(mut command) = command else { continue };
            let done = process::measure(what, &mut command, LIMITS)?;
            let figures = parse(what, &done.output)?;
            eprintln!("network {run}/{runs} {what}: {figures:?}");
            seen.push(figures);
        }
    }
    drop(servers);
    let [strata, tcg, tcg_tap] = seen.map(|figures| median(&figures));
    Ok(Net {
        strata,
        tcg,
        tcg_tap,
    })
}

fn median(all: &[Figures]) -> Option<Figures> {
    let of = |field: fn(&Figures) -> f64| {
        let mut values: Vec<f64> = all.iter().map(field).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied()
    };
    Some(Figures {
        to_host: of(|f| f.to_host)?,
        to_guest: of(|f| f.to_guest)?,
        round_trip: of(|f| f.round_trip)?,
    })
}

/// Files to boot.
struct Parts {
    kernel: PathBuf,
    initrd: PathBuf,
    _directory: TempDir,
}

impl Parts {
    fn make(iperf: &Path) -> Result<Self, Error> {
        let directory = tempfile::tempdir()
            .map_err(Error::file("create a directory in", &std::env::temp_dir()))?;
        let appliance = Cache::of_user()?.appliance(&mut Lines)?;
        let read = |path: &Path| fs::read(path).map_err(Error::file("read", path));
        let mut bytes = read(&appliance.initramfs)?;
        bytes.extend(segment(&read(iperf)?, &libraries(iperf)?)?);
        let initrd = directory.path().join("initrd");
        fs::write(&initrd, bytes).map_err(Error::file("write", &initrd))?;
        Ok(Self {
            kernel: appliance.kernel,
            initrd,
            _directory: directory,
        })
    }

    fn words(address: &str, host: &str, port: u16) -> String {
        format!(
            "console=ttyS0 quiet panic=-1 rdinit=/bench/net address={address} host={host} port={port}"
        )
    }

    fn strata(&self, program: &Path, memory: &str, port: u16) -> Command {
        let mut command = Command::new(program);
        command
            .args([
                "run",
                "--accel",
                "soft",
                "--memory",
                memory,
                "--network",
                "user,host",
            ])
            .arg("--kernel")
            .arg(&self.kernel)
            .arg("--initrd")
            .arg(&self.initrd);
        let words = Self::words("10.0.2.2/24", "10.0.2.1", port);
        command.args(["--append", &words]);
        command
    }

    /// TCG with a network of this kind, `user` or `tap`.
    fn tcg(&self, program: &Path, memory: &str, kind: &str, port: u16) -> Command {
        let (netdev, guest, host) = match kind {
            "tap" => (
                format!("tap,id=net,ifname={},script=no,downscript=no", Tap::NAME),
                Tap::GUEST,
                Tap::HOST,
            ),
            _ => ("user,id=net".to_owned(), "10.0.2.15/24", "10.0.2.2"),
        };
        let mut command = Command::new(program);
        command
            .args([
                "-M", "q35", "-accel", "tcg", "-cpu", "max", "-smp", "1", "-m", memory,
            ])
            .args(["-nodefaults", "-no-user-config", "-nographic"])
            .args(["-serial", "stdio", "-no-reboot"])
            .args(["-netdev", &netdev, "-device", "virtio-net-pci,netdev=net"])
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(&self.initrd);
        let words = Self::words(guest, host, port);
        command.args(["-append", &words]);
        command
    }
}

/// The libraries that a program asks for, the loader among them, as ldd(1) finds them.
fn libraries(program: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut ldd = Command::new("ldd");
    let done = process::measure("ldd", ldd.arg(program), LIMITS)?;
    let path = |line: &str| {
        let word = line
            .split_ascii_whitespace()
            .find(|word| word.starts_with('/'))?;
        Some(PathBuf::from(word))
    };
    Ok(done.output.lines().filter_map(path).collect())
}

/// The initramfs segment that follows the appliance's own.
fn segment(iperf: &[u8], libraries: &[PathBuf]) -> Result<Vec<u8>, Error> {
    let script = format!(
        "#!/bin/busybox sh\n\
         export PATH=/bin LD_LIBRARY_PATH=/bench/lib\n\
         /bin/busybox --install -s /bin\n\
         mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev\n\
         modprobe -a virtio_pci virtio_net\n\
         ip link set lo up; ip address add $address dev eth0; ip link set eth0 up; sleep 1\n\
         ping -q -c 5 $host >/dev/null\n\
         echo \"{FIGURES}ping $(ping -q -c 200 -i 0.01 $host | tail -n 1)\"\n\
         for way in '' -R; do\n\
         iperf3 -c $host -p $port -t {SECONDS} -O 1 -f m $way >/result 2>&1\n\
         echo \"{FIGURES}tcp $(grep receiver /result || cat /result)\"\n\
         done\n\
         echo {DONE}\n\
         exec reboot -f\n"
    );
    let mut archive = Archive::new();
    archive.directory("bench", 0o755);
    archive.directory("bench/lib", 0o755);
    archive.directory("lib64", 0o755);
    archive.file("bench/net", 0o755, script.as_bytes());
    archive.file("bin/iperf3", 0o755, iperf);
    for path in libraries {
        let bytes = fs::read(path).map_err(Error::file("read", path))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        // The loader's place is fixed in the program.
        let folder = if path.starts_with("/lib64") {
            "lib64"
        } else {
            "bench/lib"
        };
        archive.file(&format!("{folder}/{name}"), 0o755, &bytes);
    }
    Ok(archive.finish())
}

/// Finds the script's lines, also behind other console output.
fn parse(what: &str, output: &str) -> Result<Figures, Error> {
    let lines = |kind: &str| {
        let start = format!("{FIGURES}{kind} ");
        let found = output
            .lines()
            .filter_map(move |line| Some(line.split_once(&start)?.1.to_owned()));
        found.collect::<Vec<_>>()
    };
    // round-trip min/avg/max = 0.1/0.2/0.3 ms
    let average = |line: &String| line.split('=').nth(1)?.split('/').nth(1)?.parse().ok();
    // [  5] 0.00-5.00 sec 100 MBytes 200 Mbits/sec receiver
    let speed = |line: &String| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let unit = words.iter().position(|word| *word == "Mbits/sec")?;
        words.get(unit.checked_sub(1)?)?.parse().ok()
    };
    let pings: Vec<f64> = lines("ping").iter().filter_map(average).collect();
    let speeds: Vec<f64> = lines("tcp").iter().filter_map(speed).collect();
    match (&*pings, &*speeds) {
        ([round_trip], [to_host, to_guest]) if output.contains(DONE) => Ok(Figures {
            to_host: *to_host,
            to_guest: *to_guest,
            round_trip: *round_trip,
        }),
        _ => Err(Error::Output(format!(
            "{what} measured no network, but said:\n{output}"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_found_in_a_serial_console_log() {
        let log = "x NET ping round-trip min/avg/max = 0.1/0.25/0.9 ms\r\n\
                   NET tcp [  5]   0.00-5.00   sec  1.2 GBytes  2100 Mbits/sec   receiver\r\n\
                   NET tcp [  5]   0.00-5.00   sec  0.6 GBytes  1050.5 Mbits/sec  receiver\r\n\
                   NET-DONE\r\n";
        let figures = parse("x", log).unwrap();
        let all = [figures.to_host, figures.to_guest, figures.round_trip];
        assert!(
            all.iter()
                .zip([2100.0, 1050.5, 0.25])
                .all(|(a, b)| (a - b).abs() < 1e-9)
        );
        assert!(parse("x", "NET-DONE").is_err());
    }
}
