//! What the destination looks at before it says yes.

use transhume_protocol::link::Offer;

use crate::hypervisor::qmp::Version;
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
const SWITCHOVER_ACK_SINCE: (u32, u32) = (8, 1);

/// Looks whether the VM could run here; every reason against it is named.
pub(super) async fn at(offer: &Offer, settings: &LaunchSettings) -> Result<Fit, Vec<String>> {
    let [major, minor, micro] = offer.qemu;
    let judged = preflight::Offer {
        definition: offer.definition.clone(),
        version: Version {
            major,
            minor,
            micro,
        },
        disks: offer
            .disks
            .iter()
            .map(|disk| preflight::OfferedDisk {
                id: disk.id.clone(),
                bytes: disk.size,
            })
            .collect(),
        cpu_flags: offer.cpu_flags.clone(),
    };
    let definition = judged
        .check(settings)
        .await
        .map_err(|refusals| refusals.iter().map(ToString::to_string).collect::<Vec<_>>())?;
    let Some(version) = preflight::version_here(&definition, settings).await else {
        return Err(vec![format!(
            "QEMU on {} does not tell its version",
            settings.host
        )]);
    };
    Ok(Fit {
        definition,
        qemu: [version.major, version.minor, version.micro],
        switchover_ack: (version.major, version.minor) >= SWITCHOVER_ACK_SINCE,
    })
}
