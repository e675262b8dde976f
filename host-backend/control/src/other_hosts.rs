//! Whether another host has a VM: asked before one is started, since two running copies ruin its disks. And what is
//! started by itself when the host was.

use super::daemon::Daemon;
use super::vm_table::Entry;
use super::{Error, Result};
use std::sync::Arc;
use std::time::Duration;
use tracing::Instrument;
use transhume_base::process_identity::boot_id;
use transhume_relay::source::{Destination, Presence, locate};

/// How long all other hosts together may take to answer.
const ASKING: Duration = Duration::from_secs(5);
/// Between two tries to start a VM with the host; and as much again at most, so that two hosts that ask each
/// other do not do so for ever.
const RETRY_INTERVAL: Duration = Duration::from_secs(4);

fn words(presence: Presence) -> Option<&'static str> {
    match presence {
        Presence::Absent | Presence::Defined => None,
        Presence::Coming => Some("is just being started there, or on its way"),
        Presence::Here => Some("is there"),
        Presence::InDoubt => Some("is in a migration there whose outcome is not known"),
    }
}

impl Daemon {
    /// Refuses to start a VM that another host has. `anyway`: also where a host does not answer.
    ///
    /// # Errors
    /// [`Error::Refused`], with the hosts.
    pub(super) async fn refuse_elsewhere(&self, vm: &str, anyway: bool) -> Result<()> {
        let mut silent = Vec::new();
        for (host, answer) in self.ask_hosts(vm).await {
            match answer.map(words) {
                Ok(None) => {}
                Ok(Some(what)) => {
                    return Err(Error::refused(
                        format!("{host} says that {vm} {what}"),
                        format!(
                            "see `transhume vm show {vm}` on {host}; it runs on one host at a time"
                        ),
                    ));
                }
                Err(why) => silent.push(format!("{host} ({why})")),
            }
        }
        if silent.is_empty() {
            return Ok(());
        }
        let silent = silent.join(", ");
        if anyway {
            tracing::warn!(
                vm,
                silent,
                "started though it is not known whether it runs there: an operator says that it does not"
            );
            return Ok(());
        }
        Err(Error::refused(
            format!("{vm} may run elsewhere: it could not be asked on {silent}"),
            format!(
                "when you know that it does not run there, as when that host is off, `transhume vm start {vm} --anyway`"
            ),
        ))
    }

    async fn ask_hosts(&self, vm: &str) -> Vec<(String, std::result::Result<Presence, String>)> {
        let questions: Vec<_> = self
            .config()
            .hosts
            .iter()
            .map(|(host, peer)| {
                let destination = Destination {
                    host: host.clone(),
                    address: peer.address.clone(),
                    security: self.config().security(),
                };
                let vm = vm.to_owned();
                let asked = async move { locate(&destination, &vm).await };
                let asked = transhume_base::task::spawn(tokio::time::timeout(ASKING, asked));
                (host.clone(), asked)
            })
            .collect();
        let mut answers = Vec::new();
        for (host, asked) in questions {
            let answer = match asked.await {
                Ok(Ok(answer)) => answer,
                Ok(Err(_)) => Err("no answer in time".to_owned()),
                Err(error) => Err(error.to_string()),
            };
            answers.push((host, answer));
        }
        answers
    }

    /// What another host that asks for a VM is told.
    pub(super) fn presence(&self, vm: &str) -> Presence {
        if self.jobs.refuse_in_doubt(vm).is_err() {
            return Presence::InDoubt;
        }
        match self.table.entry(vm) {
            Ok(Entry::Here(_) | Entry::Lost { .. } | Entry::Unreadable(_)) => Presence::Here,
            Ok(Entry::Coming(_)) => Presence::Coming,
            Ok(Entry::Stopped(_)) => Presence::Defined,
            Err(_) => Presence::Absent,
        }
    }

    /// Starts the VMs that are to be started with the host, if it has been restarted since they stopped.
    pub(super) fn autostart(self: &Arc<Self>) {
        for (name, _) in self.table.all() {
            if self.is_due(&name) {
                let span = tracing::info_span!("autostart", vm = name);
                let starting = Arc::clone(self).autostart_one(name);
                transhume_base::task::spawn(starting.instrument(span));
            }
        }
    }

    fn is_due(&self, name: &str) -> bool {
        let Ok(Entry::Stopped(record)) = self.table.entry(name) else {
            return false;
        };
        let is_new_boot = |boot: &str| boot != boot_id();
        record.autostart
            && record
                .stopped
                .is_some_and(|stopped| is_new_boot(&stopped.boot))
    }

    async fn autostart_one(self: Arc<Self>, name: String) {
        let mut told = String::new();
        // An operator may have done something else with it meanwhile.
        while self.is_due(&name) {
            match self.start_defined(&name, false).await {
                Ok(_) => tracing::info!("started with the host"),
                Err(error) => {
                    let error = error.to_string();
                    if error != told {
                        tracing::warn!("not started with the host, and tried again: {error}");
                        told = error;
                    }
                    let mut random = [0];
                    // Without it the pause is the shortest one.
                    let _ = getrandom::fill(&mut random);
                    tokio::time::sleep(
                        RETRY_INTERVAL + RETRY_INTERVAL * u32::from(random[0]) / 256,
                    )
                    .await;
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "other_hosts_tests.rs"]
mod tests;
