//! Who may do what: other hosts, as `[incoming]` and `[hosts]` say, and the programs of this host.
//!
//! Who may connect to the control socket is the kernel's to check, by the socket's owner, group and mode; who
//! can may do everything, but for what the configuration keeps from everybody.

use super::config::Config;
use super::config_hosts::Peer;
use super::{Error, Result};
use std::path::Path;
use transhume_api::Request;
use transhume_base::audit::{self, Who};
use transhume_hypervisor::Limits;
use transhume_machine::Definition;
use transhume_machine::definition::Accelerator;

impl Config {
    /// Directories for VMs from other hosts that are not there, each with the part that names it.
    pub(super) fn missing_paths(&self) -> Vec<(String, &Path)> {
        let all = self
            .incoming
            .paths
            .iter()
            .map(|path| ("incoming".to_owned(), path));
        let own = self.hosts.iter().flat_map(|(host, peer)| {
            let place = move |path| (format!("hosts.{host}"), path);
            peer.paths.iter().map(place)
        });
        all.chain(own)
            .filter(|(_, path)| !path.is_dir())
            .map(|(place, path)| (place, path.as_path()))
            .collect()
    }

    /// The host that a VM is to move to, if it may.
    pub(super) fn may_take(&self, to: &str) -> Result<&Peer> {
        let (host, file) = (&self.host, self.file.display());
        let Some(peer) = self.hosts.get(to) else {
            let known: Vec<&str> = self.hosts.keys().map(String::as_str).collect();
            let known = if known.is_empty() {
                "none".to_owned()
            } else {
                known.join(", ")
            };
            return Err(Error::refused(
                format!("{host} knows no host named {to} (it knows: {known})"),
                format!("add [hosts.{to}] with its `address` to {file} and restart transhumed"),
            ));
        };
        if !peer.may_take {
            return Err(Error::refused(
                format!("no VM may move from {host} to {to}: [hosts.{to}] says `may-take = false`"),
                format!(
                    "choose another host, or change that in {file} on {host} and restart transhumed"
                ),
            ));
        }
        Ok(peer)
    }

    /// What VMs from that host may use here, or why it may send none.
    pub(super) fn may_send(&self, from: &str) -> std::result::Result<Limits, String> {
        let (host, file) = (&self.host, self.file.display());
        let Some(peer) = self.hosts.get(from) else {
            return Err(format!(
                "{host} does not list {from}; add [hosts.{from}] with its `address` to {file} on {host}, and \
                 restart transhumed there"
            ));
        };
        if !peer.may_send {
            return Err(format!(
                "{host} takes no VMs from {from}: [hosts.{from}] says `may-send = false` there; choose another \
                 host, or change that in {file} on {host} and restart transhumed there"
            ));
        }
        let (all, own) = (&self.incoming, peer.incoming());
        let mut accelerators = [&all.accelerators[..], &own.accelerators].concat();
        if accelerators.is_empty() {
            accelerators.push(Accelerator::Kvm);
        }
        Ok(Limits {
            paths: [&all.paths[..], &own.paths].concat(),
            bridges: [&all.bridges[..], &own.bridges].concat(),
            taps: [&all.taps[..], &own.taps].concat(),
            user_network: all.user_network || own.user_network,
            qemu_binaries: [&all.qemu_binaries[..], &own.qemu_binaries].concat(),
            accelerators,
            place: format!("[incoming] or [hosts.{from}] of {file} on {host}"),
        })
    }

    /// Whether a program of this host gets what it asks for, as far as that is laid down; requests that change
    /// something are noted. `job_vm` tells of a job which VM it moves.
    pub(super) fn admit(
        &self,
        who: Who<'_>,
        request: &Request,
        job_vm: impl FnOnce(u64) -> Option<String>,
    ) -> Result<()> {
        let defined = |text: &str| {
            Definition::parse(text)
                .ok()
                .map(|definition| definition.name)
        };
        let start = |anyway| {
            if anyway {
                "vm-start anyway"
            } else {
                "vm-start"
            }
            .to_owned()
        };
        let mut verdict = Ok(());
        let (what, vm) = match request {
            Request::VmStart { definition, anyway } => (start(*anyway), defined(definition)),
            Request::VmStartDefined { name, anyway } => (start(*anyway), Some(name.clone())),
            Request::VmDefine { definition } => ("vm-define".to_owned(), defined(definition)),
            Request::VmUndefine { name } => ("vm-undefine".to_owned(), Some(name.clone())),
            Request::VmAutostart { name, enable } => {
                (format!("vm-autostart {enable}"), Some(name.clone()))
            }
            Request::VmAdopt { definition, .. } => ("vm-adopt".to_owned(), defined(definition)),
            Request::VmStop { name, force, .. } => {
                let how = if *force { " by force" } else { "" };
                (format!("vm-stop{how}"), Some(name.clone()))
            }
            Request::VmPause { name } => ("vm-pause".to_owned(), Some(name.clone())),
            Request::VmResume { name } => ("vm-resume".to_owned(), Some(name.clone())),
            Request::Migrate {
                name, to, dry_run, ..
            } => {
                // To where it is: not a matter of access.
                if *to != self.host {
                    verdict = self.may_take(to).map(drop);
                }
                let dry = if *dry_run { " (dry run)" } else { "" };
                (format!("migrate to {to}{dry}"), Some(name.clone()))
            }
            Request::JobCancel { id } => (format!("job-cancel {id}"), job_vm(*id)),
            Request::JobResolve { id, runs_at } => {
                let what = format!("job-resolve {id}, runs at {}", runs_at.escape_debug());
                (what, job_vm(*id))
            }
            Request::VmArguments { .. }
            | Request::VmList { .. }
            | Request::VmShow { .. }
            | Request::JobList
            | Request::JobShow { .. }
            | Request::JobFollow { .. } => return Ok(()),
        };
        let why = verdict.as_ref().err().map(ToString::to_string);
        audit::note(
            who,
            &what,
            vm.as_deref(),
            why.as_deref().map_or(Ok(()), Err),
        );
        verdict
    }
}

#[cfg(test)]
#[path = "host_access_tests.rs"]
mod tests;
