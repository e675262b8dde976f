//! When QEMU may pause the VM.
//!
//! QEMU switches over when what is left fits into its `downtime-limit` at the rate that it sees. But it
//! sees the rate at which the relay takes the stream, and while most of it is page cache that is far
//! above what the link carries. So the limit is corrected, several times a second, by the ratio of the
//! two; and where QEMU waits for the destination's leave (`switchover-ack`) that is held back until the
//! destination has nearly everything.

use std::time::Instant;

use serde_json::json;

use crate::error::RelayError;
use crate::policy::goal::{Aim, Seen};
use crate::progress::Counter;
use crate::send::link_rate::ASSUMED_RATE;
use crate::send::shared::Shared;
use transhume_api::Goal;
use transhume_hypervisor::Qmp;
use transhume_hypervisor::qmp_commands::Migration;
use transhume_pages::PAGE_SIZE;

/// The limit for the start, when nothing is known, in milliseconds.
pub(crate) const FIRST_LIMIT_MS: u64 = 5;

/// Follows QEMU's migration.
pub(crate) struct Switchover {
    goal: Goal,
    limit_ms: u64,
    bytes: u64,
    at: Instant,
}

impl Switchover {
    pub(crate) fn new(goal: Goal) -> Self {
        Self {
            goal,
            limit_ms: FIRST_LIMIT_MS,
            bytes: 0,
            at: Instant::now(),
        }
    }

    /// Looks at the migration as QEMU sees it, and steers. Returns what is seen, if it was time for a look.
    pub(crate) async fn follow(
        &mut self,
        migration: &Migration,
        shared: &Shared,
        qmp: &Qmp,
    ) -> Result<Option<Seen>, RelayError> {
        let Some(ram) = migration.ram else {
            return Ok(None);
        };
        shared
            .progress
            .set(Counter::RemainingBytes, ram.remaining + 1);
        shared.progress.set(Counter::TotalBytes, ram.total);
        if ram.dirty_sync_count >= 2 && shared.flow.owes_little() {
            shared.release_switchover()?;
        }
        shared.ask_for_clock()?;
        let bytes = shared.progress.get(Counter::StreamBytes);
        let seconds = self.at.elapsed().as_secs_f64();
        if seconds < 0.1 {
            return Ok(None);
        }
        let stream = (bytes - self.bytes) as f64 / seconds;
        self.bytes = bytes;
        self.at = Instant::now();
        let link = shared.rate();
        let seen = Seen {
            scans: ram.dirty_sync_count,
            remaining: ram.remaining as f64,
            written: ram.dirty_pages_rate as f64 * PAGE_SIZE as f64,
            link: link.unwrap_or(ASSUMED_RATE),
            measured: link.is_some(),
            stream,
            behind: shared.flow.behind() as f64,
            round_trip: shared.flow.round_trip(),
            elapsed: shared.progress.elapsed(),
        };
        let limit_ms = limit(self.goal.pause_ms(&seen), seen.link, stream);
        if limit_ms != self.limit_ms {
            self.limit_ms = limit_ms;
            // A QEMU that is just switching over may refuse: then it needs no limit any more.
            let set = qmp
                .migrate_set_parameters(json!({ "downtime-limit": limit_ms }))
                .await;
            if let Err(error) = set {
                tracing::debug!(%error, "downtime-limit not set");
            }
        }
        Ok(Some(seen))
    }
}

/// The limit for QEMU, in milliseconds, that makes the pause as long as it is meant to be.
fn limit(pause_ms: f64, link_rate: f64, seen_rate: f64) -> u64 {
    let limit = pause_ms * link_rate / seen_rate.max(1.0);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped"
    )]
    let limit = limit.clamp(1.0, pause_ms.max(1.0)) as u64;
    limit
}

#[cfg(test)]
mod tests {
    use super::limit;

    #[test]
    fn the_limit_follows_the_ratio_of_the_rates() {
        assert_eq!(limit(80.0, 100e6, 1000e6), 8);
        assert_eq!(limit(80.0, 100e6, 50e6), 80);
        assert_eq!(limit(300.0, 100e6, 0.0), 300);
        assert_eq!(limit(80.0, 1.0, 1e12), 1);
    }
}
