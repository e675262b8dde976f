//! What became of the last migrations.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use super::attempts::Attempts;
use transhume_link::server::Sessions;

/// Migrations whose end is remembered.
const REMEMBERED: usize = 256;
/// How long a query waits for a migration that is being decided.
const DECISION_TIMEOUT: Duration = Duration::from_secs(8);

/// What became of the last migrations, for a source that asks.
#[derive(Default)]
pub(crate) struct Outcomes {
    pub(crate) attempts: Attempts,
    pub(crate) sessions: Sessions,
    known: Mutex<VecDeque<Migration>>,
}

struct Migration {
    job: u64,
    from: String,
    outcome: watch::Receiver<Option<bool>>,
}

impl Outcomes {
    /// Begins to remember a migration; `true` is sent when the VM was taken, `false` when not.
    pub(crate) fn begin(&self, job: u64, from: &str) -> watch::Sender<Option<bool>> {
        let (sender, outcome) = watch::channel(None);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= REMEMBERED {
            known.pop_front();
        }
        known.push_back(Migration {
            job,
            from: from.to_owned(),
            outcome,
        });
        sender
    }

    /// Whether migrations of that number are known, and all came from other hosts.
    pub(crate) fn is_of_others(&self, job: u64, is_from: impl Fn(&str) -> bool) -> bool {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let mut same = known.iter().filter(|one| one.job == job).peekable();
        same.peek().is_some() && !same.any(|one| is_from(&one.from))
    }

    /// Whether the VM was taken; waits for a migration that is being decided. `None` when it is still
    /// not, or unknown.
    pub(crate) async fn of(&self, job: u64, is_from: impl Fn(&str) -> bool) -> Option<bool> {
        let receiver = {
            let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known
                .iter()
                .rev()
                .find(|one| one.job == job && is_from(&one.from))
                .map(|one| one.outcome.clone())
        };
        let mut receiver = receiver?;
        let decided =
            tokio::time::timeout(DECISION_TIMEOUT, receiver.wait_for(Option::is_some)).await;
        match decided {
            Ok(Ok(outcome)) => *outcome,
            // It cannot be decided, or not yet.
            Ok(Err(_)) | Err(_) => None,
        }
    }
}
