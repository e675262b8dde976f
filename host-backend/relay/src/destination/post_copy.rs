//! Post-copy at the destination: the VM runs here while part of its memory is still at the source.
//!
//! Before the switch pages may come again and again, the last word counts. At the switch QEMU forgets the pages
//! that the source still has; from then on each of them goes to QEMU exactly once, by its stream: QEMU puts it
//! into place by userfaultfd, and ends if it is there already (`EEXIST`).

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::broadcast;
use transhume_protocol::link::{Control, GuestEnd, Stalls, Waits};

use super::endings;
use super::engine::Engine;
use super::journal::{Arrivals, Stage};
use crate::error::{CutOff, RelayError};
use crate::receive::fault_gate::Gate;
use transhume_hypervisor::Event;
use transhume_hypervisor::{Qmp, Vm};

/// How often QEMU is asked whether all memory is there.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// How long QEMU may take to say so after the source has ended the link.
const LAST_WORD: Duration = Duration::from_secs(2);
/// How long the guest's agent may take to say what its gate counted.
const LAST_COUNTS: Duration = Duration::from_secs(1);

/// What is wrong when QEMU does not want post-copy.
pub(crate) fn unsupported(host: &str, error: &transhume_hypervisor::Error) -> String {
    format!(
        "QEMU on {host} cannot take a VM in post-copy: {error}; it needs userfaultfd (/dev/userfaultfd, or \
         vm.unprivileged_userfaultfd = 1) and no limit on locked memory. `--mode pre` does without"
    )
}

/// Waits until all memory of a VM that runs here is here, and notes how that ended.
pub(crate) async fn follow(
    engine: &Engine,
    arrivals: &Arrivals,
    vm: &Arc<Vm>,
    job: u64,
    events: broadcast::Receiver<Event>,
    gate: Option<Gate>,
) {
    match complete(engine, vm, events).await {
        Ok(()) => {
            endings::whole(arrivals, vm, job);
            let stalls = stalls(vm.qmp(), gate).await;
            engine.send(Control::Stalled(stalls));
        }
        Err(CutOff::GuestEnded(how)) => guest_ended(engine, arrivals, vm, job, how).await,
        Err(CutOff::Broken(cause)) => tracing::warn!(
            vm = vm.name(),
            cause,
            "post-copy is cut off: the VM stands still where it needs memory that has not come, until the source sends it"
        ),
    }
}

/// Waits until all memory of a VM that runs here is here.
async fn complete(
    engine: &Engine,
    vm: &Vm,
    mut events: broadcast::Receiver<Event>,
) -> Result<(), CutOff> {
    loop {
        tokio::select! {
            biased;
            () = vm.gone() => return Err(qemu_ended(vm).await),
            error = engine.failure() => return last_word(vm, &error).await,
            event = events.recv() => if matches!(event, Err(broadcast::error::RecvError::Closed)) {
                return Err(qemu_ended(vm).await);
            },
            () = tokio::time::sleep(POLL_INTERVAL) => {}
        }
        if let Some(how) = vm.qmp().guest_end() {
            return Err(CutOff::GuestEnded(how));
        }
        // The source's QEMU waits for the last thing that this one says.
        if engine.is_closed() && is_complete(vm.qmp()).await {
            return Ok(());
        }
    }
}

/// The source ends the link when it knows that all is here; QEMU may need a moment more.
async fn last_word(vm: &Vm, error: &RelayError) -> Result<(), CutOff> {
    let deadline = Instant::now() + LAST_WORD;
    loop {
        if let Some(how) = vm.qmp().guest_end() {
            return Err(CutOff::GuestEnded(how));
        }
        if is_complete(vm.qmp()).await {
            return Ok(());
        }
        if vm.qmp().is_closed() {
            return Err(qemu_ended(vm).await);
        }
        if Instant::now() > deadline {
            return Err(CutOff::Broken(error.to_string()));
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// Why a QEMU ended that is gone, or is about to be.
async fn qemu_ended(vm: &Vm) -> CutOff {
    // By then all that it said was read.
    let ended = vm.ends_within(LAST_WORD).await;
    match vm.qmp().guest_end() {
        Some(how) => CutOff::GuestEnded(how),
        None if ended => CutOff::Broken("QEMU has ended".to_owned()),
        None => CutOff::Broken("the QMP connection to QEMU is lost".to_owned()),
    }
}

/// Has QEMU end whose guest has, and tells the source, which needs to keep nothing then. It ends by itself, unless it waits
/// for memory in doing so.
async fn guest_ended(engine: &Engine, arrivals: &Arrivals, vm: &Vm, job: u64, how: GuestEnd) {
    let name = vm.name();
    if !vm.ends_within(LAST_WORD).await
        && let Err(error) = vm.kill().await
    {
        tracing::warn!(vm = name, %error, "QEMU of a guest that has ended");
    }
    arrivals.note_surely(job, name, Stage::Ended(how));
    tracing::info!(
        vm = name,
        "its guest {} before all of its memory was here",
        how.did()
    );
    engine.send(Control::GuestEnded(how));
}

/// What it cost the guest. Takes a moment if the guest's agent does.
async fn stalls(qmp: &Qmp, gate: Option<Gate>) -> Stalls {
    let counts = match gate {
        Some(gate) => gate.end(LAST_COUNTS).await,
        None => None,
    };
    let said = qmp.query_migrate().await.unwrap_or_default();
    Stalls {
        cpus_ms: said.postcopy_vcpu_blocktime.unwrap_or_default(),
        all_cpus_ms: said.postcopy_blocktime.unwrap_or_default(),
        processes: counts.map(|counts| Waits {
            pages: counts.gated,
            waits: counts.waits,
            waited_us: counts.waited_us,
            longest_us: counts.longest_us,
            absent: counts.absent,
            cpu_us: counts.cpu_us,
        }),
    }
}

async fn is_complete(qmp: &Qmp) -> bool {
    let said = qmp.query_migrate().await;
    said.is_ok_and(|said| said.status.as_deref() == Some("completed"))
}
