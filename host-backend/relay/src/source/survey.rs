//! What is found out before anything is touched.

use serde::Deserialize;
use transhume_protocol::link::{Offer, Signs};

use super::request::Request;
use crate::Error;
use transhume_hypervisor::preflight::Needs;
use transhume_hypervisor::{Layout, Vm, virtqueues};
use transhume_machine::definition::{Accelerator, MissedWrites};
use transhume_machine::memory_layout::Region;
use transhume_pages::digest;

/// The VM as it is here.
pub(crate) struct SourceVm {
    pub(crate) offer: Offer,
    pub(crate) layout: Vec<Region>,
    /// QEMU's migration capabilities, and their states.
    pub(crate) capabilities: Vec<(String, bool)>,
    /// Whether vCPUs run; a paused VM stays paused.
    pub(crate) running: bool,
}

/// Looks at the VM.
pub(crate) async fn examine(request: &Request) -> Result<SourceVm, Error> {
    let Request {
        vm, from, dry_run, ..
    } = request;
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
    refuse_virtio_mem(vm).await?;
    if status.running {
        refuse_missed_writes(vm).await?;
    }
    let layout = Layout::read(qmp).await.map_err(Error::refused)?;
    let capabilities = qmp.migrate_capabilities().await.map_err(Error::refused)?;
    let needs = Needs::of(vm).await.map_err(Error::refused)?;
    let virtio = virtqueues::devices(qmp).await.map_err(Error::refused)?;
    let job = random_number()?;
    let offer = Offer {
        from: from.clone(),
        job,
        first: job,
        attempt: 0,
        definition: needs.definition,
        qemu: qmp.version().into(),
        qemu_package: qmp.package().to_owned(),
        disks: needs.disks,
        cpu_flags: needs.cpu_flags,
        digest_key: digest::random_key().map_err(Error::refused)?,
        running: status.running,
        dry_run: *dry_run,
        source_job: request.job,
        autostart: request.autostart,
        // Made for each offer.
        signs: Signs {
            nonce: [0; 16],
            made: 0,
        },
        virtio,
    };
    let layout = layout.regions().to_vec();
    Ok(SourceVm {
        offer,
        layout,
        capabilities,
        running: status.running,
    })
}

/// Memory of a virtio-mem device comes and goes while the stream goes on: QEMU sends what of it there is
/// ahead of all memory (`vmstate_virtio_mem_device_early`), which the relay does not read.
async fn refuse_virtio_mem(vm: &Vm) -> Result<(), Error> {
    #[derive(Deserialize)]
    struct Device {
        #[serde(rename = "type")]
        kind: String,
    }
    let devices: Vec<Device> = vm
        .qmp()
        .query("query-memory-devices", serde_json::Value::Null)
        .await
        .map_err(Error::refused)?;
    if devices.iter().any(|device| device.kind == "virtio-mem") {
        return Err(Error::refused(format!(
            "{} has a virtio-mem device, which Transhume cannot move; unplug it (device_del), or give the VM \
             its memory at the start",
            vm.name()
        )));
    }
    Ok(())
}

/// Some QEMUs that run a VM by their translator do not see all that the guest writes while it migrates: pages arrive as
/// they once were. See [`transhume_hypervisor::Build`].
async fn refuse_missed_writes(vm: &Vm) -> Result<(), Error> {
    let (qmp, name) = (vm.qmp(), vm.name());
    let version = qmp.version();
    let definition = vm.definition();
    if version.translator_notes_writes(definition.memory.bytes()) {
        return Ok(());
    }
    let runs = qmp.accelerator().await.map_err(Error::refused)?;
    if runs == Accelerator::Kvm {
        return Ok(());
    }
    if definition.missed_writes == MissedWrites::Accept {
        tracing::warn!(
            vm = name,
            %version,
            "QEMU's translator may miss pages that the guest writes while it moves, which its definition accepts"
        );
        return Ok(());
    }
    Err(Error::refused(format!(
        "{name} runs without KVM, by the translator of QEMU {version}, which misses pages that a guest writes while it \
         moves: it may arrive damaged. Pause it (`transhume vm pause {name}`), move it, and let it run again there \
         (`transhume vm resume {name}`); KVM, and the translator of QEMU 9.0 to 10.0, do not have this fault. For a VM that \
         may be damaged, `missed-writes = \"accept\"` in its definition lets it move"
    )))
}

fn random_number() -> Result<u64, Error> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(Error::refused)?;
    Ok(u64::from_le_bytes(bytes))
}

impl SourceVm {
    /// Makes the offer another one of the same migration.
    pub(crate) fn renew_offer(&mut self) -> Result<(), Error> {
        self.offer.job = random_number()?;
        self.offer.attempt = self.offer.attempt.saturating_add(1);
        Ok(())
    }
}
