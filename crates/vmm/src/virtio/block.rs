//! The workers of a disk: one thread for each request queue.

use std::sync::Arc;

use strata_devices::virtio::Block;
use strata_memory::Ram;

use super::disk::Disk;
use super::doorbell::Doorbell;
use super::root::Shared;

/// Serves one queue until the doorbell stops it, and then what is still in the queue.
pub(super) fn serve(
    shared: &Arc<Shared<Block>>,
    disk: &Disk,
    memory: &Ram,
    queue: usize,
    bell: &Doorbell,
) {
    while bell.wait() {
        drain(shared, disk, memory, queue);
    }
    drain(shared, disk, memory, queue);
}

fn drain(shared: &Arc<Shared<Block>>, disk: &Disk, memory: &Ram, queue: usize) {
    let mut next = shared.with(|block, transport| block.next_request(transport, queue));
    loop {
        let Some(request) = next else {
            if !shared.with(|_, transport| transport.rearm(queue)) {
                return;
            }
            next = shared.with(|block, transport| block.next_request(transport, queue));
            continue;
        };
        let status = disk.perform(memory, &request.action);
        next = shared.with(|block, transport| {
            block.complete(transport, queue, request, status);
            block.next_request(transport, queue)
        });
    }
}
