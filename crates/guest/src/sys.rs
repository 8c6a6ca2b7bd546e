//! The few calls that need unsafe code. Called by everything here.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use libc::{c_char, c_short};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{AddressFamily, SocketType, socket};
use rustix::process::{
    Gid, Pid, Signal, Uid, ioctl_tiocsctty, kill_process, kill_process_group, setsid,
};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

/// Who a program runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) user: u32,
    pub(crate) group: u32,
    pub(crate) groups: Vec<u32>,
}

/// Makes the program lead a session of its own, with its standard input as the terminal if
/// `terminal`, and then run as `identity`.
pub(crate) fn set_up(command: &mut Command, identity: Option<&Identity>, terminal: bool) {
    let identity = identity.cloned().map(|identity| {
        let groups: Vec<Gid> = identity.groups.into_iter().map(Gid::from_raw).collect();
        (
            Uid::from_raw(identity.user),
            Gid::from_raw(identity.group),
            groups,
        )
    });
    let prepare = move || {
        setsid()?;
        if terminal {
            ioctl_tiocsctty(rustix::stdio::stdin())?;
        }
        if let Some((user, group, groups)) = &identity {
            set_thread_groups(groups)?;
            set_thread_res_gid(*group, *group, *group)?;
            set_thread_res_uid(*user, *user, *user)?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes system calls on what was allocated before,
    // and nothing else: no locks, no memory.
    unsafe { command.pre_exec(prepare) };
}

/// Sends a signal to every process but this one and the kernel's.
pub(crate) fn signal_all(signal: Signal) {
    // SAFETY: kill(2) touches no memory.
    unsafe { libc::kill(-1, signal.as_raw()) };
}

/// The signal with this number.
pub(crate) fn signal(number: u8) -> Option<Signal> {
    let last = libc::SIGRTMAX();
    if number == 0 || i32::from(number) > last {
        return None;
    }
    // SAFETY: the number is that of a signal. None that the C library keeps to itself (32, 33)
    // is used by what is signalled in a way that memory depends on: any process may get them.
    Some(unsafe { Signal::from_raw_unchecked(number.into()) })
}

/// Sends a program a signal as a terminal would: those of keys and of a hang-up to its whole process
/// group, which it leads.
pub(crate) fn pass(signal: Signal, to: Pid) -> rustix::io::Result<()> {
    match signal {
        Signal::INT | Signal::QUIT | Signal::HUP => kill_process_group(to, signal),
        _ => kill_process(to, signal),
    }
}

/// A descriptor that process 1 left open for this process: no other has it from now on, nor does what
/// is started from here. Each may be taken once.
pub(crate) fn take_inherited(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: descriptors of standard streams are not given, and what process 1 passes is used by
    // nobody else here. That it is open is seen before it is owned.
    let fd = unsafe {
        let borrowed = BorrowedFd::borrow_raw(number.max(3));
        fcntl_setfd(borrowed, FdFlags::CLOEXEC)?;
        OwnedFd::from_raw_fd(borrowed.as_raw_fd())
    };
    Ok(fd)
}

/// Makes streams belong to a program's user, or it could not open them anew.
pub(crate) fn give<const N: usize>(streams: [&OwnedFd; N], identity: &Identity) {
    for stream in streams {
        let (user, group) = (Uid::from_raw(identity.user), Gid::from_raw(identity.group));
        let _ = rustix::fs::fchown(stream, Some(user), Some(group));
    }
}

/// A request of netdevice(7) or rtentry, filled with zeroes.
fn zeroed<T>() -> T
where
    T: Plain,
{
    // SAFETY: `Plain` says that zeroes are a value.
    unsafe { std::mem::zeroed() }
}

/// C structures for which all zeroes are a value.
trait Plain {}
impl Plain for libc::ifreq {}
impl Plain for libc::rtentry {}

fn interface(name: &str) -> libc::ifreq {
    let mut request: libc::ifreq = zeroed();
    // The last byte stays 0.
    for (to, from) in request.ifr_name[..libc::IFNAMSIZ - 1]
        .iter_mut()
        .zip(name.bytes())
    {
        *to = from as c_char;
    }
    request
}

fn address(of: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0; 14];
    for (to, from) in data[2..6].iter_mut().zip(of.octets()) {
        *to = from as c_char;
    }
    libc::sockaddr {
        sa_family: libc::AF_INET as libc::sa_family_t,
        sa_data: data,
    }
}

fn ioctl<T>(on: &impl AsFd, number: libc::Ioctl, argument: &mut T) -> io::Result<()> {
    // SAFETY: the callers pass numbers whose argument is a `T` in and out, and it is valid for
    // that long.
    let result = unsafe { libc::ioctl(on.as_fd().as_raw_fd(), number, argument) };
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Brings a network interface up.
pub(crate) fn interface_up(name: &str) -> io::Result<()> {
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    let mut request = interface(name);
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as c_short;
    ioctl(&socket, libc::SIOCSIFFLAGS, &mut request)
}

/// Gives an interface its address, and the mask of the network there.
pub(crate) fn set_address(name: &str, own: Ipv4Addr, bits: u8) -> io::Result<()> {
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    let mut request = interface(name);
    request.ifr_ifru.ifru_addr = address(own);
    ioctl(&socket, libc::SIOCSIFADDR, &mut request)?;
    let mask = u32::MAX
        .checked_shl(32 - u32::from(bits.min(32)))
        .unwrap_or(0);
    request.ifr_ifru.ifru_netmask = address(Ipv4Addr::from_bits(mask));
    ioctl(&socket, libc::SIOCSIFNETMASK, &mut request)
}

/// Sends what is for elsewhere to `gateway`.
pub(crate) fn set_default_route(gateway: Ipv4Addr) -> io::Result<()> {
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    let mut route: libc::rtentry = zeroed();
    route.rt_dst = address(Ipv4Addr::UNSPECIFIED);
    route.rt_genmask = address(Ipv4Addr::UNSPECIFIED);
    route.rt_gateway = address(gateway);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    ioctl(&socket, libc::SIOCADDRT, &mut route)
}

/// `struct rand_pool_info` of random(4), with room for a seed.
#[repr(C)]
struct Pool {
    entropy_count: i32,
    buf_size: i32,
    buf: [u8; MAX_SEED],
}

/// Longest seed, bytes.
pub(crate) const MAX_SEED: usize = 512;

/// `RNDADDENTROPY` and `RNDRESEEDCRNG` of random(4).
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;
const RNDRESEEDCRNG: libc::Ioctl = 0x5207;

/// Adds a seed to the kernel's random numbers, all of it as entropy, and begins anew from it.
pub(crate) fn reseed(random: &impl AsFd, seed: &[u8]) -> io::Result<()> {
    let seed = &seed[..seed.len().min(MAX_SEED)];
    let mut pool = Pool {
        entropy_count: seed.len() as i32 * 8,
        buf_size: seed.len() as i32,
        buf: [0; MAX_SEED],
    };
    pool.buf[..seed.len()].copy_from_slice(seed);
    ioctl(random, RNDADDENTROPY, &mut pool)?;
    ioctl(random, RNDRESEEDCRNG, &mut 0)
}
