//! Post-copy at the source: the VM is handed over in the middle of the stream, and the rest of its memory
//! follows.
//!
//! QEMU pauses the VM and waits (`pause-before-switchover`). Up to there it can go back. Then the hand-over is
//! noted, and QEMU goes on: pages to forget, the package of devices, a ping, and pages. The destination is told that
//! the VM is its own when QEMU cannot run it by itself any more, as it would if its socket broke before:
//!
//! - Until 10.1 that is when the ping has come, behind all of the package. The destination holds the package back
//!   until it has noted that.
//! - From 10.2 on it is when QEMU was told that the destination has loaded the package, and says `postcopy-active`. A
//!   package that does not load costs nothing there.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::broadcast;
use tokio::time::{MissedTickBehavior, interval, timeout};
use transhume_protocol::link::{Control, Stalls, encode_control};
use transhume_protocol::qemu::{Command, CommandKind, Discard};

use super::buffers::Buffer;
use super::choice::Choice;
use super::goal::Seen;
use super::migration::{Copied, Migration, PAUSED_PATIENCE, Stop, link_away_while_paused};
use super::resume::Rest;
use super::shared::Shared;
use super::stream::StreamReader;
use crate::Error;
use crate::error::{CutOff, RelayError};
use crate::progress::{Counter, Phase, PostCopy, Progress, Summary};
use transhume_hypervisor::Vm;
use transhume_hypervisor::qmp::Event;
use transhume_hypervisor::qmp_commands::Migration as Said;
use transhume_link::PATIENCE;

/// How often QEMU is asked how far it is.
const POLL: Duration = Duration::from_millis(50);
/// Scans of memory after which post-copy may begin: the set-up counts as one.
const SCANS: u64 = 2;

/// How long the destination may take to say what post-copy cost the guest.
const STALLS_PATIENCE: Duration = Duration::from_secs(2);

/// How far the stream is in the switch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Switch {
    /// The VM runs here.
    #[default]
    Before,
    /// The destination forgets pages.
    Discards,
    /// So many bytes of the package are still to come.
    Package(u32),
    /// The VM was handed over; pages follow.
    Done,
}

impl Switch {
    /// Whether pages that come now are for a VM in post-copy.
    pub(super) fn has_begun(self) -> bool {
        self != Self::Before
    }

    /// Whether nobody runs the VM because of it.
    pub(super) fn is_under_way(self) -> bool {
        matches!(self, Self::Discards | Self::Package(_))
    }

    /// Part of the package has come.
    pub(super) fn came(&mut self, bytes: usize) {
        if let Self::Package(left) = self {
            *left = left.saturating_sub(u32::try_from(bytes).unwrap_or(u32::MAX));
        }
    }
}

impl StreamReader {
    /// Takes a command of QEMU's.
    pub(super) fn command(
        &mut self,
        command: &Command<'_>,
        bytes: &[u8],
        buffer: &Buffer,
    ) -> Result<(), RelayError> {
        match (command.kind, self.collector.switch) {
            (CommandKind::PostcopyRamDiscard, _) => {
                self.leave_pre_copy(buffer)?;
                self.discard(command)?;
            }
            (CommandKind::Packaged, _) => {
                self.leave_pre_copy(buffer)?;
                self.collector.records().package();
                self.collector.records().raw(bytes);
                self.collector.switch = Switch::Package(command.package_len().unwrap_or_default());
            }
            (CommandKind::Ping, Switch::Package(0)) => {
                self.collector.records().raw(bytes);
                self.end_package(buffer)?;
            }
            _ => self.collector.records().raw(bytes),
        }
        Ok(())
    }

    /// The VM is paused: what the destination was only referred to goes to it before it forgets anything.
    fn leave_pre_copy(&mut self, buffer: &Buffer) -> Result<(), RelayError> {
        if self.collector.switch.has_begun() {
            return Ok(());
        }
        if !self.collector.shared().is_hand_open() {
            return Err(RelayError::Unasked);
        }
        self.collector.dispatch_copy(buffer)?;
        self.settle()?;
        self.collector.switch = Switch::Discards;
        self.collector.reading.ledger().leave_pre_copy();
        self.collector.shared().flow.end_reports();
        self.collector.shared().set_memory_sent();
        Ok(())
    }

    fn discard(&mut self, command: &Command<'_>) -> Result<(), RelayError> {
        let Discard { block, ranges } = Discard::read(command, self.decoder.blocks())?;
        for (page, count) in ranges {
            self.collector
                .shared()
                .progress
                .add(Counter::PostCopyPages, count);
            self.collector.shared().order.owe(block, page, count);
            let mut done = 0;
            while done < count {
                let some = u32::try_from(count - done).unwrap_or(u32::MAX);
                self.collector.records().discard(block, page + done, some);
                done += u64::from(some);
            }
        }
        Ok(())
    }

    /// QEMU has written the whole package; until 10.1 it cannot run the VM any more.
    fn end_package(&mut self, buffer: &Buffer) -> Result<(), RelayError> {
        self.collector.dispatch_copy(buffer)?;
        let shared = self.collector.shared();
        if !shared.keeps_until_loaded() {
            // The commit overtakes what waits.
            shared.flow.drain()?;
            shared.hand_over()?;
        }
        self.collector.switch = Switch::Done;
        Ok(())
    }
}

/// Lets QEMU go over to post-copy.
#[derive(Default)]
pub(super) struct Start {
    /// The destination was asked to wait for the link from then on.
    asked: bool,
    begun: bool,
    /// When the first scan began, and how much there was of it, in bytes.
    first: Option<(Instant, f64)>,
}

impl Start {
    /// Whether QEMU was told to.
    pub(super) fn has_begun(&self) -> bool {
        self.begun
    }

    /// How long the first scan still takes, if it goes on as it did.
    fn left(&mut self, seen: &Seen) -> Duration {
        if seen.scans >= SCANS {
            return Duration::ZERO;
        }
        let (since, all) = *self.first.get_or_insert((Instant::now(), seen.remaining));
        let done = all - seen.remaining;
        if done <= 0.0 {
            return Duration::MAX;
        }
        let left = since.elapsed().as_secs_f64() * seen.remaining / done;
        Duration::try_from_secs_f64(left).unwrap_or(Duration::MAX)
    }

    /// Lets QEMU go over when that was chosen, all memory was scanned once, what goes first has gone, and the
    /// destination waits for the link. Where time is short it is only the last of these.
    pub(super) async fn follow(
        &mut self,
        seen: &Seen,
        choice: &Choice,
        shared: &Shared,
        qmp: &transhume_hypervisor::Qmp,
    ) -> Result<(), Stop> {
        if self.begun || !choice.is_post() {
            return Ok(());
        }
        let left = self.left(seen);
        let stream = shared.progress.get(Counter::StreamBytes);
        let (is_ready, requests) = shared.order.prepare(left, stream);
        if let Some(requests) = requests {
            shared.tell_qemu(&requests)?;
        }
        let is_urgent = choice.is_urgent(seen);
        if seen.scans < SCANS && !is_urgent {
            return Ok(());
        }
        if !self.asked {
            self.asked = true;
            shared.stay_near();
            let endure = encode_control(&Control::Endure).map_err(RelayError::from)?;
            shared.flow.push_control(endure);
        }
        if !shared.endures() || !(is_ready || is_urgent) {
            return Ok(());
        }
        self.begun = true;
        choice.begins(seen);
        qmp.migrate_start_postcopy().await?;
        // A QEMU that waits for the destination's leave would also wait with post-copy.
        shared.release_switchover()?;
        Ok(())
    }
}

fn status(event: &Event) -> Option<&str> {
    let status = event.data.get("status").and_then(|status| status.as_str());
    status.filter(|_| event.name == "MIGRATION")
}

impl Migration {
    /// The VM is paused, and QEMU waits for our leave. Returns when it was handed over by the stream, or is
    /// whole at the destination because post-copy was not needed.
    pub(super) async fn let_go(
        &self,
        shared: &Arc<Shared>,
        mut events: broadcast::Receiver<Event>,
        paused: Instant,
    ) -> Result<Copied, Stop> {
        let qmp = self.request.vm.qmp();
        shared.settle_doubts().await;
        if shared.failed() {
            return Err(self.why_failed(shared).await);
        }
        self.enter(Phase::PostCopy)?;
        // Just before it was paused: the destination's QEMU would not know of it.
        if qmp.shutdown().is_some() {
            return Err(Stop::Ended);
        }
        shared.open_hand();
        qmp.migrate_continue().await?;
        let copied = |completed, post_copy| Copied {
            shared: Arc::clone(shared),
            paused,
            completed,
            post_copy,
        };
        let failed = loop {
            tokio::select! {
                biased;
                at = shared.handed_over() => return Ok(copied(at, true)),
                () = shared.loaded() => return self.tell_loaded(shared, events, &copied).await,
                event = events.recv() => match event {
                    Ok(event) => match status(&event) {
                        Some("completed") => return Ok(copied(Instant::now(), false)),
                        Some("failed") => break self.why_failed(shared).await,
                        _ => {}
                    },
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => {
                        break Stop::Failed(qmp.closed().await);
                    }
                },
                () = qmp.shuts_down() => break Stop::Ended,
                () = shared.failure() => break self.why_failed(shared).await,
                () = tokio::time::sleep(POLL) => {
                    show(shared, None, &self.progress);
                    if shared.keeps_until_loaded() && shared.link_away() > Some(PAUSED_PATIENCE) {
                        break link_away_while_paused();
                    }
                }
            }
        };
        match shared.withdraw() {
            Some(at) => Ok(copied(at, true)),
            None => Err(failed),
        }
    }

    /// The destination has loaded the devices, and waits: tells QEMU so. From then on QEMU alone says whether it can
    /// still run the VM.
    async fn tell_loaded(
        &self,
        shared: &Arc<Shared>,
        mut events: broadcast::Receiver<Event>,
        copied: &impl Fn(Instant, bool) -> Copied,
    ) -> Result<Copied, Stop> {
        let qmp = self.request.vm.qmp();
        shared.tell_loaded()?;
        loop {
            let said = qmp.query_migrate().await?;
            match keeps(said.status.as_deref()) {
                Some(false) => {
                    shared.hand_over()?;
                    return Ok(copied(Instant::now(), true));
                }
                Some(true) => {
                    shared.withdraw();
                    return Err(self.why_failed(shared).await);
                }
                None => {}
            }
            tokio::select! {
                event = events.recv() => if matches!(event, Err(broadcast::error::RecvError::Closed)) {
                    return Err(Stop::Failed(qmp.closed().await));
                },
                () = tokio::time::sleep(POLL) => {}
            }
        }
    }

    /// Phase [`Phase::PostCopy`] from the hand-over on: the VM belongs to the destination unless that says that
    /// it did not take it, and the rest of its memory is here.
    pub(super) async fn follow_up(mut self, copied: Copied) -> Result<Summary, Error> {
        let mut remarks = self
            .reports
            .take()
            .map(|reports| reports.finish())
            .unwrap_or_default();
        let taken = self.taken(&copied.shared).await;
        copied.shared.set_link_patience(self.request.link_patience);
        let running = match taken {
            Some(Ok(())) => Instant::now(),
            Some(Err(reason)) => return Err(self.undo(Stop::Failed(reason)).await),
            // The link ended before the destination answered.
            None => match timeout(PATIENCE, self.ask_what_became()).await {
                Ok(Some(true)) => Instant::now(),
                Ok(Some(false)) => {
                    let reason = "the other host did not take the VM over".to_owned();
                    return Err(self.undo(Stop::Failed(reason)).await);
                }
                Ok(None) | Err(_) => return Err(self.give_up(&copied.shared, None)),
            },
        };
        tracing::info!("the VM runs at its destination; the rest of its memory follows");
        let pages = self.progress.get(Counter::PostCopyPages);
        let cut_off = rest(&self.request.vm, &copied.shared, &self.progress).await;
        let mut resumed = None;
        if let Err(cut) = cut_off {
            copied.shared.stop(RelayError::Stopped);
            let left = self.left();
            let cause = match cut {
                CutOff::GuestEnded(how) => return Err(left.over(how, &self.progress).await),
                CutOff::Broken(cause) => cause,
            };
            resumed = Some(left.send(cause, &self.progress).await?);
            remarks.push("post-copy was cut off, and went on".to_owned());
        }
        let (whole, total) = (Instant::now(), self.progress.elapsed());
        let stalls = match resumed {
            Some(since_then) => since_then,
            None => stalls(&copied.shared).await,
        };
        let mut summary = self.ended(&copied, running, remarks).await;
        summary.total_ms = total.as_secs_f64() * 1e3;
        summary.post_copy = Some(Box::new(PostCopy {
            total_ms: whole.saturating_duration_since(running).as_secs_f64() * 1e3,
            pages,
            requested_pages: self.progress.get(Counter::RequestedPages),
            stalls: stalls.map(crate::progress::stalls),
            kernel_pages: self.progress.get(Counter::KernelPages),
            ordered_pages: self.progress.get(Counter::OrderedPages),
            classes: self.progress.classes(),
        }));
        Ok(summary)
    }

    /// Waits for the destination's answer to the hand-over; `None` when the link ends first. As long as it may
    /// come back there is nothing better to do: neither side can go back.
    async fn taken(&self, shared: &Shared) -> Option<Result<(), String>> {
        let answered = shared.answered();
        tokio::pin!(answered);
        loop {
            match timeout(POLL, &mut answered).await {
                Ok(answer) => return answer,
                Err(_) => show(shared, None, &self.progress),
            }
        }
    }

    /// What is left to send if the stream breaks.
    fn left(&self) -> Rest {
        let request = &self.request;
        Rest {
            vm: Arc::clone(&request.vm),
            from: request.from.clone(),
            destination: request.destination.clone(),
            number: self.facts.offer.job,
            link_patience: request.link_patience,
        }
    }
}

/// Whether a QEMU whose migration went over to post-copy can still run the VM, by what it says of it; `None` as long as
/// it may be either.
pub(super) fn keeps(status: Option<&str>) -> Option<bool> {
    match status {
        None | Some("none" | "failed" | "cancelled") => Some(true),
        Some("completed") => Some(false),
        Some(status) if status.starts_with("postcopy-") && status != "postcopy-device" => {
            Some(false)
        }
        Some(_) => None,
    }
}

fn show(shared: &Shared, said: Option<&Said>, progress: &Progress) {
    let away = shared.link_away().map_or(0, |away| away.as_millis());
    let away = u64::try_from(away).unwrap_or(u64::MAX);
    progress.set(Counter::LinkAwayMs, away);
    if let Some(ram) = said.and_then(|said| said.ram) {
        progress.set(Counter::RemainingBytes, ram.remaining.saturating_add(1));
    }
}

/// What post-copy cost the guest, if the destination says so in time.
pub(super) async fn stalls(shared: &Shared) -> Option<Stalls> {
    let told = timeout(STALLS_PATIENCE, shared.stalls()).await;
    told.ok().flatten()
}

/// Waits until QEMU has sent the rest and the destination's has it.
pub(super) async fn rest(vm: &Vm, shared: &Shared, progress: &Progress) -> Result<(), CutOff> {
    let qmp = vm.qmp();
    let mut poll = interval(POLL);
    poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut events = qmp.events();
    let mut failed: Option<Instant> = None;
    loop {
        tokio::select! {
            // An event is only a reason to look at once.
            event = events.recv() => if event.is_err() && qmp.is_closed() {
                return Err(qmp.closed().await.into());
            },
            () = shared.failure(), if failed.is_none() => failed = Some(Instant::now()),
            _ = poll.tick() => {}
        }
        if let Some(how) = shared.guest_ended() {
            return Err(CutOff::GuestEnded(how));
        }
        let said = qmp
            .query_migrate()
            .await
            .map_err(|error| error.to_string())?;
        show(shared, Some(&said), progress);
        match said.status.as_deref() {
            Some("completed") => return Ok(()),
            // It waits for somebody to resume it.
            Some("postcopy-paused" | "failed" | "cancelled") => {
                let cause = shared.take_failure();
                let cause = match (cause, said.error_desc) {
                    (Some(cause), _) => cause.to_string(),
                    (None, Some(said)) => format!("QEMU: {said}"),
                    (None, None) => "QEMU's stream broke".to_owned(),
                };
                return Err(cause.into());
            }
            // QEMU before 8.0 may wait for the end of its return path for ever.
            _ if failed.is_some_and(|since| since.elapsed() > PATIENCE) => {
                let cause = shared.take_failure();
                return Err(cause
                    .map_or_else(String::new, |cause| cause.to_string())
                    .into());
            }
            _ => {}
        }
    }
}
