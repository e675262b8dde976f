//! How long a VM's virtqueues are. A QEMU does not load a queue that is longer than its device has room for: 10.0.13 makes
//! every queue 1,024 long, and 11.1 has room for 8 to 256 (`virtio_load` in QEMU's hw/virtio/virtio.c). It would find that
//! out after all memory has moved.

use super::{Qmp, Result};
use serde::Deserialize;
use serde_json::{Value, json};
use transhume_protocol::link::OfferedVirtio;

/// Queues of a device, at most (`VIRTIO_QUEUE_MAX`).
const LIMIT: u16 = 1024;

/// A queue that is too long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TooLong {
    /// Its device.
    pub kind: String,
    /// How long it is.
    pub length: u32,
    /// How long it may be.
    pub room: u32,
}

#[derive(Deserialize)]
struct Found {
    path: String,
    name: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Queue {
    vring_num: u32,
    vring_num_default: u32,
}

/// The devices; none of a QEMU that is not asked. A device whose queues another process serves is left out: QEMU would
/// have to ask that process, which may stop them.
///
/// # Errors
/// As [`Qmp::query`].
pub async fn devices(qmp: &Qmp) -> Result<Vec<OfferedVirtio>> {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Status {
        num_vqs: u16,
        #[serde(default)]
        vhost_started: bool,
    }
    let mut devices = Vec::new();
    if !qmp.version().tells_virtqueues() {
        return Ok(devices);
    }
    for Found { path, name: kind } in found(qmp).await? {
        let of_device = json!({ "path": path });
        let status: Status = qmp.query("x-query-virtio-status", of_device).await?;
        if status.vhost_started {
            continue;
        }
        let mut lengths = Vec::new();
        for number in 0..status.num_vqs.min(LIMIT) {
            lengths.push(queue(qmp, &path, number).await?.vring_num);
        }
        devices.push(OfferedVirtio {
            path,
            kind,
            lengths,
        });
    }
    Ok(devices)
}

/// The first queue of those devices for which this QEMU has no room, which waits for them.
///
/// # Errors
/// As [`Qmp::query`].
pub async fn too_long(qmp: &Qmp, devices: &[OfferedVirtio]) -> Result<Option<TooLong>> {
    if devices.is_empty() || qmp.version().is_untried() {
        return Ok(None);
    }
    for Found { path, .. } in found(qmp).await? {
        let Some(there) = devices.iter().find(|device| device.path == path) else {
            continue;
        };
        for (number, &length) in (0..LIMIT).zip(&there.lengths) {
            let room = queue(qmp, &path, number).await?.vring_num_default;
            if length > room {
                let kind = there.kind.clone();
                return Ok(Some(TooLong { kind, length, room }));
            }
        }
    }
    Ok(None)
}

async fn found(qmp: &Qmp) -> Result<Vec<Found>> {
    match qmp.query("x-query-virtio", Value::Null).await {
        Err(super::Error::Refused { .. }) => Ok(Vec::new()),
        answer => answer,
    }
}

async fn queue(qmp: &Qmp, path: &str, queue: u16) -> Result<Queue> {
    let arguments = json!({ "path": path, "queue": queue });
    qmp.query("x-query-virtio-queue-status", arguments).await
}
