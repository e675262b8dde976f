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
use std::time::Instant;

use tokio::sync::broadcast;
use tokio::time::timeout;

use super::migration::{Copied, Migration};
use super::remainder::{POLL_INTERVAL, rest, show, stalls};
use super::resume::Rest;
use super::stop::{PAUSED_TIMEOUT, Stop, link_away_while_paused};
use crate::Error;
use crate::error::{CutOff, RelayError};
use crate::progress::Counter;
use crate::qemu::return_path;
use crate::send::shared::Shared;
use transhume_api::migration::{Phase, PostCopy, Summary};
use transhume_hypervisor::qmp_commands::keeps_vm;
use transhume_hypervisor::{Event, stream};
use transhume_link::TIMEOUT;

fn status(event: &Event) -> Option<&str> {
    let status = event.data.get("status").and_then(|status| status.as_str());
    status.filter(|_| event.name == "MIGRATION")
}

impl Migration {
    /// The VM is paused, and QEMU waits for our leave. Returns when it was handed over by the stream, or is
    /// whole at the destination because post-copy was not needed.
    pub(crate) async fn let_go(
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
        shared.arm(stream::narrow)?;
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
                () = tokio::time::sleep(POLL_INTERVAL) => {
                    show(shared, None, &self.progress);
                    if shared.keeps_until_loaded() && shared.link_away() > Some(PAUSED_TIMEOUT) {
                        break link_away_while_paused();
                    }
                }
            }
        };
        match shared.abort() {
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
        shared.tell_loaded(&return_path::package_loaded())?;
        loop {
            let said = qmp.query_migrate().await?;
            match keeps_vm(said.status.as_deref()) {
                Some(false) => {
                    shared.hand_over()?;
                    return Ok(copied(Instant::now(), true));
                }
                Some(true) => {
                    shared.abort();
                    return Err(self.why_failed(shared).await);
                }
                None => {}
            }
            tokio::select! {
                event = events.recv() => if matches!(event, Err(broadcast::error::RecvError::Closed)) {
                    return Err(Stop::Failed(qmp.closed().await));
                },
                () = tokio::time::sleep(POLL_INTERVAL) => {}
            }
        }
    }

    /// Phase [`Phase::PostCopy`] from the hand-over on: the VM belongs to the destination unless that says that
    /// it did not take it, and the rest of its memory is here.
    pub(crate) async fn follow_up(mut self, copied: Copied) -> Result<Summary, Error> {
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
            None => match timeout(TIMEOUT, self.ask_what_became()).await {
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
            match timeout(POLL_INTERVAL, &mut answered).await {
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
