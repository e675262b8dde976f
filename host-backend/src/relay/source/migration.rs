//! Drives one migration through its phases.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::{broadcast, watch};
use tokio::time::{MissedTickBehavior, interval, timeout};
use transhume_protocol::link::{Control, encode_control};

use super::facts::{self, Accepted, Facts, Plan};
use super::flow::{Flow, Next};
use super::goal::Goal;
use super::hints::Hints;
use super::link_rate::LinkRate;
use super::report::Reports;
use super::settings::{self, Before};
use super::shared::Shared;
use super::switchover::Switchover;
use super::transmit::Packer;
use crate::guest::DiskName;
use crate::hypervisor::qmp::Event;
use crate::hypervisor::{self, Vm};
use crate::link::session::{Rejoin, Session};
use crate::link::{Connection, PATIENCE, START_PATIENCE, Security};
use crate::pages::digest::Digester;
use crate::relay::error::RelayError;
use crate::relay::progress::{Counter, Downtime, Phase, Progress, Summary};
use crate::relay::{Error, Stays};

/// How long the first report of the page cache is waited for, once the destination is ready.
const REPORT_PATIENCE: Duration = Duration::from_secs(3);
/// How long the link may be away while nobody runs the VM.
const PAUSED_PATIENCE: Duration = Duration::from_secs(3);
/// How long a destination that can be reached may take to hear that the migration has ended.
const FAREWELL: Duration = Duration::from_secs(1);
/// How often QEMU is asked how far it is.
const POLL: Duration = Duration::from_millis(25);
/// How long QEMU may take to run a VM again after a failure.
const QEMU_PATIENCE: Duration = Duration::from_secs(15);
/// How long a silent destination is asked what became of the VM.
const QUERY_PATIENCE: Duration = Duration::from_secs(30);

/// Where the phases of a migration are noted before they are acted on.
pub trait Journal: Send + Sync {
    /// Notes the phase that the migration's progress is in. `number` is the offer's; `running`: whether the
    /// VM ran when it began.
    ///
    /// # Errors
    /// If it cannot be noted: then it is not acted on.
    fn note(&self, number: u64, running: bool) -> std::io::Result<()>;
}

/// Another host, and how it is reached.
#[derive(Debug, Clone)]
pub struct Destination {
    /// Its name.
    pub host: String,
    /// Its daemon's `host:port`.
    pub address: String,
    /// How the connection to it is protected.
    pub security: Security,
}

/// A migration to be done.
#[derive(Clone)]
pub struct Request {
    /// The VM, which runs here.
    pub vm: Arc<Vm>,
    /// This host.
    pub from: String,
    /// Where it is to go.
    pub destination: Destination,
    /// How long the link may be away.
    pub link_patience: Duration,
    /// What is to be reached.
    pub goal: Goal,
    /// Only look whether it would work.
    pub dry_run: bool,
}

/// What became of a request.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// The destination runs the VM.
    Migrated(Summary),
    /// It would work.
    Planned(Plan),
}

/// Why the phases before the commit were left.
#[derive(Debug)]
enum Stop {
    Cancelled,
    Failed(String),
}

impl From<RelayError> for Stop {
    fn from(error: RelayError) -> Self {
        Self::Failed(error.to_string())
    }
}

impl From<hypervisor::Error> for Stop {
    fn from(error: hypervisor::Error) -> Self {
        Self::Failed(error.to_string())
    }
}

impl From<std::io::Error> for Stop {
    fn from(error: std::io::Error) -> Self {
        Self::Failed(error.to_string())
    }
}

/// Moves a VM, or looks whether it would work. `cancel` turning true ends it, as long as the hand-over
/// has not begun.
///
/// # Errors
/// See [`Error`]; each says which host has the VM.
pub async fn migrate(
    request: Request,
    progress: Arc<Progress>,
    journal: Arc<dyn Journal>,
    mut cancel: watch::Receiver<bool>,
) -> Result<Outcome, Error> {
    progress.enter(Phase::Negotiate);
    let facts = facts::examine(&request.vm, &request.from, request.dry_run).await?;
    let has_ack = facts
        .capabilities
        .iter()
        .any(|(name, _)| name == "switchover-ack");
    let destination = request.destination.clone();
    let offer = facts.offer.clone();
    let accepted = blocking(move || facts::negotiate(&destination, offer, has_ack)).await?;
    if request.dry_run {
        return Ok(Outcome::Planned(plan(&request, &facts, &accepted)));
    }
    let mut migration = Migration::new(request, facts, progress, journal);
    match migration.copy(accepted, &mut cancel).await {
        Ok(copied) => migration.hand_over(copied).await.map(Outcome::Migrated),
        Err(stop) => Err(migration.undo(stop).await),
    }
}

/// Runs what blocks away from the event loop.
async fn blocking<T: Send + 'static>(
    run: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    match tokio::task::spawn_blocking(run).await {
        Ok(result) => result,
        Err(error) => Err(Error::refused(error)),
    }
}

fn plan(request: &Request, facts: &Facts, accepted: &Accepted) -> Plan {
    let version = |v: [u32; 3]| format!("{}.{}.{}", v[0], v[1], v[2]);
    Plan {
        vm: request.vm.name().to_owned(),
        from: request.from.clone(),
        to: request.destination.host.clone(),
        machine: request.vm.machine_type().to_owned(),
        qemu_from: version(facts.offer.qemu),
        qemu_to: version(accepted.qemu),
        memory_bytes: request.vm.definition().memory.bytes(),
        switchover_ack: accepted.switchover_ack,
    }
}

/// The destination's QEMU waits for the stream.
struct Ready {
    connection: Connection,
    token: [u8; 16],
    connections: u8,
}

/// Connections that this host would use: each takes most of a CPU, and the guests need some.
fn connections() -> u8 {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    u8::try_from(cpus / 2).unwrap_or(u8::MAX).clamp(1, 4)
}

/// The VM is paused here and whole at the destination.
struct Copied {
    shared: Arc<Shared>,
    paused: Instant,
    completed: Instant,
}

struct Migration {
    request: Request,
    facts: Facts,
    progress: Arc<Progress>,
    journal: Arc<dyn Journal>,
    shared: Option<Arc<Shared>>,
    reports: Option<Reports>,
    before: Option<Before>,
    /// The link, from when the destination is ready.
    session: Option<Session<Packer>>,
}

impl Migration {
    fn new(
        request: Request,
        facts: Facts,
        progress: Arc<Progress>,
        journal: Arc<dyn Journal>,
    ) -> Self {
        Self {
            request,
            facts,
            progress,
            journal,
            shared: None,
            reports: None,
            before: None,
            session: None,
        }
    }

    /// Phases [`Phase::Prepare`] to [`Phase::Switchover`]. This host owns the VM throughout.
    async fn copy(
        &mut self,
        accepted: Accepted,
        cancel: &mut watch::Receiver<bool>,
    ) -> Result<Copied, Stop> {
        self.enter(Phase::Prepare)?;
        let flow = Arc::new(Flow::new());
        let layout = std::mem::take(&mut self.facts.layout);
        let hints = Arc::new(Hints::new(layout, Arc::clone(&flow)));
        let mut reports = self.listen_to_agent(&hints);
        let ready = self.prepare_destination(accepted.connection, accepted.switchover_ack);
        let ready = tokio::select! {
            ready = ready => ready?,
            () = cancelled(cancel) => return Err(Stop::Cancelled),
        };
        let rate = Arc::new(LinkRate::default());
        let session = self.begin_session(ready, &rate)?;
        let known = &self.facts.capabilities;
        let (qmp, goal) = (self.request.vm.qmp(), self.request.goal);
        let before =
            settings::set_up(qmp, known, accepted.switchover_ack, goal.may_throttle).await?;
        self.before = Some(before);
        tokio::select! {
            () = reports.first(REPORT_PATIENCE) => {}
            () = cancelled(cancel) => return Err(Stop::Cancelled),
        }
        self.reports = Some(reports);

        self.enter(Phase::PreCopy)?;
        let events = self.request.vm.qmp().events();
        let qemu = self.connect_qemu().await?;
        let shared = Arc::new(Shared::new(
            flow,
            hints,
            Arc::clone(&self.progress),
            qemu,
            session,
            rate,
        ));
        self.shared = Some(Arc::clone(&shared));
        let digester = Digester::new(&self.facts.offer.digest_key);
        shared.start(digester)?;
        let (paused, completed) = self.watch(&shared, events, cancel).await?;
        Ok(Copied {
            shared,
            paused,
            completed,
        })
    }

    /// Enters a phase, which is noted first.
    fn enter(&self, phase: Phase) -> Result<(), Stop> {
        self.progress.enter(phase);
        let noted = self.journal.note(self.facts.offer.job, self.facts.running);
        noted.map_err(|error| {
            Stop::Failed(format!(
                "{} cannot write its journal: {error}; is its `state-directory` full?",
                self.request.from
            ))
        })
    }

    fn listen_to_agent(&self, hints: &Arc<Hints>) -> Reports {
        let vm = &self.request.vm;
        let disks = self
            .facts
            .offer
            .disks
            .iter()
            .map(|disk| DiskName {
                serial: disk.id.clone(),
                size: disk.size,
            })
            .collect();
        let socket = vm.agent_socket().map(PathBuf::from);
        let agent = match socket {
            _ if !self.facts.running => Err("the VM is paused, and with it its agent"),
            None => Err("the VM has no agent channel"),
            Some(socket) => Ok(socket),
        };
        Reports::start(
            agent,
            disks,
            self.facts.offer.job,
            Arc::clone(hints),
            Arc::clone(&self.progress),
        )
    }

    async fn prepare_destination(
        &self,
        mut connection: Connection,
        switchover_ack: bool,
    ) -> Result<Ready, Stop> {
        let patience = self.request.link_patience.as_secs();
        let prepare = Control::Prepare {
            switchover_ack,
            connections: connections(),
            patience: u16::try_from(patience).unwrap_or(u16::MAX),
        };
        let prepared = tokio::task::spawn_blocking(move || {
            connection.send(&prepare).map_err(|e| e.to_string())?;
            match connection.receive(START_PATIENCE) {
                Ok(Control::Ready { token, connections }) => Ok(Ready {
                    connection,
                    token,
                    connections,
                }),
                Ok(Control::Abort { reason }) => Err(reason),
                Ok(_) => Err("the other host answered with something else".to_owned()),
                Err(error) => Err(error.to_string()),
            }
        });
        match prepared.await {
            Ok(Ok(ready)) => Ok(ready),
            Ok(Err(cause)) => Err(Stop::Failed(cause)),
            Err(error) => Err(Stop::Failed(error.to_string())),
        }
    }

    fn begin_session(
        &mut self,
        ready: Ready,
        rate: &Arc<LinkRate>,
    ) -> Result<Session<Packer>, Stop> {
        let rejoin = Rejoin {
            address: self.request.destination.address.clone(),
            host: self.request.destination.host.clone(),
            security: self.request.destination.security.clone(),
            job: self.facts.offer.job,
            token: ready.token,
        };
        let connections = ready.connections.min(connections());
        let (progress, rate) = (Arc::clone(&self.progress), Arc::clone(rate));
        let session = Session::begin(
            ready.connection,
            self.request.link_patience,
            Some((rejoin, connections)),
            move || Packer::new(Arc::clone(&progress), Arc::clone(&rate)),
        );
        let session = session.map_err(RelayError::from)?;
        self.session = Some(session.clone());
        Ok(session)
    }

    /// Lets QEMU migrate into a socket of ours.
    async fn connect_qemu(&self) -> Result<std::os::unix::net::UnixStream, Stop> {
        let vm = &self.request.vm;
        let (ours, theirs) = hypervisor::stream::pair()?;
        vm.qmp().migrate(theirs).await?;
        Ok(ours)
    }

    /// Watches until QEMU says that it is done. Returns when the VM was paused, and when it was whole at
    /// the destination.
    async fn watch(
        &self,
        shared: &Arc<Shared>,
        mut events: broadcast::Receiver<Event>,
        cancel: &mut watch::Receiver<bool>,
    ) -> Result<(Instant, Instant), Stop> {
        let qmp = self.request.vm.qmp();
        let mut switchover = Switchover::new(self.request.goal);
        let mut poll = interval(POLL);
        poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut paused = None;
        loop {
            tokio::select! {
                biased;
                () = cancelled(cancel) => return Err(Stop::Cancelled),
                event = events.recv() => match event {
                    Ok(event) => {
                        if event.name == "STOP" {
                            self.enter(Phase::Switchover)?;
                            paused = Some(instant(event.at));
                        }
                        let status = event.data.get("status").and_then(|status| status.as_str());
                        if event.name == "MIGRATION" && status == Some("completed") {
                            let now = Instant::now();
                            return Ok((paused.unwrap_or(now), now));
                        }
                        if event.name == "MIGRATION" && status == Some("failed") {
                            return Err(self.why_failed(shared).await);
                        }
                    }
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => {
                        return Err(Stop::Failed(qmp.closed().await));
                    }
                },
                () = shared.failure() => return Err(self.why_failed(shared).await),
                _ = poll.tick() => {
                    let away = shared.link_away();
                    let away_ms = away.map_or(0, |away| away.as_millis());
                    self.progress.set(Counter::LinkAwayMs, u64::try_from(away_ms).unwrap_or(u64::MAX));
                    if let (Some(away), Some(_)) = (away, paused) && away > PAUSED_PATIENCE {
                        return Err(Stop::Failed(format!(
                            "the link went away while the VM was paused, and did not come back for {} seconds",
                            PAUSED_PATIENCE.as_secs()
                        )));
                    }
                    if paused.is_none() && self.request.goal.is_over(self.progress.elapsed()) {
                        return Err(self.too_late());
                    }
                    let migration = qmp.query_migrate().await?;
                    match migration.status.as_deref() {
                        Some("completed") => {
                            let now = Instant::now();
                            return Ok((paused.unwrap_or(now), now));
                        }
                        Some("failed" | "cancelled") => {
                            return Err(self.why_failed(shared).await);
                        }
                        _ => switchover.follow(&migration, shared, qmp).await?,
                    }
                }
            }
        }
    }

    fn too_late(&self) -> Stop {
        let advice = self
            .progress
            .forecast()
            .and_then(|forecast| forecast.advice);
        let advice = advice.unwrap_or_else(|| "a later --deadline would do".to_owned());
        Stop::Failed(format!("the deadline has passed; {advice}"))
    }

    /// The cause that a person should read: the relay's own, else QEMU's.
    async fn why_failed(&self, shared: &Arc<Shared>) -> Stop {
        // The relay's threads notice a moment after QEMU does, or before.
        let _ = timeout(Duration::from_millis(200), shared.failure()).await;
        match shared.take_failure() {
            Some(
                error @ (RelayError::Link(_)
                | RelayError::Frame(_)
                | RelayError::Stream(_)
                | RelayError::Aborted(_)
                | RelayError::Misplaced(_)
                | RelayError::Decompress(_)),
            ) => error.into(),
            other => {
                let said = self.request.vm.qmp().query_migrate().await;
                let said = said.ok().and_then(|migration| migration.error_desc);
                match (said, other) {
                    (Some(said), _) => Stop::Failed(format!("QEMU: {said}")),
                    (None, Some(error)) => error.into(),
                    (None, None) => Stop::Failed("QEMU gave the migration up".to_owned()),
                }
            }
        }
    }

    /// Phases [`Phase::Commit`] and [`Phase::Completed`]. From the moment that the commit is sent the VM
    /// belongs to the destination, unless that says that it did not take it.
    async fn hand_over(mut self, copied: Copied) -> Result<Summary, Error> {
        if let Err(stop) = self.enter(Phase::Commit) {
            return Err(self.undo(stop).await);
        }
        let commit = match encode_control(&Control::Commit) {
            Ok(commit) => commit,
            Err(error) => return Err(self.undo(Stop::Failed(error.to_string())).await),
        };
        copied.shared.flow.push_urgent(Next::Control(commit));
        let answered = timeout(PATIENCE, copied.shared.answered()).await;
        let taken = match answered {
            Ok(Some(Ok(()))) => Ok(()),
            Ok(Some(Err(reason))) => Err(reason),
            Ok(None) | Err(_) => match self.ask_what_became().await {
                Some(true) => Ok(()),
                Some(false) => Err("the other host did not take the VM over".to_owned()),
                None => return Err(self.give_up(&copied)),
            },
        };
        let running = Instant::now();
        if let Err(reason) = taken {
            return Err(self.undo(Stop::Failed(reason)).await);
        }
        let mut remarks = self
            .reports
            .take()
            .map(|reports| reports.finish())
            .unwrap_or_default();
        let breaks = copied.shared.link_breaks();
        if breaks > 0 {
            remarks.push(format!(
                "connections of the link broke {breaks} times, and were taken up again"
            ));
        }
        copied.shared.stop(RelayError::Stopped);
        if let Err(error) = self.request.vm.kill().await {
            tracing::warn!(%error, "QEMU of the VM that has moved cannot be ended");
        }
        self.progress.enter(Phase::Completed);
        Ok(self.summary(&copied, running, remarks))
    }

    fn summary(&self, copied: &Copied, running: Instant, remarks: Vec<String>) -> Summary {
        let ms =
            |from: Instant, to: Instant| to.saturating_duration_since(from).as_secs_f64() * 1e3;
        let sent = copied.shared.memory_sent().unwrap_or(copied.completed);
        let snapshot = self.progress.snapshot();
        Summary {
            vm: self.request.vm.name().to_owned(),
            from: self.request.from.clone(),
            to: self.request.destination.host.clone(),
            total_ms: self.progress.elapsed().as_secs_f64() * 1e3,
            phases: self.progress.phases(),
            downtime: Downtime {
                memory_ms: ms(copied.paused, sent),
                devices_ms: ms(sent, copied.completed),
                handover_ms: ms(copied.completed, running),
                total_ms: ms(copied.paused, running),
            },
            traffic: snapshot.traffic,
            hinted_pages: snapshot.hinted_pages,
            remarks,
        }
    }

    /// Asks a destination that fell silent after the commit, on new connections.
    async fn ask_what_became(&self) -> Option<bool> {
        let Request {
            vm, destination, ..
        } = &self.request;
        ask(destination, vm.name(), self.facts.offer.job, QUERY_PATIENCE).await
    }

    /// Lets a destination that cannot be reached end its QEMU as soon as it can be: a source that asks has
    /// given its session up. Without that it would wait for the link as long as it was told to.
    fn withdraw(&self) {
        let (request, job) = (self.request.clone(), self.facts.offer.job);
        tokio::spawn(async move {
            let Request {
                vm,
                destination,
                link_patience,
                ..
            } = &request;
            ask(destination, vm.name(), job, *link_patience).await
        });
    }

    fn give_up(&mut self, copied: &Copied) -> Error {
        let cause = copied.shared.take_failure();
        copied.shared.stop(RelayError::Stopped);
        self.progress.enter(Phase::Unresolved);
        Error::Unresolved {
            vm: self.request.vm.name().to_owned(),
            to: self.request.destination.host.clone(),
            cause: cause.map_or_else(|| "no answer".to_owned(), |cause| cause.to_string()),
        }
    }

    /// Ends what was begun; the VM runs on here. The destination, which was not given the VM, ends its
    /// QEMU when the link ends.
    async fn undo(&mut self, stop: Stop) -> Error {
        let qmp = self.request.vm.qmp();
        let lost = qmp.is_closed();
        if !lost && let Err(error) = qmp.migrate_cancel().await {
            tracing::debug!(%error, "migrate_cancel");
        }
        if let Some(shared) = &self.shared {
            shared.stop(RelayError::Stopped);
        }
        if let Some(session) = &self.session {
            if session.away().is_some() {
                self.withdraw();
            }
            session.close();
            let session = session.clone();
            let told = tokio::task::spawn_blocking(move || session.wait_for_end(FAREWELL));
            let _ = told.await;
        }
        drop(self.reports.take());
        let runs = if lost {
            Err(qmp.closed().await)
        } else {
            self.run_again().await
        };
        if let Some(before) = self.before.take() {
            before.restore(qmp).await;
        }
        let host = self.request.from.clone();
        let stays = if self.facts.running {
            Stays::Running
        } else {
            Stays::Paused
        };
        match stop {
            Stop::Cancelled => {
                self.progress.enter(Phase::Cancelled);
                if let Err(cause) = runs {
                    return self.not_running(format!("it was cancelled, and {cause}"));
                }
                Error::Cancelled { host, stays }
            }
            Stop::Failed(cause) => {
                self.progress.enter(Phase::Failed);
                if let Err(not) = runs {
                    return self.not_running(format!("{cause}; {not}"));
                }
                let vm = self.request.vm.name();
                let cure = format!(
                    "when the cause is mended, try `transhume migrate {vm} --to {}` again",
                    self.request.destination.host
                );
                Error::Failed {
                    cause,
                    host,
                    stays,
                    cure,
                }
            }
        }
    }

    fn not_running(&self, cause: String) -> Error {
        let vm = self.request.vm.name();
        Error::Lost {
            cause,
            host: self.request.from.clone(),
            cure: format!("look at `transhume vm show {vm}` and at qemu.log in its run directory"),
        }
    }

    /// Sees to it that the VM runs here again.
    async fn run_again(&self) -> Result<(), String> {
        let vm = &self.request.vm;
        let run_again = async {
            // Not before QEMU has done with it: another migration may begin at once.
            vm.migration_over(QEMU_PATIENCE).await?;
            if self.facts.running {
                vm.run_on().await?;
            }
            Ok(())
        };
        let result: Result<(), hypervisor::Error> = run_again.await;
        result.map_err(|error| error.to_string())
    }
}

/// Asks a destination whether it took a VM, until it answers or patience ends. A source that asks has given
/// the migration's session up: the destination ends it.
pub async fn ask(
    destination: &Destination,
    vm: &str,
    number: u64,
    patience: Duration,
) -> Option<bool> {
    let deadline = Instant::now() + patience;
    while Instant::now() < deadline {
        let Destination {
            host,
            address,
            security,
        } = destination.clone();
        let query = Control::Query {
            job: number,
            vm: vm.to_owned(),
        };
        let asked = tokio::task::spawn_blocking(move || {
            let mut connection = Connection::open(&address, &host, &security)?;
            connection.send(&query)?;
            connection.receive(PATIENCE)
        });
        match asked.await {
            Ok(Ok(Control::Outcome { taken })) => return Some(taken),
            Ok(Err(error)) => tracing::debug!(%error, "no answer from the destination"),
            _ => {}
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    None
}

async fn cancelled(cancel: &mut watch::Receiver<bool>) {
    if cancel.wait_for(|cancel| *cancel).await.is_err() {
        // Nobody can cancel any more.
        std::future::pending::<()>().await;
    }
}

/// The moment at which QEMU's clock showed `at`.
fn instant(at: Duration) -> Instant {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let ago = now.saturating_sub(at).min(Duration::from_secs(60));
    Instant::now().checked_sub(ago).unwrap_or_else(Instant::now)
}
