//! Whether another host has a VM: asked before one is started, since two running copies ruin its disks.

use super::daemon::Daemon;
use super::vm_table::Entry;
use super::{Error, Result};
use std::time::Duration;
use transhume_relay::source::{Destination, Presence, locate};

/// How long all other hosts together may take to answer.
const ASKING: Duration = Duration::from_secs(5);

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
}

#[cfg(test)]
#[path = "ask_other_hosts_tests.rs"]
mod tests;
