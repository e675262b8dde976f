//! How a migration ends: the hand-over. All undone is `undo.rs`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::timeout;
use transhume_protocol::link::{Control, encode_control};

use super::migration::{Copied, Migration};
use super::request::{Keeper, Request, ask};
use super::stop::Stop;
use crate::Error;
use crate::error::RelayError;
use crate::policy::goal::Aim;
use transhume_api::migration::{Downtime, Phase, Summary};
use transhume_api::{Choice, Mode};
use transhume_link::TIMEOUT;

/// How long a silent destination is asked what became of the VM.
const QUERY_TIMEOUT: Duration = Duration::from_secs(30);

impl Migration {
    /// Phases [`Phase::Commit`] and [`Phase::Completed`]. From the moment that the commit is sent the VM
    /// belongs to the destination, unless that says that it did not take it.
    pub(crate) async fn hand_over(mut self, copied: Copied) -> Result<Summary, Error> {
        if self
            .progress
            .choice()
            .is_some_and(|choice| choice.mode == Mode::Post)
        {
            let why = "all of it had moved before the VM could go over to post-copy".to_owned();
            let mode = Mode::Pre;
            self.progress.choose(Choice { mode, why });
        }
        copied.shared.settle_doubts().await;
        if copied.shared.failed() {
            let stop = self.why_failed(&copied.shared).await;
            return Err(self.undo(stop).await);
        }
        if self.has_shut_down().await {
            return Err(self.undo(Stop::Ended).await);
        }
        if let Err(stop) = self.enter(Phase::Commit) {
            return Err(self.undo(stop).await);
        }
        let commit = match encode_control(&Control::Commit) {
            Ok(commit) => commit,
            Err(error) => return Err(self.undo(Stop::Failed(error.to_string())).await),
        };
        copied.shared.push_commit(commit);
        let answered = timeout(TIMEOUT, copied.shared.answered()).await;
        let taken = match answered {
            Ok(Some(Ok(()))) => Ok(()),
            Ok(Some(Err(reason))) => Err(reason),
            Ok(None) | Err(_) => match self.ask_what_became().await {
                Some(true) => Ok(()),
                Some(false) => Err("the other host did not take the VM over".to_owned()),
                None => return Err(self.give_up(&copied.shared, None)),
            },
        };
        let running = Instant::now();
        if let Err(reason) = taken {
            return Err(self.undo(Stop::Failed(reason)).await);
        }
        let remarks = self
            .reports
            .take()
            .map(|reports| reports.finish())
            .unwrap_or_default();
        Ok(self.ended(&copied, running, remarks).await)
    }

    /// Whether the guest shut down just before it was paused. What it asked of this QEMU the destination's does not
    /// know.
    async fn has_shut_down(&self) -> bool {
        let qmp = self.request.vm.qmp();
        if !self.may_go_over() {
            // Nothing waited since the pause. QEMU's main loop looks for it once a round, and an answer takes a part
            // of one.
            for _ in 0..2 {
                let _ = qmp.status().await;
            }
        }
        qmp.guest_end().is_some()
    }

    /// All of the VM is at the destination: nothing of it is kept here.
    pub(crate) async fn ended(
        &self,
        copied: &Copied,
        running: Instant,
        mut remarks: Vec<String>,
    ) -> Summary {
        let breaks = self.early_breaks + copied.shared.link_breaks();
        if breaks > 0 {
            remarks.push(match breaks {
                1 => "a connection of the link broke, and was taken up again".to_owned(),
                _ => {
                    format!("connections of the link broke {breaks} times, and were taken up again")
                }
            });
        }
        copied.shared.stop(RelayError::Stopped);
        if let Err(error) = self.request.vm.discard_whole().await {
            tracing::warn!(%error, "QEMU of the VM that has moved cannot be ended");
        }
        self.progress.enter(Phase::Completed);
        self.summary(copied, running, remarks)
    }

    fn summary(&self, copied: &Copied, running: Instant, mut remarks: Vec<String>) -> Summary {
        let ms =
            |from: Instant, to: Instant| to.saturating_duration_since(from).as_secs_f64() * 1e3;
        let sent = copied.shared.memory_sent().unwrap_or(copied.completed);
        // The word of it was half a round trip on its way.
        let way = copied.shared.flow.round_trip() / 2;
        let running = running.checked_sub(way).unwrap_or(running);
        let running = running.max(copied.completed);
        let snapshot = self.progress.snapshot();
        let downtime = Downtime {
            memory_ms: ms(copied.paused, sent),
            devices_ms: ms(sent, copied.completed),
            handover_ms: ms(copied.completed, running),
            total_ms: ms(copied.paused, running),
        };
        if self.facts.running {
            remarks.extend(self.request.goal.missed(downtime.total_ms));
        }
        Summary {
            vm: self.request.vm.name().to_owned(),
            from: self.request.from.clone(),
            to: self.request.destination.host.clone(),
            total_ms: self.progress.elapsed().as_secs_f64() * 1e3,
            phases: self.progress.phases(),
            downtime,
            post_copy: None,
            choice: snapshot.choice,
            expected: self.progress.predicted(),
            traffic: snapshot.traffic,
            hinted_pages: snapshot.hinted_pages,
            remarks,
        }
    }

    /// Asks a destination that fell silent after the commit, on new connections.
    pub(crate) async fn ask_what_became(&self) -> Option<bool> {
        let Request {
            vm, destination, ..
        } = &self.request;
        let keeper = Keeper::Qemu(Arc::clone(vm));
        ask(
            destination,
            vm.name(),
            self.facts.offer.job,
            &keeper,
            QUERY_TIMEOUT,
        )
        .await
    }
}
