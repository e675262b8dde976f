//! Whose a VM is that arrives: its name is kept for it, and what is decided is journalled before it is acted on.

use std::sync::Arc;

use tokio::sync::watch;

use super::host::Host;
use super::journal::Stage;
use super::outcomes::Outcomes;
use transhume_hypervisor::Vm;
use transhume_machine::Definition;
use transhume_protocol::link::Offer;

/// Keeps a name until the VM has arrived.
pub(crate) struct NameReservation {
    pub(crate) host: Arc<dyn Host>,
    pub(crate) vm: String,
    pub(crate) kept: bool,
}

impl NameReservation {
    pub(crate) fn make(host: &Arc<dyn Host>, vm: &Definition) -> Result<Self, String> {
        host.reserve(vm)?;
        Ok(Self {
            host: Arc::clone(host),
            vm: vm.name.clone(),
            kept: false,
        })
    }
}

impl Drop for NameReservation {
    fn drop(&mut self) {
        if !self.kept {
            self.host.release(&self.vm);
        }
    }
}

/// What is decided on a migration: journalled, and told to whoever asks.
pub(crate) struct Decision {
    pub(crate) host: Arc<dyn Host>,
    pub(crate) job: u64,
    pub(crate) vm: String,
    pub(crate) outcome: watch::Sender<Option<bool>>,
}

impl Decision {
    /// That on a migration which begins.
    pub(crate) fn begin(
        host: &Arc<dyn Host>,
        offer: &Offer,
        vm: &str,
        outcomes: &Outcomes,
    ) -> Self {
        Self {
            host: Arc::clone(host),
            job: offer.job,
            vm: vm.to_owned(),
            outcome: outcomes.begin(offer.job, &offer.from),
        }
    }

    pub(crate) fn note(&self, stage: Stage) -> Result<(), String> {
        let noted = self.host.arrivals().note(self.job, &self.vm, stage);
        noted.map_err(|error| {
            format!(
                "{} cannot write its journal: {error}; is its `state-directory` full?",
                self.host.name()
            )
        })
    }

    /// The VM runs here, and part of its memory is still to come.
    pub(crate) fn follows(&self) {
        let arrivals = self.host.arrivals();
        arrivals.note_surely(self.job, &self.vm, Stage::PostCopy);
        let _ = self.outcome.send(Some(true));
    }

    /// It is decided. A note that cannot be written is made up for later, or after a restart.
    pub(crate) fn end(&self, stage: Stage) {
        let arrivals = self.host.arrivals();
        arrivals.note_surely(self.job, &self.vm, stage);
        let _ = self.outcome.send(Some(stage == Stage::Taken));
    }

    /// Ends a QEMU that never ran the VM, and removes what was made for it.
    pub(crate) async fn abandon(&self, vm: &Vm) {
        match vm.kill().await {
            Ok(()) => {
                if let Err(error) = vm.files().remove() {
                    tracing::warn!(%error, "run directory of a VM that did not come");
                }
                self.end(Stage::Refused);
            }
            // Without a word the source must not run it either.
            Err(error) => tracing::error!(vm = vm.name(), %error, "QEMU cannot be ended"),
        }
    }
}
