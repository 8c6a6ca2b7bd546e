//! The worker of the entropy device: fills requests from the host's `getrandom`.

use std::sync::Arc;

use rustix::rand::{GetRandomFlags, getrandom};
use strata_devices::virtio::Entropy;

use super::doorbell::Doorbell;
use super::root::Shared;

/// Serves requests until the doorbell stops it.
pub(super) fn serve(shared: &Arc<Shared<Entropy>>, bell: &Doorbell) {
    while bell.wait() {
        loop {
            let next = shared.with(|entropy, transport| entropy.next_request(transport));
            let Some(request) = next else {
                if shared.with(|_, transport| transport.rearm(0)) {
                    continue;
                }
                break;
            };
            let mut bytes = vec![0; request.length()];
            let filled = random(&mut bytes);
            shared.with(|entropy, transport| {
                entropy.complete(transport, request, &bytes[..filled]);
            });
        }
    }
}

/// Fills `bytes` and returns how many it could: all of them, unless the host has no
/// `getrandom`.
fn random(bytes: &mut [u8]) -> usize {
    let mut filled = 0;
    while filled < bytes.len() {
        match getrandom(&mut bytes[filled..], GetRandomFlags::empty()) {
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => break,
        }
    }
    filled
}
