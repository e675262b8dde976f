//! When QEMU is let go over to post-copy.

use std::time::{Duration, Instant};

use transhume_protocol::link::{Control, encode_control};

use super::stop::Stop;
use crate::error::RelayError;
use crate::policy::goal::Seen;
use crate::policy::mode_choice::Choice;
use crate::progress::Counter;
use crate::send::shared::Shared;

/// Scans of memory after which post-copy may begin: the set-up counts as one.
const SCANS: u64 = 2;

/// Lets QEMU go over to post-copy.
#[derive(Default)]
pub(crate) struct Start {
    /// The destination was asked to wait for the link from then on.
    asked: bool,
    begun: bool,
    /// When the first scan began, and how much there was of it, in bytes.
    first: Option<(Instant, f64)>,
}

impl Start {
    /// Whether QEMU was told to.
    pub(crate) fn has_begun(&self) -> bool {
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
    pub(crate) async fn follow(
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
            shared.request_pages(&requests)?;
        }
        let is_urgent = choice.is_urgent(seen);
        if seen.scans < SCANS && !is_urgent {
            return Ok(());
        }
        if !self.asked {
            self.asked = true;
            shared.stay_near();
            let endure = encode_control(&Control::KeepWaiting).map_err(RelayError::from)?;
            shared.flow.push_control(endure);
        }
        if !shared.keeps_waiting() || !(is_ready || is_urgent) {
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
