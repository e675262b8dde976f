//! What arriving VMs need of the daemon.

use std::sync::Arc;

use transhume_hypervisor::{LaunchSettings, Limits, Vm};
use transhume_link::Security;
use transhume_machine::Definition;
use transhume_protocol::link::Presence;

use super::journal::Arrivals;

/// The daemon, as far as arriving VMs need it.
pub trait Host: Send + Sync + 'static {
    /// This host's name.
    fn name(&self) -> &str;
    /// How connections of other hosts are protected.
    fn security(&self) -> Security;
    /// The hosts that this one lists.
    fn peers(&self) -> Vec<&str>;
    /// What VMs from that host may use here.
    ///
    /// # Errors
    /// Why it may send none, with the cure, for people.
    fn may_send(&self, peer: &str) -> Result<Limits, String>;
    /// How VMs are started here.
    fn launch_settings(&self) -> LaunchSettings;
    /// The journal of arriving VMs.
    fn arrivals(&self) -> &Arrivals;
    /// Keeps the name for an arriving VM.
    ///
    /// # Errors
    /// Why the name cannot be had, for people.
    fn reserve(&self, vm: &Definition) -> Result<(), String>;
    /// Notes the VM that arrives by that migration, for when it is committed; `autostart`: it is started with the host.
    ///
    /// # Errors
    /// If it cannot be noted, for people.
    fn expect(&self, vm: &Vm, job: u64, autostart: bool) -> Result<(), String>;
    /// Whether this host has a VM, for another one that asks.
    fn presence(&self, vm: &str) -> Presence;
    /// Whether the name is kept for a VM that has not arrived.
    fn is_coming(&self, vm: &str) -> bool;
    /// Whether this host's daemon is about to end, and begins nothing new.
    fn is_closing(&self) -> bool;
    /// Gives the name back: the VM did not come.
    fn release(&self, vm: &str);
    /// The VM belongs to this host now.
    fn arrived(&self, vm: Arc<Vm>, autostart: bool);
    /// A VM that this host has.
    fn vm(&self, name: &str) -> Option<Arc<Vm>>;
}
