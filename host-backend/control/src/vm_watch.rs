//! Sees VMs end by themselves.

use super::daemon::Daemon;
use std::sync::Arc;
use std::time::Duration;
use transhume_hypervisor::Vm;

/// How long QEMU may take to end after its QMP connection has.
const TIMEOUT: Duration = Duration::from_secs(5);

impl Daemon {
    /// Waits until a VM's QEMU has ended, and notes that the VM has stopped.
    pub(super) async fn watch(self: Arc<Self>, vm: Arc<Vm>) {
        let reason = shutdown_reason(&vm).await;
        let ended = tokio::time::timeout(TIMEOUT, vm.gone()).await.is_ok();
        // A migration ends the source's QEMU, and says itself what became of the VM.
        if let Some(job) = self.jobs.active(vm.name()) {
            job.ended().await;
        }
        if !self.table.has(&vm) {
            return;
        }
        if ended {
            let record = self.table.record(&vm);
            self.table.stop(record, |entry| entry.is(&vm), &reason);
        } else {
            let reason = "its QMP connection is lost, and its process lives".to_owned();
            self.table.lose(self.table.record(&vm), reason);
        }
    }
}

async fn shutdown_reason(vm: &Vm) -> String {
    // All that QEMU said was read before this.
    vm.qmp().closed().await;
    if let Some(said) = vm.qmp().shutdown() {
        return said.to_string();
    }
    let log = vm.files().qemu_log();
    match vm.files().logs().last_words() {
        Some(words) => format!("its QEMU ended; the end of {}:\n{words}", log.display()),
        None => format!("its QEMU ended without a word: see {}", log.display()),
    }
}
