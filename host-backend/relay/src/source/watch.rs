//! Watches a migration from its first page until QEMU says that it is done, or hands the VM over.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::{broadcast, watch};
use tokio::time::{MissedTickBehavior, interval};

use super::cancel::cancelled;
use super::migration::{Copied, Migration};
use super::post_copy_start::Start;
use super::stop::{PAUSED_TIMEOUT, Stop, link_away_while_paused};
use crate::moved_guest;
use crate::policy::goal::{Aim, Seen};
use crate::policy::mode_choice::Choice;
use crate::progress::{Counter, Progress};
use crate::qemu::switchover::Switchover;
use crate::send::shared::Shared;
use transhume_api::migration::Phase;
use transhume_hypervisor::Event;

/// How often QEMU is asked how far it is.
const POLL_INTERVAL: Duration = Duration::from_millis(25);

impl Migration {
    /// Watches until QEMU says that it is done, or the VM was handed over.
    pub(crate) async fn watch(
        &self,
        shared: &Arc<Shared>,
        events: broadcast::Receiver<Event>,
        cancel: &mut watch::Receiver<bool>,
    ) -> Result<Copied, Stop> {
        Watch::new(self, shared).run(events, cancel).await
    }
}

/// What comes of a look.
enum Look {
    /// It goes on.
    On,
    /// All of the VM is at the destination.
    Done,
    /// The VM is paused, and goes over to post-copy when it is let.
    GoesOver,
}

/// See the module.
struct Watch<'a> {
    migration: &'a Migration,
    shared: &'a Arc<Shared>,
    switchover: Switchover,
    choice: Choice,
    start: Start,
    /// What was seen of the migration last.
    seen: Option<Seen>,
    /// QEMU was told to go on from the pause that comes before its switch-over.
    continued: bool,
    /// Since when the VM does not run.
    paused: Option<Instant>,
}

impl<'a> Watch<'a> {
    fn new(migration: &'a Migration, shared: &'a Arc<Shared>) -> Self {
        let goal = migration.request.goal;
        let progress = Arc::clone(&migration.progress);
        Self {
            migration,
            shared,
            switchover: Switchover::new(goal),
            choice: Choice::new(goal, migration.post_copy, progress),
            start: Start::default(),
            seen: None,
            continued: false,
            paused: None,
        }
    }

    /// Watches to the end.
    async fn run(
        mut self,
        mut events: broadcast::Receiver<Event>,
        cancel: &mut watch::Receiver<bool>,
    ) -> Result<Copied, Stop> {
        let (migration, shared) = (self.migration, self.shared);
        let qmp = migration.request.vm.qmp();
        let mut poll = interval(POLL_INTERVAL);
        poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            // A QEMU that is about to go over to post-copy can take a cancel half, and hang.
            let may_cancel = !(self.start.has_begun() && self.paused.is_some());
            let look = tokio::select! {
                biased;
                () = cancelled(cancel), if may_cancel => return Err(Stop::Cancelled),
                event = events.recv() => match event {
                    Ok(event) => self.take(&event).await?,
                    Err(broadcast::error::RecvError::Lagged(_)) => Look::On,
                    Err(broadcast::error::RecvError::Closed) => {
                        return Err(Stop::Failed(qmp.closed().await));
                    }
                },
                () = qmp.shuts_down() => return Err(Stop::Ended),
                () = shared.failure() => return Err(migration.why_failed(shared).await),
                _ = poll.tick() => self.look().await?,
            };
            match look {
                Look::On => {}
                Look::Done => {
                    let completed = Instant::now();
                    return Ok(Copied {
                        shared: Arc::clone(shared),
                        paused: self.paused.unwrap_or(completed),
                        completed,
                        post_copy: false,
                    });
                }
                Look::GoesOver => {
                    let paused = self.paused.unwrap_or_else(Instant::now);
                    return migration.let_go(shared, events, paused).await;
                }
            }
        }
    }

    /// Takes what QEMU tells unasked.
    async fn take(&mut self, event: &Event) -> Result<Look, Stop> {
        let migration = self.migration;
        if event.name == "STOP" {
            if migration.facts.running {
                let guest = moved_guest::of(&migration.request.vm);
                guest.note_clock(migration.clocks.guest());
            }
            migration.enter(Phase::Switchover)?;
            self.paused = Some(instant(event.at));
        }
        if event.name != "MIGRATION" {
            return Ok(Look::On);
        }
        match event.data.get("status").and_then(|status| status.as_str()) {
            Some("completed") => return Ok(Look::Done),
            Some("pre-switchover") if !self.start.has_begun() => self.go_on().await?,
            Some("pre-switchover") if self.shared.link_away().is_none() => {
                return Ok(Look::GoesOver);
            }
            Some("failed") => return Err(migration.why_failed(self.shared).await),
            _ => {}
        }
        Ok(Look::On)
    }

    /// Lets QEMU go on from the pause that comes before its switch-over, once.
    async fn go_on(&mut self) -> Result<(), Stop> {
        if !std::mem::replace(&mut self.continued, true) {
            self.migration.request.vm.qmp().migrate_continue().await?;
        }
        Ok(())
    }

    /// Looks how far it is, and does what is due.
    async fn look(&mut self) -> Result<Look, Stop> {
        let (migration, shared) = (self.migration, self.shared);
        let (progress, qmp) = (&migration.progress, migration.request.vm.qmp());
        let away = shared.link_away();
        let away_ms = away.map_or(0, |away| away.as_millis());
        progress.set(
            Counter::LinkAwayMs,
            u64::try_from(away_ms).unwrap_or(u64::MAX),
        );
        if self.paused.is_some() && away > Some(PAUSED_TIMEOUT) {
            return Err(link_away_while_paused());
        }
        if self.paused.is_none() && migration.request.goal.is_over(progress.elapsed()) {
            return Err(too_late(progress));
        }
        let said = qmp.query_migrate().await?;
        match said.status.as_deref() {
            Some("completed") => return Ok(Look::Done),
            // Its event was missed.
            Some("pre-switchover") if !self.start.has_begun() && !self.continued => {
                self.go_on().await?;
            }
            // Its event came while the link was away.
            Some("pre-switchover") if away.is_none() && self.start.has_begun() => {
                return Ok(Look::GoesOver);
            }
            Some("failed" | "cancelled") => return Err(migration.why_failed(shared).await),
            _ => {
                if let Some(now) = self.switchover.follow(&said, shared, qmp).await? {
                    self.choice.consider(&now);
                    self.seen = Some(now);
                }
                if self.choice.is_likely()
                    && let Some(reports) = &migration.reports
                {
                    reports.prepare_gate();
                }
                if let Some(seen) = self.seen.as_ref().filter(|_| self.paused.is_none()) {
                    self.start.follow(seen, &self.choice, shared, qmp).await?;
                }
            }
        }
        Ok(Look::On)
    }
}

fn too_late(progress: &Progress) -> Stop {
    let advice = progress.forecast().and_then(|forecast| forecast.advice);
    let advice = advice.unwrap_or_else(|| "a later --deadline would do".to_owned());
    Stop::Failed(format!("the deadline has passed; {advice}"))
}

/// The moment at which QEMU's clock showed `at`.
fn instant(at: Duration) -> Instant {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let ago = now.saturating_sub(at).min(Duration::from_secs(60));
    Instant::now().checked_sub(ago).unwrap_or_else(Instant::now)
}
