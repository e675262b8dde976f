//! A QEMU is started for a VM that comes, and says whether it could load it.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use transhume_protocol::link::{Control, Offer, PostCopy};

use super::decision::Decision;
use super::engine::{Target, Way};
use super::journal::Stage;
use super::offer_check::AcceptedOffer;
use super::{post_copy, run_directory};
use crate::storage::shown::Comparer;
use transhume_base::process_memory::GuestMemory;
use transhume_hypervisor::command_line::Start;
use transhume_hypervisor::qmp::Version;
use transhume_hypervisor::{LaunchSettings, OpenedFiles, Vm, memory, stream, virtqueues};
use transhume_volume as volume;

/// A QEMU that waits for its stream.
pub(crate) struct Prepared {
    pub(crate) vm: Vm,
    pub(crate) target: Target,
    /// Why it does not wait for one in post-copy, which was left to it.
    pub(crate) no_post_copy: Option<String>,
}

impl Prepared {
    pub(crate) async fn new(
        decision: &Decision,
        fit: &AcceptedOffer,
        settings: &LaunchSettings,
        offer: &Offer,
        switchover_ack: bool,
        post_copy: PostCopy,
        comparer: Comparer,
    ) -> Result<Self, String> {
        decision.note(Stage::Waiting)?;
        let limits = decision.host.may_send(&offer.from)?;
        // Once for QEMU and for the relay's own reading, and checked as it was opened.
        let opened = OpenedFiles::open_in_time(&fit.definition, settings, Some(&limits)).await;
        let opened = Arc::new(opened.map_err(|error| error.to_string())?);
        let volumes = open_volumes(fit, settings, Arc::clone(&opened));
        let files = settings.files(&fit.definition.name);
        let folder = files.folder();
        let text = fit
            .definition
            .to_toml()
            .map_err(|error| error.to_string())?;
        run_directory::begin(folder, &text, offer.job, &run_directory::label(offer))
            .map_err(|error| format!("{}: {error}", folder.display()))?;
        let logs = files.logs();
        let what = if offer.dry_run {
            "a dry run, for which the VM stays there, asks from"
        } else {
            "the VM comes from"
        };
        logs.note(&format!("{what} {}", offer.from))
            .map_err(|error| error.to_string())?;
        let launched = Vm::launch(&fit.definition, settings, Start::Incoming, &opened);
        let (launched, volumes) = tokio::join!(launched, volumes);
        // A lock of QEMU's would last as long as these.
        drop(opened);
        let vm = match launched {
            Ok(vm) => vm,
            Err(error) => {
                // The error has QEMU's last words. Another QEMU of that name would keep its files.
                if UnixStream::connect(files.qmp()).is_err()
                    && let Err(error) = files.remove()
                {
                    tracing::warn!(%error, "run directory of a QEMU that did not start");
                }
                return Err(error.to_string());
            }
        };
        let volumes = volumes.and_then(|volumes| check_sizes(fit, offer, volumes));
        let volumes = check_queues(&vm, offer, &settings.host).await.and(volumes);
        let taken = take_post_copy(&vm, post_copy, &settings.host).await;
        let stream = match &taken {
            Err(reason) if post_copy == PostCopy::Yes => Err(reason.clone()),
            _ => connect(&vm, switchover_ack, offer.running).await,
        };
        match (stream, volumes) {
            (Ok(qemu), Ok(volumes)) => Ok(Self {
                target: Target {
                    qemu,
                    volumes,
                    comparer: Some(comparer),
                    memory: reach_memory(&vm).await,
                    memory_bytes: fit.definition.memory.bytes(),
                    way: match taken {
                        Ok(true) => Way::PostCopy {
                            loads_first: loads_first(offer),
                        },
                        _ => Way::PreCopy,
                    },
                },
                vm,
                no_post_copy: taken.err(),
            }),
            (Err(reason), _) | (_, Err(reason)) => {
                if vm.kill().await.is_ok() {
                    let _ = vm.files().remove();
                }
                Err(reason)
            }
        }
    }
}

/// The guest's memory; without it all pages go by QEMU's stream, which is slower.
async fn reach_memory(vm: &Vm) -> Option<GuestMemory> {
    match memory::guest_memory(vm).await {
        Ok(memory) => Some(memory),
        Err(error) => {
            tracing::warn!(vm = vm.name(), %error, "pages go by QEMU's stream");
            None
        }
    }
}

/// Opens the disks for reading, away from the event loop.
async fn open_volumes(
    fit: &AcceptedOffer,
    settings: &LaunchSettings,
    files: Arc<OpenedFiles>,
) -> Result<Vec<Box<dyn volume::Reader>>, String> {
    let mut run = volume::Settings::new(settings.run_directory.clone())
        .beside(settings.binary(&fit.definition));
    run.user.clone_from(&settings.user);
    let opened = transhume_base::task::blocking(move || {
        let images = files.images.iter();
        images
            .map(|image| volume::open_image(image, &run))
            .collect::<Result<Vec<_>, _>>()
    });
    opened
        .await
        .map_err(|error| error.to_string())?
        .map_err(|error| error.to_string())
}

/// The disks as they were opened: what was looked at before may have been another file.
fn check_sizes(
    fit: &AcceptedOffer,
    offer: &Offer,
    volumes: Vec<Box<dyn volume::Reader>>,
) -> Result<Vec<Box<dyn volume::Reader>>, String> {
    for (disk, volume) in fit.definition.disks.iter().zip(&volumes) {
        let offered = offer.disks.iter().find(|offered| offered.id == disk.id);
        let (here, there) = (volume.size(), offered.map(|offered| offered.size));
        if there != Some(here) {
            return Err(format!(
                "disk {} has {} bytes at the source, and {here} here; see whether both hosts name the same disk",
                disk.id,
                there.unwrap_or_default(),
            ));
        }
    }
    Ok(volumes)
}

/// Lets QEMU take a VM in post-copy if one may come so, which is returned, or tells why it does not.
async fn take_post_copy(vm: &Vm, post_copy: PostCopy, host: &str) -> Result<bool, String> {
    if post_copy == PostCopy::No {
        return Ok(false);
    }
    // QEMU looks at the kernel then.
    let set = vm.qmp().migrate_set_capabilities(&[("postcopy-ram", true)]);
    set.await
        .map_err(|error| post_copy::unsupported(host, &error))?;
    // How long CPUs stand still then is good to know, and not needed.
    let set = vm
        .qmp()
        .migrate_set_capabilities(&[("postcopy-blocktime", true)]);
    if let Err(error) = set.await {
        tracing::debug!(%error, "postcopy-blocktime");
    }
    Ok(true)
}

/// Lets QEMU take the stream from a socket of ours.
async fn connect(vm: &Vm, switchover_ack: bool, running: bool) -> Result<UnixStream, String> {
    let text = |error: transhume_hypervisor::Error| error.to_string();
    let mut capabilities = vec![("return-path", true), ("events", true)];
    if running {
        // The disks' locks are taken by `cont` alone: until then the source can have them back. A VM that
        // stays paused takes them now: QEMU before 8.1 cannot move it again otherwise.
        capabilities.push(("late-block-activate", true));
    }
    if switchover_ack {
        capabilities.push(("switchover-ack", true));
    }
    vm.qmp()
        .migrate_set_capabilities(&capabilities)
        .await
        .map_err(text)?;
    let (ours, theirs) = stream::pair().map_err(|error| error.to_string())?;
    vm.qmp().migrate_incoming(theirs).await.map_err(text)?;
    Ok(ours)
}

/// Whether the source's QEMU keeps the VM until its devices are loaded here.
pub(crate) fn loads_first(offer: &Offer) -> bool {
    Version::from(offer.qemu).keeps_until_loaded()
}

/// Whether the QEMU that waits for the VM has room for its virtqueues; if not, why.
async fn check_queues(vm: &Vm, offer: &Offer, host: &str) -> Result<(), String> {
    let found = virtqueues::too_long(vm.qmp(), &offer.virtio).await;
    let Some(virtqueues::TooLong { kind, length, room }) =
        found.map_err(|error| error.to_string())?
    else {
        return Ok(());
    };
    let there = Version::from(offer.qemu);
    let (name, here, from) = (vm.name(), vm.qmp().version(), &offer.from);
    Err(format!(
        "QEMU {there} on {from} made a queue of {kind} {length} entries long; QEMU {here} on {host} has room \
         for {room}, and cannot load it: shut {name} down and start it on {host}, or move it to a host with the QEMU of {from}"
    ))
}

/// A dry run: prepares a QEMU for the VM, and ends it. What that shows is added to what is `accepted`; an error is why the
/// VM cannot come.
pub(crate) async fn rehearse(
    decision: &Decision,
    fit: &AcceptedOffer,
    settings: &LaunchSettings,
    offer: &Offer,
    mut accepted: Control,
    comparer: Comparer,
) -> Result<Control, String> {
    let prepared = Prepared::new(
        decision,
        fit,
        settings,
        offer,
        fit.switchover_ack,
        PostCopy::Perhaps,
        comparer,
    )
    .await
    .inspect_err(|_| decision.end(Stage::Refused))?;
    decision.abandon(&prepared.vm).await;
    if let Control::Accepted { no_post_copy, .. } = &mut accepted {
        *no_post_copy = no_post_copy.take().or(prepared.no_post_copy);
    }
    Ok(accepted)
}
