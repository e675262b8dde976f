//! Sees VMs end by themselves.

use super::daemon::Daemon;
use crate::hypervisor::Vm;
use crate::hypervisor::qmp::Event;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::broadcast::error::RecvError;

/// How long QEMU may take to end after its QMP connection has.
const PATIENCE: Duration = Duration::from_secs(5);

/// Waits until a VM's QEMU has ended, and notes that the VM has stopped.
pub(super) async fn watch(daemon: Arc<Daemon>, vm: Arc<Vm>) {
    let reason = shutdown_reason(&vm).await;
    let ended = tokio::time::timeout(PATIENCE, vm.gone()).await.is_ok();
    // A migration ends the source's QEMU, and says itself what became of the VM.
    if let Some(job) = daemon.jobs.active(vm.name()) {
        job.ended().await;
    }
    if !daemon.table.has(&vm) {
        return;
    }
    if ended {
        let record = daemon.table.record(&vm);
        daemon.table.stop(record, |entry| entry.is(&vm), &reason);
    } else {
        let reason = "its QMP connection is lost, and its process lives".to_owned();
        daemon.table.lose(daemon.table.record(&vm), reason);
    }
}

async fn shutdown_reason(vm: &Vm) -> String {
    let mut events = vm.qmp().events();
    let mut cause = None;
    loop {
        tokio::select! {
            // What QEMU says comes before the end of what it says.
            biased;
            event = events.recv() => match event {
                Ok(Event { name, data, .. }) if name == "SHUTDOWN" => {
                    cause = data["reason"].as_str().map(str::to_owned);
                }
                Ok(_) | Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => break,
            },
            _ = vm.qmp().closed() => break,
        }
    }
    match cause.as_deref() {
        Some("guest-shutdown") => "its guest shut down".to_owned(),
        Some("host-qmp-quit" | "host-signal") => "its QEMU was told to end".to_owned(),
        Some(other) => format!("its QEMU ended ({other})"),
        None => {
            let log = vm.files().qemu_log();
            match vm.files().logs().last_words() {
                Some(words) => format!("its QEMU ended; the end of {}:\n{words}", log.display()),
                None => format!("its QEMU ended without a word: see {}", log.display()),
            }
        }
    }
}
