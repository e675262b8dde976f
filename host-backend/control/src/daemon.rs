//! What the service does: keeps the tables of VMs and jobs, and carries requests out.

use super::certificates;
use super::config::Config;
use super::jobs::{Begun, Ending, Job, Jobs};
use super::logs;
use super::resolve::{JobJournal, in_doubt};
use super::state::{Found, Record, State};
use super::table::{Entry, Table};
use super::watch::watch;
use super::{Error, Result};
use serde_json::Value;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tracing::Instrument;
use transhume_api::{
    DiskInfo, Failure, FailureKind, JobInfo, JobState, MachineInfo, Request, Response, VmInfo,
};
use transhume_hypervisor::{Identity, LaunchSettings, Vm, preflight};
use transhume_relay::progress::Phase;
use transhume_relay::{self as relay, ErrorKind, destination, source};

/// How long a list waits for each QEMU.
const GLANCE: Duration = Duration::from_secs(2);
/// How long running migrations may take to end when the service does.
const FAREWELL: Duration = Duration::from_secs(30);

/// How often that is tried again which could not be done when it was due.
const AGAIN: Duration = Duration::from_secs(3);

/// The service.
#[derive(Debug)]
pub struct Daemon {
    config: Config,
    pub(super) table: Table,
    pub(super) jobs: Jobs,
    pub(super) arrivals: destination::Arrivals,
    /// Held while a job that was in doubt is settled.
    pub(super) settling: tokio::sync::Mutex<()>,
    /// It is about to end, and begins nothing new.
    closing: AtomicBool,
}

impl Daemon {
    /// Finds the VMs that an earlier process had, and finishes or undoes the migrations that it was in.
    ///
    /// # Errors
    /// If the state directory cannot be used. A VM that cannot be spoken to is no error.
    pub async fn open(config: Config) -> Result<Arc<Self>> {
        let state = Arc::new(State::open(&config.state_directory)?);
        let jobs = Jobs::load(state.clone())?;
        let table = Table::new(&config.host, state.clone());
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
        transhume_base::task::spawn(keep_house(Arc::downgrade(&daemon)));
        transhume_base::task::spawn(logs::keep(Arc::downgrade(&daemon)));
        transhume_base::task::spawn(certificates::watch(Arc::downgrade(&daemon)));
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

    /// Speaks to a noted VM again.
    async fn readopt(self: &Arc<Self>, record: Record) {
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
    async fn find_again(self: &Arc<Self>, found: Found<Record>) {
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
    fn recover_later(self: &Arc<Self>, left: destination::Left, owned: &[Record]) {
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
        transhume_base::task::spawn(watch(self.clone(), vm).instrument(span));
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

    /// The VMs that run here, or may; with `all` those that do not as well.
    async fn list(&self, all: bool) -> Response {
        let mut list = Vec::new();
        for (name, entry) in self.table.all() {
            let may_run = || self.jobs.doubt(&name).is_some();
            if all || !matches!(entry, Entry::Stopped(_)) || may_run() {
                list.push(self.describe(name, entry).await);
            }
        }
        Response::Vms(list)
    }

    async fn show(self: &Arc<Self>, name: &str) -> Result<Response> {
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
            .execute_within("query-status", Value::Null, GLANCE)
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
            path: definition.disk_path(disk, &self.config.host).to_owned(),
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

    async fn pause(&self, name: &str) -> Result<Response> {
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

    async fn resume(&self, name: &str) -> Result<Response> {
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

    async fn cancel(&self, id: u64) -> Result<Response> {
        let job = self.jobs.get(id)?;
        if !job.is_running() {
            return Err(Error::refused(
                format!("job {id} has ended already"),
                format!("see `transhume job show {id}`"),
            ));
        }
        if job.progress().phase() == Phase::PostCopy {
            return Err(Error::refused(
                format!(
                    "{} was handed over to {} and runs there; the rest of its memory follows it, and is nowhere else",
                    job.vm(),
                    job.info().to
                ),
                format!("`transhume job show {id} --follow` shows how it goes"),
            ));
        }
        job.cancel();
        // The answer says what became of the VM, unless that takes long.
        let _ = tokio::time::timeout(FAREWELL, job.ended()).await;
        Ok(Response::Job(Box::new(job.info())))
    }

    fn migrate(
        self: &Arc<Self>,
        name: &str,
        to: &str,
        link_patience: Duration,
        goal: transhume_api::Goal,
        dry_run: bool,
    ) -> Result<Response> {
        self.refuse_when_closing()?;
        let vm = self.table.here(name)?;
        let host = &self.config.host;
        if to == host {
            return Err(Error::refused(
                format!("{name} is on {host} already"),
                "name another host by --to",
            ));
        }
        if self.arrivals.is_in_post_copy(name) {
            return Err(Error::refused(
                format!("part of {name}'s memory is still on the host that it came from"),
                "wait until all of it is here",
            ));
        }
        let peer = self.config.may_take(to)?;
        let job = self.jobs.begin(Begun {
            vm: name,
            qemu: vm.identity().as_ref(),
            from: host,
            to,
            dry_run,
        })?;
        let request = source::Request {
            vm,
            from: host.clone(),
            job: job.id(),
            autostart: self.table.is_autostarted(name),
            destination: source::Destination {
                host: to.to_owned(),
                address: peer.address.clone(),
                security: self.config.security(),
            },
            link_patience,
            goal,
            qemu_channels: self.config.qemu_channels,
            dry_run,
        };
        let span = tracing::info_span!("migration", vm = name, job = job.id(), to);
        transhume_base::task::spawn(self.clone().run(job.clone(), request).instrument(span));
        Ok(Response::Job(Box::new(job.info())))
    }

    async fn run(self: Arc<Self>, job: Arc<Job>, request: source::Request) {
        tracing::info!(dry_run = request.dry_run, "begins");
        let (progress, cancel) = (job.progress().clone(), job.cancelled());
        let moved = Arc::clone(&request.vm);
        let journal = Arc::new(JobJournal {
            daemon: self.clone(),
            job: job.clone(),
        });
        let migration = source::migrate(request, progress, journal, cancel).in_current_span();
        // In a task of its own: a panic in it must not leave a job that never ends.
        let ending = match transhume_base::task::spawn(migration).await {
            Ok(Ok(source::Outcome::Migrated(summary))) => {
                let how = format!("it moved to {} (job {})", job.info().to, job.id());
                self.table.leave(job.vm(), |entry| entry.is(&moved), how);
                Ending::Completed(summary)
            }
            Ok(Ok(source::Outcome::Planned(plan))) => {
                let text = plan.to_string();
                Ending::Planned(serde_json::to_value(plan).unwrap_or_default(), text)
            }
            Ok(Err(relay::Error::Unresolved { cause, .. })) => {
                Ending::InDoubt(in_doubt(&job.info(), &cause))
            }
            Ok(Err(error)) => self.failed(&job.info(), &error),
            Err(error) => Ending::Failed(
                JobState::Unresolved,
                format!(
                    "transhumed has a defect ({error}); see with `transhume vm show {}` where the VM runs",
                    job.vm()
                ),
            ),
        };
        match &ending {
            Ending::Completed(all) => tracing::info!(
                total_ms = all.total_ms.round(),
                downtime_ms = all.downtime.total_ms.round(),
                wire_bytes = all.traffic.wire_bytes,
                stream_bytes = all.traffic.stream_bytes,
                "completed: {ending}"
            ),
            Ending::Planned(..) => tracing::info!("the dry run found that it can move"),
            Ending::Failed(JobState::Cancelled | JobState::Refused, why) => {
                tracing::warn!("not completed: {why}");
            }
            other => tracing::error!("not completed: {other}"),
        }
        self.jobs.finish(&job, ending);
        self.ask_on(&job);
        transhume_base::allocator::give_back();
    }

    /// How a job ends by an error. A VM whose guest ended elsewhere leaves this host.
    pub(super) fn failed(&self, job: &JobInfo, error: &relay::Error) -> Ending {
        if let relay::Error::Ended { vm, host, how, .. } = error
            && *host != self.config.host
        {
            self.table
                .depart(vm, job, format!("its guest {} at {host}", how.did()));
        }
        let state = match error.kind() {
            ErrorKind::Refused => JobState::Refused,
            ErrorKind::Failed => JobState::Failed,
            ErrorKind::Cancelled => JobState::Cancelled,
            ErrorKind::Ended => JobState::Ended,
            ErrorKind::Lost => JobState::Lost,
            ErrorKind::Unresolved => JobState::Unresolved,
        };
        Ending::Failed(state, error.to_string())
    }

    /// Ends what is under way: running migrations are cancelled, so that their VMs run on here. What has been handed
    /// over is waited for, as long as it goes on: VMs from here whose memory follows them, and VMs that come here.
    pub async fn close(&self) {
        self.closing.store(true, Ordering::Relaxed);
        self.close_jobs().await;
        while tokio::time::timeout(FAREWELL, self.arrivals.idle())
            .await
            .is_err()
        {
            tracing::warn!(
                "memory follows a VM that came here: transhumed ends when all of it has, or the link has broken"
            );
        }
    }

    async fn close_jobs(&self) {
        let running: Vec<Arc<Job>> = self
            .jobs
            .all()
            .into_iter()
            .filter(|job| job.is_running())
            .collect();
        for job in &running {
            tracing::info!(job = job.id(), vm = job.vm(), "cancelled: transhumed ends");
            job.cancel();
        }
        let all = async {
            for job in &running {
                job.ended().await;
            }
        };
        tokio::pin!(all);
        while tokio::time::timeout(FAREWELL, &mut all).await.is_err() {
            // One that waits goes on when transhumed is there again.
            let follows = |job: &&Arc<Job>| {
                let progress = job.progress();
                job.is_running()
                    && progress.phase() == Phase::PostCopy
                    && progress.waits_for().is_none()
            };
            let waits = |job: &&Arc<Job>| job.is_running() && job.progress().waits_for().is_some();
            if let Some(job) = running.iter().find(waits) {
                tracing::warn!(
                    job = job.id(),
                    vm = job.vm(),
                    "part of its memory is still here: it follows when transhumed runs again"
                );
            }
            let Some(job) = running.iter().find(follows) else {
                tracing::warn!("a migration did not end in time");
                return;
            };
            tracing::warn!(
                job = job.id(),
                vm = job.vm(),
                "memory follows a VM that was handed over: transhumed ends when all of it has"
            );
        }
    }
}

/// Tries again what could not be done when it was due.
async fn keep_house(daemon: Weak<Daemon>) {
    loop {
        tokio::time::sleep(AGAIN).await;
        let Some(daemon) = daemon.upgrade() else {
            return;
        };
        daemon.jobs.save_again();
        daemon.look_again().await;
    }
}

impl Error {
    /// For a client that could not be served at all.
    pub(super) fn busy(cause: impl Into<String>) -> Self {
        Self::Answered(Failure {
            kind: FailureKind::Failed,
            message: cause.into(),
        })
    }
}
