//! What a QEMU here says of a VM before anything of it comes: whether it could load its state.

use transhume_protocol::link::Offer;

use crate::hypervisor::{Vm, virtqueues};

/// Whether the QEMU that waits for the VM has room for its virtqueues; if not, why.
pub(super) async fn check_queues(vm: &Vm, offer: &Offer, host: &str) -> Result<(), String> {
    let devices: Vec<_> = offer
        .virtio
        .iter()
        .map(|device| virtqueues::Device {
            path: device.path.clone(),
            kind: device.kind.clone(),
            lengths: device.lengths.clone(),
        })
        .collect();
    let found = virtqueues::too_long(vm.qmp(), &devices).await;
    let Some(virtqueues::TooLong { kind, length, room }) =
        found.map_err(|error| error.to_string())?
    else {
        return Ok(());
    };
    let [major, minor, micro] = offer.qemu;
    let (name, here, from) = (vm.name(), vm.qmp().version(), &offer.from);
    Err(format!(
        "QEMU {major}.{minor}.{micro} on {from} made a queue of {kind} {length} entries long; QEMU {here} on {host} has room \
         for {room}, and cannot load it: shut {name} down and start it on {host}, or move it to a host with the QEMU of {from}"
    ))
}
