//! Finds the VMs again that an earlier process had, or that could not be spoken to.

use super::daemon::Daemon;
use super::state_directory::{Found, Record};
use super::vm_table::Entry;
use std::sync::Arc;
use std::time::Duration;
use tracing::Instrument as _;
use transhume_base::process_identity::Identity;
use transhume_hypervisor::Vm;
use transhume_relay::destination;

/// How often that is tried again which could not be done when it was due.
const RETRY_INTERVAL: Duration = Duration::from_secs(3);

impl Daemon {
    /// Begins to try again what could not be done when it was due, until the service ends.
    pub(super) fn keep_house(self: &Arc<Self>) {
        let daemon = Arc::downgrade(self);
        transhume_base::task::spawn(async move {
            loop {
                tokio::time::sleep(RETRY_INTERVAL).await;
                let Some(daemon) = daemon.upgrade() else {
                    return;
                };
                daemon.jobs.save_again();
                daemon.look_again().await;
            }
        });
    }

    /// Speaks to a noted VM again.
    pub(super) async fn readopt(self: &Arc<Self>, record: Record) {
        let name = record.definition.name.clone();
        if matches!(
            self.table.entry(&name),
            Ok(Entry::Here(_) | Entry::Coming(_))
        ) {
            return;
        }
        // Whatever came meanwhile is not it.
        let is_it = |entry: &Entry| matches!(entry, Entry::Lost { .. });
        match Vm::adopt(&record.definition, &record.qmp, &self.launch_settings()).await {
            Ok(vm) => {
                tracing::info!(vm = name, pid = vm.pid(), "found again");
                let vm = Arc::new(vm);
                if let Err(error) = self.table.note(&self.table.record(&vm)) {
                    tracing::warn!(vm = name, %error, "its process is not noted on disk");
                }
                self.put(vm);
            }
            Err(error) if record.has_ended(&error) => {
                let of_this_boot = record.qemu.as_ref().is_none_or(Identity::is_of_this_boot);
                let how = if of_this_boot {
                    "its QEMU had ended while transhumed did not look"
                } else {
                    "the host was restarted, or lost its power, while it ran"
                };
                self.table.stop(record, is_it, how);
            }
            Err(error) => self.table.lose(record, error.to_string()),
        }
    }

    /// Takes in what is noted of this host's VMs.
    pub(super) async fn find_again(self: &Arc<Self>, found: Found<Record>) {
        for one in found.unreadable {
            if let Some(name) = one.vm {
                self.table.hold(&name, one.error);
            }
        }
        let mut looked_for = Vec::new();
        for record in found.read {
            self.table.know(&record);
            if record.stopped.is_some() {
                self.table.keep(record);
                continue;
            }
            let daemon = Arc::clone(self);
            let span = tracing::info_span!("vm", vm = record.definition.name);
            let look = async move { daemon.readopt(record).await };
            looked_for.push(transhume_base::task::spawn(look.instrument(span)));
        }
        for look in looked_for {
            if let Err(error) = look.await {
                tracing::error!(%error, "finding a VM again failed");
            }
        }
    }

    /// Looks again for the VMs that could not be spoken to.
    async fn look_again(self: &Arc<Self>) {
        for (name, entry) in self.table.all() {
            if let Entry::Lost { record, .. } = entry
                && self.jobs.active(&name).is_none()
            {
                self.readopt(*record).await;
            }
        }
    }

    /// Keeps the name of a VM whose arrival could not be finished or undone yet, until it is.
    pub(super) fn recover_later(self: &Arc<Self>, left: destination::Left, owned: &[Record]) {
        let name = left.vm().to_owned();
        if let Some(record) = owned.iter().find(|one| one.definition.name == name) {
            // What it is if its QEMU has ended.
            let ended = record.clone().stopped("its QEMU ended before it ran here");
            self.table.keep(ended);
        }
        if let Err(error) = self.table.reserve(&name) {
            tracing::error!(vm = name, %error, "an arrival that was not finished is left alone");
            return;
        }
        let daemon = Arc::clone(self);
        let span = tracing::info_span!("arrival", vm = name);
        let recovering = async move {
            let settings = daemon.launch_settings();
            match left.recover(&settings, &daemon.arrivals).await {
                Some(vm) => daemon.arrive(vm, false),
                None => daemon.table.release(&name),
            }
        };
        transhume_base::task::spawn(recovering.instrument(span));
    }
}
