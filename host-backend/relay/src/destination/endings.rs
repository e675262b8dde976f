//! How a VM in post-copy comes to its end: all of its memory is here, or its QEMU is gone.

use std::sync::Arc;

use super::journal::{Arrivals, Stage};
use super::run_directory;
use transhume_hypervisor::Vm;

/// All memory of a VM in post-copy is here: that is noted.
pub(crate) fn whole(arrivals: &Arrivals, vm: &Vm, job: u64) {
    let name = vm.name();
    arrivals.note_surely(job, name, Stage::Taken);
    if let Err(error) = run_directory::settle(vm.files().folder()) {
        tracing::warn!(vm = name, %error, "run directory of the VM that arrived");
    }
    tracing::info!(vm = name, "all of its memory is here");
}

/// When the QEMU of a VM in post-copy ends, there is nothing that the source could send the rest to.
pub(crate) fn forget_when_gone(arrivals: &Arrivals, vm: &Arc<Vm>, job: u64) {
    let (arrivals, vm) = (arrivals.clone(), Arc::clone(vm));
    transhume_base::task::spawn(async move {
        vm.ended().await;
        let ended = vm.qmp().guest_end().map_or(Stage::Lost, Stage::Ended);
        let stage = arrivals.of(job).map(|arrival| arrival.stage);
        if stage == Some(Stage::PostCopy) {
            arrivals.note_surely(job, vm.name(), ended);
        }
    });
}
