//! Drives one migration through its phases.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::timeout;
use transhume_protocol::link::PostCopy;

use super::agent_listener::AgentListener;
use super::cancel::cancelled;
use super::engine;
use super::journal::{Journal, Phases};
use super::negotiation::{Accepted, Agreement};
use super::plan::DryRunPlan;
use super::request::{Outcome, Request};
use super::stop::Stop;
use super::survey::{self, SourceVm};
use crate::error::RelayError;
use crate::policy::mode_choice::{self};
use crate::progress::Progress;
use crate::qemu::migration_settings::{self, Before};
use crate::qemu::return_path;
use crate::send::clocks::Clocks;
use crate::send::doubt::Doubt;
use crate::send::frame_map::Frames;
use crate::send::hints::Hints;
use crate::send::link_rate::LinkRate;
use crate::send::packer::Packer;
use crate::send::prefetch::Prefetch;
use crate::send::queue::SendQueue;
use crate::send::shared::Shared;
use crate::{Error, moved_guest};
use transhume_api::migration::Phase;
use transhume_api::{Choice as Chosen, Mode};
use transhume_hypervisor::qmp::Version;
use transhume_link::session::Session;
use transhume_machine::memory_layout::main_memory_end;
use transhume_pages::PAGE_SIZE;
use transhume_pages::digest::Digester;

/// How long the first report of the page cache is waited for, once the destination is ready.
const REPORT_TIMEOUT: Duration = Duration::from_secs(3);

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

fn plan(request: &Request, facts: &SourceVm, accepted: &Accepted) -> DryRunPlan {
    let version = |version: [u32; 3]| Version::from(version).to_string();
    DryRunPlan {
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
    pub(crate) facts: SourceVm,
    pub(crate) progress: Arc<Progress>,
    pub(crate) phases: Phases,
    pub(crate) clocks: Arc<Clocks>,
    pub(crate) shared: Option<Arc<Shared>>,
    pub(crate) reports: Option<AgentListener>,
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
        facts: SourceVm,
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
        let phases = Phases {
            journal,
            progress: Arc::clone(&progress),
            host: request.from.clone(),
        };
        let clocks = Clocks::new(moved_guest::of(&request.vm).noted_clock());
        Self {
            request,
            facts,
            progress,
            phases,
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
        let flow = Arc::new(SendQueue::new());
        let layout = std::mem::take(&mut self.facts.layout);
        let frames = main_memory_end(&layout, PAGE_SIZE as u64);
        let layout = Arc::new(Frames::new(layout));
        let hints = Arc::new(Hints::new(Arc::clone(&layout), Arc::clone(&flow)));
        let frames = self.may_go_over().then_some(frames);
        let order = Arc::new(Prefetch::new(layout, frames));
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
            () = reports.first(REPORT_TIMEOUT) => {}
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

    /// Enters a phase, which is noted first.
    pub(crate) fn enter(&self, phase: Phase) -> Result<(), Stop> {
        let facts = &self.facts;
        self.phases.enter(phase, facts.offer.job, facts.running)
    }

    /// Notes the phase that it is in once more: the offer's number is another one.
    pub(crate) fn note(&self) -> Result<(), Stop> {
        self.phases.note(self.facts.offer.job, self.facts.running)
    }

    /// Whether both QEMUs are ready for post-copy.
    pub(crate) fn may_go_over(&self) -> bool {
        self.post_copy != PostCopy::No
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
