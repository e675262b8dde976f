//! Sessions of migrations that arrive: for connections that join them, and for a source that begins anew.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::link::session::{Ready, Session};

/// A session and whose it is.
#[derive(Clone)]
pub(super) struct Open {
    pub(super) job: u64,
    pub(super) token: [u8; 16],
    /// The source.
    pub(super) from: String,
    pub(super) vm: String,
    pub(super) connections: u8,
    pub(super) session: Session<Ready>,
}

/// See the module.
#[derive(Clone, Default)]
pub(super) struct Sessions(Arc<Mutex<Vec<Open>>>);

/// Forgets a session when it is dropped.
pub(super) struct Entry {
    sessions: Sessions,
    job: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.sessions.lock().retain(|open| open.job != self.job);
    }
}

impl Sessions {
    fn lock(&self) -> MutexGuard<'_, Vec<Open>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a session known as long as the entry lives.
    pub(super) fn enter(&self, open: Open) -> Entry {
        let entry = Entry {
            sessions: self.clone(),
            job: open.job,
        };
        self.lock().push(open);
        entry
    }

    /// The session of a migration.
    pub(super) fn of(&self, job: u64) -> Option<Open> {
        self.lock().iter().find(|open| open.job == job).cloned()
    }

    /// Ends sessions of a VM whose source is not there any more and begins anew.
    pub(super) fn end_earlier(&self, vm: &str, from: &str) {
        let open = self.lock().clone();
        let earlier = open
            .iter()
            .filter(|open| open.vm == vm && open.from == from && open.session.away().is_some());
        for open in earlier {
            tracing::info!(
                vm,
                job = open.job,
                "its source begins anew: the earlier migration ends"
            );
            open.session.close();
        }
    }
}
