//! Tap devices (`Documentation/networking/tuntap.rst` of Linux): a network interface of the host's
//! whose other end is a file, one frame a read, behind the header that virtio has.

use std::ffi::c_int;
use std::fs::OpenOptions;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use strata_devices::virtio::{Accepts, MAX_MESSAGE};
use strata_memory::vm_memory::VolatileSlice;
use strata_memory::vm_memory::bitmap::BitmapSlice;

use super::sys;

/// Where tap devices come from.
const TUN: &str = "/dev/net/tun";
/// Bytes of `struct virtio_net_hdr_mrg_rxbuf` (virtio 1.2 §5.1.6).
const HEADER_SIZE: c_int = 12;

/// Makes a tap device of this name, which goes with the last descriptor of it, and leaves the new
/// interface down. Needs CAP_NET_ADMIN.
///
/// # Errors
/// [`ErrorKind::NotFound`] if the host has no `/dev/net/tun`, [`ErrorKind::PermissionDenied`]
/// without the privilege, [`ErrorKind::ResourceBusy`] if there is an interface of this name.
pub fn open_tap(name: &str) -> io::Result<OwnedFd> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(TUN)?;
    // SAFETY: all zeroes is a valid `ifreq`, a structure of integers and unions of them.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_TUN_EXCL;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes an `ifreq`, which `request` is and outlives the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
    let size = HEADER_SIZE;
    // SAFETY: TUNSETVNETHDRSZ reads an int, which `size` is and outlives the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) })?;
    Ok(file.into())
}

fn check(answer: c_int) -> io::Result<()> {
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The end of a tap device that a network card has.
pub(super) struct Tap {
    device: OwnedFd,
    /// A frame that was read before there were buffers of its size: the length of one cannot be
    /// asked.
    early: Mutex<Vec<u8>>,
    ended: AtomicBool,
}

impl Tap {
    pub(super) fn new(device: OwnedFd) -> Self {
        Self {
            device,
            early: Mutex::default(),
            ended: AtomicBool::new(false),
        }
    }

    pub(super) fn device(&self) -> &OwnedFd {
        &self.device
    }

    /// There is no network behind it any more.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
    }

    pub(super) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    /// Lets the kernel hand over frames as the driver accepts them.
    pub(super) fn accept(&self, accepts: Accepts) {
        let Accepts {
            checksum,
            tso4,
            tso6,
        } = accepts;
        let flag = |on: bool, flag: libc::c_uint| if on { flag } else { 0 };
        let flags = flag(checksum, libc::TUN_F_CSUM)
            | flag(tso4, libc::TUN_F_TSO4)
            | flag(tso6, libc::TUN_F_TSO6);
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        let done = check(unsafe {
            libc::ioctl(
                self.device.as_raw_fd(),
                libc::TUNSETOFFLOAD,
                libc::c_ulong::from(flags),
            )
        });
        if let Err(error) = done {
            tracing::warn!(%error, "the tap device refuses offloads");
        }
    }

    fn early(&self) -> MutexGuard<'_, Vec<u8>> {
        self.early.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes of the next frame with its header; `None` if there is none yet.
    pub(super) fn next_length(&self) -> Option<usize> {
        let mut early = self.early();
        if early.is_empty() {
            let mut buffer = vec![0; MAX_MESSAGE];
            let length = rustix::io::read(&self.device, &mut buffer).ok()?;
            buffer.truncate(length);
            *early = buffer;
        }
        Some(early.len())
    }

    pub(super) fn drop_frame(&self) {
        self.early().clear();
    }

    /// Fills `buffers` with the next frame and its header.
    pub(super) fn receive<B: BitmapSlice>(
        &self,
        buffers: &[VolatileSlice<'_, B>],
    ) -> io::Result<usize> {
        let mut early = self.early();
        if early.is_empty() {
            return sys::receive(&self.device, buffers);
        }
        let mut rest = &early[..];
        for buffer in buffers {
            let (now, later) = rest.split_at(rest.len().min(buffer.len()));
            buffer.copy_from(now);
            rest = later;
        }
        let length = early.len() - rest.len();
        early.clear();
        Ok(length)
    }
}
