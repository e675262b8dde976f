//! What the service does: keeps the tables of VMs and jobs, and carries requests out.

use super::config::Config;
use super::job::Jobs;
use super::state_directory::State;
use super::vm_table::VmTable;
use super::{Error, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tracing::Instrument;
use transhume_api::migration::Phase;
use transhume_api::{Failure, JobInfo, Request, Response};
use transhume_hypervisor::{LaunchSettings, Vm, preflight};
use transhume_relay::{self as relay, destination};

/// The service.
#[derive(Debug)]
pub struct Daemon {
    config: Config,
    pub(super) table: VmTable,
    pub(super) jobs: Arc<Jobs>,
    pub(super) arrivals: destination::Arrivals,
    /// Held while a job that was in doubt is settled.
    pub(super) settling: tokio::sync::Mutex<()>,
    /// It is about to end, and begins nothing new.
    pub(super) closing: AtomicBool,
}

impl Daemon {
    /// Finds the VMs that an earlier process had, and finishes or undoes the migrations that it was in.
    ///
    /// # Errors
    /// If the state directory cannot be used. A VM that cannot be spoken to is no error.
    pub async fn open(config: Config) -> Result<Arc<Self>> {
        let state = Arc::new(State::open(&config.state_directory)?);
        let jobs = Arc::new(Jobs::load(state.clone())?);
        let table = VmTable::new(&config.host, state.clone());
        let arrivals = destination::Arrivals::open(&config.state_directory).map_err(|error| {
            Error::file("create", config.state_directory.join("arrivals"), error)
        })?;
        let daemon = Arc::new(Self {
            config,
            table,
            jobs,
            arrivals,
            settling: tokio::sync::Mutex::default(),
            closing: AtomicBool::new(false),
        });
        let owns = |vm: &str, job| daemon.arrivals.owns(vm, job) == Some(true);
        let owned = daemon.table.settle_arriving(owns)?;
        let settings = daemon.launch_settings();
        // First those that were about to arrive: their QEMUs serve one QMP client at a time.
        let recovered = destination::recover(&settings, &daemon.arrivals).await;
        for vm in recovered.arrived {
            daemon.arrive(vm, false);
        }
        for left in recovered.left {
            daemon.recover_later(left, &owned);
        }
        daemon.find_again(state.vms()?).await;
        daemon.finish_interrupted();
        daemon.keep_house();
        daemon.autostart();
        for (place, path) in daemon.config.missing_paths() {
            tracing::warn!(
                path = %path.display(),
                "[{place}] lets VMs from other hosts use a directory that is not there: they find no disk in it until it \
                 is made or mounted"
            );
        }
        let settings = daemon.launch_settings();
        transhume_base::task::spawn(async move { preflight::look_at_qemu(&settings).await });
        Ok(daemon)
    }

    /// Whether it is about to end.
    pub(super) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Relaxed)
    }

    /// Refuses to begin what it would not see to its end.
    pub(super) fn refuse_when_closing(&self) -> Result<()> {
        if !self.is_closing() {
            return Ok(());
        }
        Err(Error::refused(
            "transhumed is about to end",
            "try again when it runs again",
        ))
    }

    /// Its configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    pub(super) fn launch_settings(&self) -> LaunchSettings {
        self.config.launch_settings()
    }

    pub(super) fn put(self: &Arc<Self>, vm: Arc<Vm>) {
        self.table.put(vm.clone());
        // An earlier process may have ended before it did.
        relay::set_clock_right(&vm);
        // It outlives what brought the VM here.
        let span = tracing::info_span!(parent: None, "vm", vm = vm.name());
        transhume_base::task::spawn(Arc::clone(self).watch(vm).instrument(span));
    }

    pub(super) fn arrive(self: &Arc<Self>, vm: Arc<Vm>, autostart: bool) {
        if let Err(error) = self.table.note_arrived(&vm, autostart) {
            tracing::error!(vm = vm.name(), %error, "what is noted of it on disk is still that it arrives");
        }
        self.put(vm);
    }

    /// Carries a request out. [`Request::JobFollow`] is the server's business.
    pub async fn handle(self: &Arc<Self>, request: Request) -> Response {
        let result = match request {
            Request::VmStart { definition, anyway } => self.start_text(&definition, anyway).await,
            Request::VmStartDefined { name, anyway } => self.start_defined(&name, anyway).await,
            Request::VmDefine { definition } => self.define(&definition),
            Request::VmUndefine { name } => self.undefine(&name),
            Request::VmAutostart { name, enable } => self.set_autostart(&name, enable),
            Request::VmAdopt { definition, qmp } => self.adopt(&definition, qmp).await,
            Request::VmArguments { definition } => self.arguments(&definition),
            Request::VmList { all } => Ok(self.list(all).await),
            Request::VmShow { name } => self.show(&name).await,
            Request::VmStop {
                name,
                force,
                shutdown_timeout,
            } => {
                let patience = shutdown_timeout.map(|s| Duration::from_secs(s.into()));
                self.stop(&name, force, patience).await
            }
            Request::VmPause { name } => self.pause(&name).await,
            Request::VmResume { name } => self.resume(&name).await,
            Request::Migrate {
                name,
                to,
                link_patience,
                goal,
                dry_run,
            } => {
                let link_patience = Duration::from_secs(link_patience.into());
                self.migrate(&name, &to, link_patience, goal, dry_run)
            }
            Request::JobList => Ok(Response::Jobs(
                self.jobs.all().iter().map(|job| job.info()).collect(),
            )),
            Request::JobShow { id } | Request::JobFollow { id } => self
                .jobs
                .get(id)
                .map(|job| Response::Job(Box::new(job.info()))),
            Request::JobResolve { id, runs_at } => self.resolve(id, &runs_at).await,
            Request::JobCancel { id } => self.cancel(id).await,
        };
        result.unwrap_or_else(|error| Response::Error(Failure::from(error)))
    }

    pub(super) fn refuse_while_moving(&self, name: &str) -> Result<()> {
        self.jobs.refuse_in_doubt(name)?;
        match self.jobs.active(name) {
            None => Ok(()),
            Some(job) => {
                let JobInfo {
                    id, to, progress, ..
                } = job.info();
                Err(if progress.phase == Phase::PostCopy {
                    Error::refused(
                        format!(
                            "{name} runs on {to}, and job {id} sends the rest of its memory there"
                        ),
                        format!("wait for it, or do it on {to}"),
                    )
                } else {
                    Error::refused(
                        format!("job {id} moves {name} to {to}"),
                        format!("end it first by `transhume job cancel {id}`, or wait for it"),
                    )
                })
            }
        }
    }
}
