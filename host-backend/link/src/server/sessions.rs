//! Sessions of migrations that arrive: for connections that join them, and for a source that begins anew.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::session::{Ready, Session};

/// How often the end of a session is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// A session and whose it is.
#[derive(Clone)]
pub struct Open {
    /// The number of its offer.
    pub job: u64,
    /// What a connection that joins it must know.
    pub token: [u8; 16],
    /// The source.
    pub from: String,
    /// The VM that arrives.
    pub vm: String,
    /// Connections that it may have.
    pub connections: u8,
    /// It.
    pub session: Session<Ready>,
}

#[derive(Default)]
struct State {
    open: Vec<Open>,
    /// Jobs for which a session is about to begin that resumes an earlier one.
    claimed: Vec<u64>,
}

/// See the module.
#[derive(Clone, Default)]
pub struct Sessions(Arc<Mutex<State>>);

/// Nobody else begins a session that resumes the job's, until this is dropped.
pub struct Claim {
    sessions: Sessions,
    job: u64,
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut state = self.sessions.lock();
        state.claimed.retain(|job| *job != self.job);
    }
}

/// Forgets a session when it is dropped.
pub struct Entry {
    sessions: Sessions,
    job: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut state = self.sessions.lock();
        state.open.retain(|open| open.job != self.job);
    }
}

impl Sessions {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a session known as long as the entry lives.
    pub fn enter(&self, open: Open) -> Entry {
        let entry = Entry {
            sessions: self.clone(),
            job: open.job,
        };
        self.lock().open.push(open);
        entry
    }

    /// The session of a migration.
    pub fn of(&self, job: u64) -> Option<Open> {
        let state = self.lock();
        state.open.iter().find(|open| open.job == job).cloned()
    }

    /// Claims a job; `None` if somebody else has.
    pub fn claim(&self, job: u64) -> Option<Claim> {
        let mut state = self.lock();
        if state.claimed.contains(&job) {
            return None;
        }
        state.claimed.push(job);
        Some(Claim {
            sessions: self.clone(),
            job,
        })
    }

    /// Ends the session of a migration, if there is one, and waits for all of it to be gone.
    ///
    /// # Errors
    /// If it is not in that time.
    pub async fn end(&self, job: u64, patience: Duration) -> Result<(), String> {
        let deadline = Instant::now() + patience;
        while let Some(open) = self.of(job) {
            open.session.close();
            if Instant::now() > deadline {
                return Err("what was begun before the link broke does not end".to_owned());
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        Ok(())
    }

    /// Ends sessions of a VM whose source is not there any more and begins anew.
    pub fn end_earlier(&self, vm: &str, from: &str) {
        let open = self.lock().open.clone();
        let earlier = open
            .iter()
            .filter(|open| open.vm == vm && open.from == from && open.session.away().is_some());
        for open in earlier {
            tracing::info!(
                vm,
                offer = open.job,
                "its source begins anew: the earlier migration ends"
            );
            open.session.close();
        }
    }
}
