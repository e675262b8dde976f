//! Tells what is known of VMs.

use super::Result;
use super::daemon::Daemon;
use super::vm_table::Entry;
use serde_json::Value;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use transhume_api::{DiskInfo, MachineInfo, Response, VmInfo};
use transhume_hypervisor::Vm;
use transhume_relay::destination;

/// How long a list waits for each QEMU.
const POLL_INTERVAL: Duration = Duration::from_secs(2);

impl Daemon {
    /// The VMs that run here, or may; with `all` those that do not as well.
    pub(super) async fn list(&self, all: bool) -> Response {
        let mut list = Vec::new();
        for (name, entry) in self.table.all() {
            let may_run = || self.jobs.doubt(&name).is_some();
            if all || !matches!(entry, Entry::Stopped(_)) || may_run() {
                list.push(self.describe(name, entry).await);
            }
        }
        Response::Vms(list)
    }

    pub(super) async fn show(self: &Arc<Self>, name: &str) -> Result<Response> {
        if let Entry::Lost { record, .. } = self.table.entry(name)? {
            self.readopt(*record).await;
        }
        let entry = self.table.entry(name)?;
        Ok(Response::Vm(Box::new(
            self.describe(name.to_owned(), entry).await,
        )))
    }

    async fn describe(&self, name: String, entry: Entry) -> VmInfo {
        let mut stopped_ms = None;
        let (state, note) = match entry {
            Entry::Here(vm) => return self.info(&vm).await,
            Entry::Coming(_) => (
                "starting",
                "it is just being started, or coming from another host".to_owned(),
            ),
            Entry::Lost { reason, record } => (
                "unreachable",
                format!(
                    "its QEMU at {} cannot be spoken to: {reason}",
                    record.qmp.display()
                ),
            ),
            Entry::Stopped(record) => {
                if let Some(doubt) = self.jobs.doubt(&name) {
                    ("unknown", doubt)
                } else {
                    stopped_ms = record.stopped.as_ref().map(|stopped| stopped.at_ms);
                    ("stopped", record.why().to_owned())
                }
            }
            Entry::Unreadable(reason) => (
                "unreadable",
                format!(
                    "its file in the state directory cannot be read: {reason}; mend or remove it, and restart transhumed"
                ),
            ),
        };
        let autostart = self.table.is_autostarted(&name);
        VmInfo {
            name,
            state: state.to_owned(),
            note: Some(note),
            job: None,
            autostart,
            stopped_ms,
            memory_follows: false,
            machine: None,
        }
    }

    pub(super) async fn info(&self, vm: &Vm) -> VmInfo {
        let (state, note) = match vm
            .qmp()
            .execute_within("query-status", Value::Null, POLL_INTERVAL)
            .await
        {
            Ok(status) => (
                status["status"].as_str().unwrap_or("unknown").to_owned(),
                None,
            ),
            Err(error) => ("unreachable".to_owned(), Some(error.to_string())),
        };
        let arriving = destination::arriving_job(vm.files().folder());
        let arriving = arriving.filter(|_| self.arrivals.is_in_post_copy(vm.name()));
        let note = note
            .or_else(|| self.jobs.doubt(vm.name()))
            .or_else(|| {
                let job = arriving.as_ref()?;
                Some(format!(
                    "part of its memory is still at the host that it came from, and follows by job {job}; the VM stands \
                     still where it needs that"
                ))
            });
        let definition = vm.definition();
        let files = vm.files();
        // An adopted VM has its own.
        let ours = vm.qmp_path() == files.qmp();
        let console = &definition.console;
        let disks = definition.disks.iter().map(|disk| DiskInfo {
            id: disk.id.clone(),
            format: disk.format.to_string(),
            path: definition.disk_path(disk, &self.config().host).to_owned(),
            read_only: disk.read_only,
        });
        VmInfo {
            name: vm.name().to_owned(),
            state,
            note,
            job: self.jobs.active(vm.name()).map(|job| job.id()),
            autostart: self.table.is_autostarted(vm.name()),
            stopped_ms: None,
            memory_follows: arriving.is_some(),
            machine: Some(MachineInfo {
                machine_type: vm.machine_type().to_owned(),
                accelerator: definition.accelerator.to_string(),
                cpu: definition.cpu_model().to_owned(),
                memory_bytes: definition.memory.bytes(),
                vcpus: definition.vcpus,
                qemu_version: vm.qmp().version().to_string(),
                pid: vm.pid(),
                qmp: vm.qmp_path().to_owned(),
                agent: vm.agent_socket().map(PathBuf::from),
                serial: (ours && console.serial).then(|| files.serial()),
                vnc: (ours && console.vnc.is_some()).then(|| files.vnc()),
                log: ours.then(|| files.qemu_log()),
                disks: disks.collect(),
            }),
        }
    }
}
