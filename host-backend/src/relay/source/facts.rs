//! What is found out before anything is touched.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use transhume_protocol::link::{Control, Offer, OfferedDisk};

use crate::hypervisor::layout::{Layout, Region};
use crate::hypervisor::{Vm, preflight};
use crate::link::{Connection, PATIENCE};
use crate::pages::digest;
use crate::relay::Error;

/// How long the destination may look at its disks and its QEMU.
const LOOK_PATIENCE: Duration = Duration::from_secs(30);

/// What a dry run found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Plan {
    /// The VM.
    pub vm: String,
    /// The host that runs it.
    pub from: String,
    /// The host that would take it.
    pub to: String,
    /// The machine type, its version spelled out.
    pub machine: String,
    /// QEMU's version here.
    pub qemu_from: String,
    /// QEMU's version there.
    pub qemu_to: String,
    /// Memory, in bytes.
    pub memory_bytes: u64,
    /// Whether the destination can hold the switch-over back until every page is in place.
    pub switchover_ack: bool,
}

impl fmt::Display for Plan {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            out,
            "{} can move from {} to {}.",
            self.vm, self.from, self.to
        )?;
        writeln!(
            out,
            "  machine  {}, {} MiB",
            self.machine,
            self.memory_bytes >> 20
        )?;
        write!(
            out,
            "  QEMU     {} here, {} there",
            self.qemu_from, self.qemu_to
        )
    }
}

/// The VM as it is here.
pub(super) struct Facts {
    pub(super) offer: Offer,
    pub(super) layout: Vec<Region>,
    pub(super) capabilities: Vec<String>,
    /// Whether vCPUs run; a paused VM stays paused.
    pub(super) running: bool,
}

/// Looks at the VM.
pub(super) async fn examine(vm: &Vm, from: &str, dry_run: bool) -> Result<Facts, Error> {
    let qmp = vm.qmp();
    let status = qmp.status().await.map_err(Error::refused)?;
    if !matches!(status.status.as_str(), "running" | "paused") {
        return Err(Error::refused(format!(
            "QEMU says that {} is \"{}\", and only a VM that runs or is paused can be moved; see `transhume \
             vm show {}`",
            vm.name(),
            status.status,
            vm.name()
        )));
    }
    let layout = Layout::read(qmp).await.map_err(Error::refused)?;
    let capabilities = qmp.migrate_capabilities().await.map_err(Error::refused)?;
    let vm_offer = preflight::Offer::of(vm).await.map_err(Error::refused)?;
    let version = vm_offer.version;
    let disk = |disk: preflight::OfferedDisk| OfferedDisk {
        id: disk.id,
        size: disk.bytes,
    };
    let offer = Offer {
        from: from.to_owned(),
        job: u64::from_le_bytes(random()?),
        definition: vm_offer.definition,
        qemu: [version.major, version.minor, version.micro],
        disks: vm_offer.disks.into_iter().map(disk).collect(),
        cpu_flags: vm_offer.cpu_flags,
        digest_key: digest::random_key().map_err(Error::refused)?,
        running: status.running,
        dry_run,
    };
    let capabilities = capabilities.into_iter().map(|(name, _)| name).collect();
    let layout = layout.regions().to_vec();
    Ok(Facts {
        offer,
        layout,
        capabilities,
        running: status.running,
    })
}

fn random() -> Result<[u8; 8], Error> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(Error::refused)?;
    Ok(bytes)
}

/// What the destination accepted.
pub(super) struct Accepted {
    pub(super) connection: Connection,
    pub(super) qemu: [u32; 3],
    /// Both QEMUs have `switchover-ack`.
    pub(super) switchover_ack: bool,
}

/// Offers the VM to a peer. Blocks.
pub(super) fn negotiate(address: &str, offer: Offer, has_ack: bool) -> Result<Accepted, Error> {
    let mut connection = Connection::open(address).map_err(Error::refused)?;
    connection
        .send(&Control::Offer(Box::new(offer)))
        .map_err(Error::refused)?;
    match connection
        .receive(LOOK_PATIENCE.max(PATIENCE))
        .map_err(Error::refused)?
    {
        Control::Accepted {
            qemu,
            switchover_ack,
        } => Ok(Accepted {
            connection,
            qemu,
            switchover_ack: switchover_ack && has_ack,
        }),
        Control::Refused { reasons } => Err(Error::Refused { reasons }),
        _ => Err(Error::refused(
            "the other host answered an offer with something else",
        )),
    }
}
