//! Drives one migration through its phases.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::{broadcast, watch};
use tokio::time::{MissedTickBehavior, interval, timeout};
use transhume_protocol::link::PostCopy;

use super::agent_listener::Reports;
use super::cancel::cancelled;
use super::engine;
use super::negotiation::{Accepted, Agreement};
use super::plan::Plan;
use super::post_copy_start::Start;
use super::request::{Journal, Outcome, Request};
use super::stop::{PAUSED_PATIENCE, Stop, link_away_while_paused};
use super::survey::{self, Facts};
use crate::error::RelayError;
use crate::policy::goal::Aim;
use crate::policy::mode_choice::{self, Choice};
use crate::progress::{Counter, Phase, Progress};
use crate::qemu::migration_settings::{self, Before};
use crate::qemu::return_path;
use crate::qemu::switchover::Switchover;
use crate::send::clocks::Clocks;
use crate::send::doubt::Doubt;
use crate::send::frame_map::Frames;
use crate::send::hints::Hints;
use crate::send::link_rate::LinkRate;
use crate::send::packer::Packer;
use crate::send::prefetch::Order;
use crate::send::queue::Flow;
use crate::send::shared::Shared;
use crate::{Error, moved_guest};
use transhume_api::{Choice as Chosen, Mode};
use transhume_hypervisor::Event;
use transhume_hypervisor::qmp::Version;
use transhume_link::session::Session;
use transhume_machine::memory_layout::main_memory_end;
use transhume_pages::PAGE_SIZE;
use transhume_pages::digest::Digester;

/// How long the first report of the page cache is waited for, once the destination is ready.
const REPORT_PATIENCE: Duration = Duration::from_secs(3);

/// How often QEMU is asked how far it is.
const POLL: Duration = Duration::from_millis(25);

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
    let mut facts = survey::examine(&request).await?;
    let mut agreement = Agreement::new(&request);
    let accepted = agreement.reach(&mut facts, &mut cancel).await;
    let accepted = accepted.map_err(|not| not.untouched(&request.from, facts.running))?;
    if let (Mode::Post, Some(why)) = (request.goal.mode, &accepted.no_post_copy) {
        return Err(Error::refused(format!(
            "{} cannot move to {} in post-copy: {why}. Without `--mode post` it moves by pre-copy",
            request.vm.name(),
            request.destination.host
        )));
    }
    if request.dry_run {
        return Ok(Outcome::Planned(plan(&request, &facts, &accepted)));
    }
    let no_post_copy = accepted.no_post_copy.as_deref();
    let mut migration = Migration::new(request, facts, progress, journal, no_post_copy);
    let summary = match migration.copy(accepted, agreement, &mut cancel).await {
        Ok(copied) if copied.post_copy => migration.follow_up(copied).await?,
        Ok(copied) => migration.hand_over(copied).await?,
        Err(stop) => return Err(migration.undo(stop).await),
    };
    Ok(Outcome::Migrated(Box::new(summary)))
}

fn plan(request: &Request, facts: &Facts, accepted: &Accepted) -> Plan {
    let version = |version: [u32; 3]| Version::from(version).to_string();
    Plan {
        vm: request.vm.name().to_owned(),
        from: request.from.clone(),
        to: request.destination.host.clone(),
        machine: request.vm.machine_type().to_owned(),
        qemu_from: version(facts.offer.qemu),
        qemu_to: version(accepted.qemu),
        memory_bytes: request.vm.definition().memory.bytes(),
        switchover_ack: accepted.switchover_ack,
        no_post_copy: accepted.no_post_copy.clone(),
        storage: accepted.storage.disks.clone(),
    }
}

/// The VM is paused here and whole at the destination, or handed over with part of its memory still here.
pub(crate) struct Copied {
    pub(crate) shared: Arc<Shared>,
    pub(crate) paused: Instant,
    pub(crate) completed: Instant,
    /// It was handed over: the rest of its memory follows.
    pub(crate) post_copy: bool,
}

pub(crate) struct Migration {
    pub(crate) request: Request,
    pub(crate) facts: Facts,
    pub(crate) progress: Arc<Progress>,
    pub(crate) journal: Arc<dyn Journal>,
    pub(crate) clocks: Arc<Clocks>,
    pub(crate) shared: Option<Arc<Shared>>,
    pub(crate) reports: Option<Reports>,
    pub(crate) before: Option<Before>,
    /// The link, from when the destination is ready.
    pub(crate) session: Option<Session<Packer>>,
    /// What both QEMUs are ready for.
    pub(crate) post_copy: PostCopy,
    /// The destination may have a QEMU for this migration.
    pub(crate) may_wait_for_us: bool,
    /// How often the link broke before the session.
    pub(crate) early_breaks: u32,
}

impl Migration {
    fn new(
        request: Request,
        facts: Facts,
        progress: Arc<Progress>,
        journal: Arc<dyn Journal>,
        no_post_copy: Option<&str>,
    ) -> Self {
        let known = |wanted: &str| facts.capabilities.iter().any(|(name, _)| name == wanted);
        let channels = request.qemu_channels > 1
            && known("multifd")
            && Version::from(facts.offer.qemu).tells_channels_order();
        let against = no_post_copy
            .or((!known("postcopy-ram")).then_some("QEMU has no post-copy here"))
            .or(channels.then_some("QEMU uses several channels here, and post-copy needs one"));
        let (post_copy, chosen) = mode_choice::wish(&request.goal, facts.running, against);
        progress.choose(chosen);
        let clocks = Clocks::new(moved_guest::of(&request.vm).noted_clock());
        Self {
            request,
            facts,
            progress,
            journal,
            clocks: Arc::new(clocks),
            shared: None,
            reports: None,
            before: None,
            session: None,
            post_copy,
            may_wait_for_us: false,
            early_breaks: 0,
        }
    }

    /// Phases [`Phase::Prepare`] to [`Phase::Switchover`]. This host owns the VM throughout.
    async fn copy(
        &mut self,
        accepted: Accepted,
        agreement: Agreement,
        cancel: &mut watch::Receiver<bool>,
    ) -> Result<Copied, Stop> {
        self.enter(Phase::Prepare)?;
        let flow = Arc::new(Flow::new());
        let layout = std::mem::take(&mut self.facts.layout);
        let frames = main_memory_end(&layout, PAGE_SIZE as u64);
        let layout = Arc::new(Frames::new(layout));
        let hints = Arc::new(Hints::new(Arc::clone(&layout), Arc::clone(&flow)));
        let frames = self.may_go_over().then_some(frames);
        let order = Arc::new(Order::new(layout, frames));
        let mut reports = self.listen_to_agent(&hints, &order);
        let ready = self
            .prepare_destination(accepted, agreement, cancel)
            .await?;
        let switchover_ack = ready.switchover_ack;
        if let Some(why) = &ready.no_post_copy {
            self.post_copy = PostCopy::No;
            let (mode, why) = (Mode::Pre, why.clone());
            self.progress.choose(Chosen { mode, why });
        }
        let rate = Arc::new(LinkRate::default());
        let doubt = Doubt::new(ready.storage.clone());
        let session = self.begin_session(ready, &rate)?;
        let door = self.channels();
        let known = &self.facts.capabilities;
        let (qmp, goal) = (self.request.vm.qmp(), self.request.goal);
        let channels = door.as_ref().map(|(_, channels)| *channels);
        let before = migration_settings::set_up(
            qmp,
            known,
            switchover_ack,
            goal.may_throttle,
            self.may_go_over(),
            channels,
        )
        .await?;
        self.before = Some(before);
        tokio::select! {
            () = reports.first(REPORT_PATIENCE) => {}
            () = cancelled(cancel) => return Err(Stop::Cancelled),
        }
        self.reports = Some(reports);

        self.enter(Phase::PreCopy)?;
        let events = self.request.vm.qmp().events();
        let (qemu, theirs) = self.connect_qemu(door).await?;
        let shared = Arc::new(Shared::new(
            flow,
            hints,
            order,
            Arc::clone(&self.progress),
            qemu,
            session,
            rate,
            self.request.vm.qmp().version().keeps_until_loaded(),
            Some(doubt),
            Arc::clone(&self.clocks),
            return_path::page_requests,
        ));
        self.shared = Some(Arc::clone(&shared));
        match theirs {
            Some(theirs) if self.may_go_over() => shared.keep(theirs),
            // QEMU's alone: the stream ends when it closes its socket.
            theirs => drop(theirs),
        }
        let digester = Digester::new(&self.facts.offer.digest_key);
        engine::start(&shared, &digester)?;
        self.watch(&shared, events, cancel).await
    }

    /// Whether both QEMUs are ready for post-copy.
    pub(crate) fn may_go_over(&self) -> bool {
        self.post_copy != PostCopy::No
    }

    /// Enters a phase, which is noted first.
    pub(crate) fn enter(&self, phase: Phase) -> Result<(), Stop> {
        self.progress.enter(phase);
        self.note()
    }

    pub(crate) fn note(&self) -> Result<(), Stop> {
        let noted = self.journal.note(self.facts.offer.job, self.facts.running);
        noted.map_err(|error| {
            Stop::Failed(format!(
                "{} cannot write its journal: {error}; is its `state-directory` full?",
                self.request.from
            ))
        })
    }

    /// Watches until QEMU says that it is done, or the VM was handed over.
    async fn watch(
        &self,
        shared: &Arc<Shared>,
        mut events: broadcast::Receiver<Event>,
        cancel: &mut watch::Receiver<bool>,
    ) -> Result<Copied, Stop> {
        let qmp = self.request.vm.qmp();
        let mut switchover = Switchover::new(self.request.goal);
        let mut choice = Choice::new(
            self.request.goal,
            self.post_copy,
            Arc::clone(&self.progress),
        );
        let mut start = Start::default();
        let (mut seen, mut continued) = (None, false);
        let done = |paused: Option<Instant>| {
            let completed = Instant::now();
            Copied {
                shared: Arc::clone(shared),
                paused: paused.unwrap_or(completed),
                completed,
                post_copy: false,
            }
        };
        let mut poll = interval(POLL);
        poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut paused = None;
        loop {
            tokio::select! {
                biased;
                // A QEMU that is about to go over to post-copy can take a cancel half, and hang.
                () = cancelled(cancel), if !(start.has_begun() && paused.is_some()) => {
                    return Err(Stop::Cancelled);
                }
                event = events.recv() => match event {
                    Ok(event) => {
                        if event.name == "STOP" {
                            if self.facts.running {
                                moved_guest::of(&self.request.vm).note_clock(self.clocks.guest());
                            }
                            self.enter(Phase::Switchover)?;
                            paused = Some(instant(event.at));
                        }
                        let status = event.data.get("status").and_then(|status| status.as_str());
                        if event.name == "MIGRATION" && status == Some("completed") {
                            return Ok(done(paused));
                        }
                        if event.name == "MIGRATION" && status == Some("pre-switchover") {
                            if !start.has_begun() {
                                if !std::mem::replace(&mut continued, true) {
                                    qmp.migrate_continue().await?;
                                }
                            } else if shared.link_away().is_none() {
                                return self.let_go(shared, events, paused.unwrap_or_else(Instant::now)).await;
                            }
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
                () = qmp.shuts_down() => return Err(Stop::Ended),
                () = shared.failure() => return Err(self.why_failed(shared).await),
                _ = poll.tick() => {
                    let away = shared.link_away();
                    let away_ms = away.map_or(0, |away| away.as_millis());
                    self.progress.set(Counter::LinkAwayMs, u64::try_from(away_ms).unwrap_or(u64::MAX));
                    if let (Some(away), Some(_)) = (away, paused) && away > PAUSED_PATIENCE {
                        return Err(link_away_while_paused());
                    }
                    if paused.is_none() && self.request.goal.is_over(self.progress.elapsed()) {
                        return Err(self.too_late());
                    }
                    let migration = qmp.query_migrate().await?;
                    match migration.status.as_deref() {
                        Some("completed") => return Ok(done(paused)),
                        // Its event was missed.
                        Some("pre-switchover") if !start.has_begun() && !continued => {
                            continued = true;
                            qmp.migrate_continue().await?;
                        }
                        // Its event came while the link was away.
                        Some("pre-switchover") if away.is_none() && start.has_begun() => {
                            return self.let_go(shared, events, paused.unwrap_or_else(Instant::now)).await;
                        }
                        Some("failed" | "cancelled") => {
                            return Err(self.why_failed(shared).await);
                        }
                        _ => {
                            if let Some(now) = switchover.follow(&migration, shared, qmp).await? {
                                choice.consider(&now);
                                seen = Some(now);
                            }
                            if choice.is_likely() && let Some(reports) = &self.reports {
                                reports.prepare_gate();
                            }
                            if let Some(seen) = seen.as_ref().filter(|_| paused.is_none()) {
                                start.follow(seen, &choice, shared, qmp).await?;
                            }
                        }
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
    pub(crate) async fn why_failed(&self, shared: &Arc<Shared>) -> Stop {
        // The relay's threads notice a moment after QEMU does, or before.
        let _ = timeout(Duration::from_millis(200), shared.failure()).await;
        match shared.take_failure() {
            Some(
                error @ (RelayError::Link(_)
                | RelayError::Frame(_)
                | RelayError::Stream(_)
                | RelayError::Aborted(_)
                | RelayError::OtherStorage(_)
                | RelayError::Misplaced(_)
                | RelayError::Disordered
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
}

/// The moment at which QEMU's clock showed `at`.
fn instant(at: Duration) -> Instant {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let ago = now.saturating_sub(at).min(Duration::from_secs(60));
    Instant::now().checked_sub(ago).unwrap_or_else(Instant::now)
}
