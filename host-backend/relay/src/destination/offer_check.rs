//! What the destination looks at before it says yes.

use transhume_protocol::link::Offer;

use transhume_hypervisor::qmp::Version;
use transhume_hypervisor::{Build, LaunchSettings, preflight};
use transhume_machine::Definition;

/// What was found to fit.
pub(crate) struct AcceptedOffer {
    /// The definition, its machine type spelled out as the source runs it.
    pub(crate) definition: Definition,
    /// QEMU's version here.
    pub(crate) qemu: [u32; 3],
    /// Whether QEMU here can hold the switch-over back.
    pub(crate) switchover_ack: bool,
    /// Why the VM must not come in post-copy.
    pub(crate) no_post_copy: Option<String>,
}

/// Looks whether the VM could run here; every reason against it is named.
pub(crate) async fn check(
    offer: &Offer,
    settings: &LaunchSettings,
) -> Result<AcceptedOffer, Vec<String>> {
    let there = Build {
        version: Version::from(offer.qemu),
        package: offer.qemu_package.clone(),
    };
    let definition = preflight::check(offer, settings)
        .await
        .map_err(|refusals| refusals.iter().map(ToString::to_string).collect::<Vec<_>>())?;
    let Some(here) = preflight::build_here(&definition, settings).await else {
        return Err(vec![format!(
            "QEMU on {} does not tell its version",
            settings.host
        )]);
    };
    let version = here.version;
    Ok(AcceptedOffer {
        no_post_copy: there.no_post_copy_to(&here, &settings.host),
        definition,
        qemu: version.into(),
        switchover_ack: version.has_switchover_ack(),
    })
}
