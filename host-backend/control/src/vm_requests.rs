//! VMs are defined, started, adopted and stopped.

use super::daemon::Daemon;
use super::job::Job;
use super::state_directory::{Record, Stopped};
use super::vm_table::Entry;
use super::{Error, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use transhume_api::Response;
use transhume_hypervisor::{self as hypervisor, Start, Vm, command_line, holders, preflight};
use transhume_machine::Definition;

/// How long a guest may take to shut down if nothing else is said.
const SHUTDOWN: Duration = Duration::from_secs(60);

impl Daemon {
    pub(super) async fn pause(&self, name: &str) -> Result<Response> {
        self.refuse_while_moving(name)?;
        let vm = self.table.here(name)?;
        let status = vm.qmp().status().await?;
        if !status.running {
            return Err(Error::refused(
                format!(
                    "{name} does not run: QEMU says that it is \"{}\"",
                    status.status
                ),
                "there is nothing to do",
            ));
        }
        tracing::info!(vm = name, "the operator pauses it");
        vm.qmp().stop().await?;
        Ok(Response::Vm(Box::new(self.info(&vm).await)))
    }

    pub(super) async fn resume(&self, name: &str) -> Result<Response> {
        self.refuse_while_moving(name)?;
        let vm = self.table.here(name)?;
        let status = vm.qmp().status().await?;
        if status.running {
            return Err(Error::refused(
                format!("{name} runs already"),
                "there is nothing to do",
            ));
        }
        tracing::warn!(
            vm = name,
            status = status.status,
            "the operator lets it run again"
        );
        vm.qmp().cont().await?;
        Ok(Response::Vm(Box::new(self.info(&vm).await)))
    }

    /// Starts the VM of a definition, which it keeps.
    pub(super) async fn start_text(
        self: &Arc<Self>,
        definition: &str,
        anyway: bool,
    ) -> Result<Response> {
        let definition = Definition::parse(definition)?;
        self.start(definition, anyway).await
    }

    /// Starts a VM that is defined here.
    pub(super) async fn start_defined(
        self: &Arc<Self>,
        name: &str,
        anyway: bool,
    ) -> Result<Response> {
        if let Entry::Stopped(record) = self.table.entry(name)? {
            return self.start(record.definition, anyway).await;
        }
        // It is not free, which says why.
        drop(self.table.reserve_while(name)?);
        Err(Error::refused(
            format!("{name} has just changed"),
            "try again",
        ))
    }

    /// Nothing stays of a VM that does not start, but for what was defined before.
    async fn start(self: &Arc<Self>, definition: Definition, anyway: bool) -> Result<Response> {
        self.refuse_when_closing()?;
        let name = definition.name.clone();
        self.jobs.refuse_in_doubt(&name)?;
        let settings = self.launch_settings();
        let kept = self.table.reserve_while(&name)?;
        let refusals = preflight::check_here(&definition, &settings, &[]).await;
        if !refusals.is_empty() {
            return Err(Error::Unfit(refusals));
        }
        self.refuse_elsewhere(&name, anyway).await?;
        let opened = hypervisor::OpenedFiles::open_in_time(&definition, &settings, None).await?;
        // Noted before it runs: a service that is killed in between finds it again.
        let record = Record {
            autostart: self.table.is_autostarted(&name),
            ..Record::new(definition.clone(), settings.files(&name).qmp(), None)
        };
        self.table.note(&record)?;
        let launched = Vm::launch(&definition, &settings, Start::Running, &opened).await;
        // A lock of QEMU's would last as long as these.
        drop(opened);
        let vm = match launched {
            Ok(vm) => Arc::new(vm),
            Err(error) => {
                let cause = explain(&definition, &settings.host, &error);
                return Err(Error::NotStarted { name, cause });
            }
        };
        if let Err(error) = self.table.note(&self.table.record(&vm)) {
            tracing::warn!(vm = name, %error, "its process is not noted on disk");
        }
        self.put(vm.clone());
        drop(kept);
        Ok(Response::Vm(Box::new(self.info(&vm).await)))
    }

    pub(super) fn define(&self, definition: &str) -> Result<Response> {
        let definition = Definition::parse(definition)?;
        let settings = self.launch_settings();
        definition.check_host(&settings.host)?;
        let name = definition.name.clone();
        self.jobs.refuse_in_doubt(&name)?;
        let kept = self.table.reserve_while(&name)?;
        let qmp = settings.files(&name).qmp();
        self.table.define(Record {
            autostart: self.table.is_autostarted(&name),
            stopped: Some(Stopped::now("it was defined, and has not been started")),
            ..Record::new(definition, qmp, None)
        })?;
        drop(kept);
        tracing::info!(vm = name, "defined");
        Ok(Response::Done(format!("{name} is defined.")))
    }

    pub(super) fn undefine(&self, name: &str) -> Result<Response> {
        self.jobs.refuse_in_doubt(name)?;
        let Entry::Stopped(record) = self.table.entry(name)? else {
            return Err(Error::refused(
                format!("{name} is not stopped"),
                format!("end it first by `transhume vm stop {name}`"),
            ));
        };
        self.launch_settings().files(name).remove()?;
        let is_it = |entry: &Entry| matches!(entry, Entry::Stopped(now) if *now == record);
        self.table.leave(name, is_it, "it was undefined");
        Ok(Response::Done(format!("{name} is no longer defined.")))
    }

    pub(super) fn set_autostart(&self, name: &str, enable: bool) -> Result<Response> {
        self.table.set_autostart(name, enable)?;
        let what = if enable {
            "is started when the host is"
        } else {
            "is not started when the host is"
        };
        Ok(Response::Done(format!("{name} {what}.")))
    }

    pub(super) async fn adopt(
        self: &Arc<Self>,
        definition: &str,
        qmp: PathBuf,
    ) -> Result<Response> {
        let definition = Definition::parse(definition)?;
        if !qmp.is_absolute() {
            return Err(Error::refused(
                format!("the QMP socket {} is no absolute path", qmp.display()),
                "write it from / on",
            ));
        }
        self.jobs.refuse_in_doubt(&definition.name)?;
        let same = |record: &Record| record.qmp == qmp;
        let kept = match self.table.entry(&definition.name) {
            // Given up on before; its operator says that it is well.
            Ok(Entry::Lost { record, .. }) if same(&record) => None,
            _ => Some(self.table.reserve_while(&definition.name)?),
        };
        let others = self.table.all().into_iter().any(
            |(name, entry)| matches!(entry, Entry::Here(vm) if vm.qmp_path() == qmp && name != definition.name),
        );
        if others {
            return Err(Error::refused(
                format!("another VM of this host has its QEMU at {}", qmp.display()),
                "`transhume vm list` shows it",
            ));
        }
        let vm = Arc::new(Vm::adopt(&definition, &qmp, &self.launch_settings()).await?);
        self.table.note(&self.table.record(&vm))?;
        tracing::info!(vm = vm.name(), pid = vm.pid(), "adopted");
        self.put(vm.clone());
        drop(kept);
        Ok(Response::Vm(Box::new(self.info(&vm).await)))
    }

    pub(super) fn arguments(&self, definition: &str) -> Result<Response> {
        let definition = Definition::parse(definition)?;
        let settings = self.launch_settings();
        definition.check_host(&settings.host)?;
        let files = settings.files(&definition.name);
        let binary = settings.binary(&definition).display().to_string();
        let names = hypervisor::Names::paths(
            &definition,
            &settings.host,
            &files,
            hypervisor::is_block_device,
        );
        let arguments = command_line::arguments(&definition, &files, Start::Running, &names);
        Ok(Response::Arguments([vec![binary], arguments].concat()))
    }

    /// Ends a VM, which stays defined unless its memory was given up that another host waits for.
    pub(super) async fn stop(
        &self,
        name: &str,
        force: bool,
        patience: Option<Duration>,
    ) -> Result<Response> {
        // A VM whose memory cannot follow it may be given up.
        let waits = |job: Arc<Job>| job.progress().waits_for().is_some();
        let is_given_up =
            force && (self.jobs.active(name).is_some_and(waits) || self.jobs.is_cut_off(name));
        if !is_given_up {
            self.refuse_while_moving(name)?;
        }
        let entry = self.table.entry(name)?;
        if !force && self.arrivals.is_in_post_copy(name) {
            return Err(Error::refused(
                format!(
                    "part of {name}'s memory is still on the host that it came from, and its guest may stand still until \
                     that has followed: it might not hear that it is to shut down, or do so much later"
                ),
                format!(
                    "wait until all of it is here, which `transhume vm show {name}` tells; or `--force`"
                ),
            ));
        }
        let record = match &entry {
            Entry::Here(vm) => {
                vm.stop(force, patience.unwrap_or(SHUTDOWN)).await?;
                self.table.record(vm)
            }
            Entry::Lost { record, .. } if force => {
                self.end_lost(record).await?;
                (**record).clone()
            }
            Entry::Lost { reason, .. } => {
                return Err(Error::refused(
                    format!("{name}'s QEMU cannot be spoken to: {reason}"),
                    format!("`transhume vm stop {name} --force` ends it, if it can be found"),
                ));
            }
            Entry::Stopped(record) => {
                return Err(Error::refused(
                    format!("{name} does not run: {}", record.why()),
                    format!("`transhume vm undefine {name}` forgets it"),
                ));
            }
            Entry::Coming(_) | Entry::Unreadable(_) => {
                return Err(match self.table.here(name) {
                    Err(why) => why,
                    Ok(_) => Error::refused(format!("{name} has just changed"), "try again"),
                });
            }
        };
        let how = if force {
            "it was stopped by force"
        } else {
            "it was stopped"
        };
        let is_it = |now: &Entry| match &entry {
            Entry::Here(vm) => now.is(vm),
            _ => matches!(now, Entry::Lost { .. }),
        };
        if is_given_up {
            // It belongs to the host that it went to.
            self.table.leave(name, is_it, how);
        } else {
            self.table.stop(record, is_it, how);
        }
        Ok(Response::Done(format!("{name} has stopped.")))
    }

    /// Ends a QEMU that could not be spoken to before.
    async fn end_lost(&self, record: &Record) -> Result<()> {
        let settings = self.launch_settings();
        match Vm::adopt(&record.definition, &record.qmp, &settings).await {
            Ok(vm) => Ok(vm.kill().await?),
            Err(error) if record.has_ended(&error) => Ok(()),
            Err(error) => match &record.qemu {
                Some(qemu) => Ok(qemu.end().await.map_err(hypervisor::Error::from)?),
                None => Err(error.into()),
            },
        }
    }
}

/// Why a VM did not start, and who has its disks if it is that.
fn explain(definition: &Definition, host: &str, error: &hypervisor::Error) -> String {
    let mut text = error.to_string();
    if !text.contains("lock") {
        return text;
    }
    let disks: Vec<&Path> = definition
        .disks
        .iter()
        .map(|disk| definition.disk_path(disk, host))
        .collect();
    let holders = holders(disks);
    if holders.is_empty() {
        text.push_str(
            "\nNo process of this host has these files open, so another host has: look for the VM there",
        );
    } else {
        text.push_str("\nOpen in this host's processes ");
        text.push_str(&holders.join(", "));
    }
    text
}
