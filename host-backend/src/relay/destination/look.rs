//! What the destination looks at before it says yes.

use transhume_protocol::link::Offer;

use crate::hypervisor::{Definition, LaunchSettings, preflight};

/// What was found to fit.
pub(super) struct Fit {
    /// The definition, its machine type spelled out as the source runs it.
    pub(super) definition: Definition,
    /// QEMU's version here.
    pub(super) qemu: [u32; 3],
    /// Whether QEMU here can hold the switch-over back.
    pub(super) switchover_ack: bool,
}

/// QEMU has `switchover-ack` from this version on.
const SWITCHOVER_ACK_SINCE: [u32; 2] = [8, 1];

/// Looks whether the VM could run here; every reason against it is named.
pub(super) async fn at(offer: &Offer, settings: &LaunchSettings) -> Result<Fit, Vec<String>> {
    let mut definition =
        Definition::parse(&offer.definition).map_err(|error| vec![error.to_string()])?;
    definition.machine.clone_from(&offer.machine);
    let disks: Vec<(String, u64)> =
        offer.disks.iter().map(|disk| (disk.id.clone(), disk.size)).collect();
    let version = preflight::check(&definition, &disks, offer.qemu, settings).await?;
    let qemu = [version.major, version.minor, version.micro];
    Ok(Fit { definition, qemu, switchover_ack: qemu[..2] >= SWITCHOVER_ACK_SINCE[..] })
}
