//! What the relay needs of the service when VMs arrive.

use super::daemon::Daemon;
use std::sync::Arc;
use transhume_hypervisor::{LaunchSettings, Limits, Vm};
use transhume_link::Security;
use transhume_machine::Definition;
use transhume_relay::destination;
use transhume_relay::source::Presence;

/// The service, as arriving VMs see it.
#[derive(Debug)]
pub(super) struct ArrivingVms(pub(super) Arc<Daemon>);

impl destination::Host for ArrivingVms {
    fn name(&self) -> &str {
        &self.0.config().host
    }

    fn security(&self) -> Security {
        self.0.config().security()
    }

    fn peers(&self) -> Vec<&str> {
        self.0.config().hosts.keys().map(String::as_str).collect()
    }

    fn may_send(&self, peer: &str) -> Result<Limits, String> {
        self.0.config().may_send(peer)
    }

    fn launch_settings(&self) -> LaunchSettings {
        self.0.config().launch_settings()
    }

    fn arrivals(&self) -> &destination::Arrivals {
        &self.0.arrivals
    }

    fn reserve(&self, vm: &Definition) -> Result<(), String> {
        let free = self.0.jobs.refuse_in_doubt(&vm.name);
        free.and_then(|()| self.0.table.reserve_for(vm))
            .map_err(|error| error.to_string())
    }

    fn expect(&self, vm: &Vm, job: u64, autostart: bool) -> Result<(), String> {
        let noted = self.0.table.note_arriving(vm, job, autostart);
        noted.map_err(|error| error.to_string())
    }

    fn presence(&self, vm: &str) -> Presence {
        self.0.presence(vm)
    }

    fn is_coming(&self, vm: &str) -> bool {
        self.0.table.is_coming(vm)
    }

    fn is_closing(&self) -> bool {
        self.0.is_closing()
    }

    fn release(&self, vm: &str) {
        self.0.table.release(vm);
    }

    fn arrived(&self, vm: Arc<Vm>, autostart: bool) {
        self.0.arrive(vm, autostart);
    }

    fn vm(&self, name: &str) -> Option<Arc<Vm>> {
        self.0.table.here(name).ok()
    }
}
