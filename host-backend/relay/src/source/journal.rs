//! The source's journal: each phase is noted in it before it is acted on, the commit included.

use std::sync::Arc;

use super::stop::Stop;
use crate::progress::Progress;
use transhume_api::migration::Phase;

/// Where the phases of a migration are noted before they are acted on.
pub trait Journal: Send + Sync {
    /// Notes the phase that the migration's progress is in. `number` is the offer's; `running`: whether the
    /// VM ran when it began.
    ///
    /// # Errors
    /// If it cannot be noted: then it is not acted on.
    fn note(&self, number: u64, running: bool) -> std::io::Result<()>;
}

/// The journal of one migration.
pub(crate) struct Phases {
    pub(crate) journal: Arc<dyn Journal>,
    pub(crate) progress: Arc<Progress>,
    /// This host, for messages.
    pub(crate) host: String,
}

impl Phases {
    /// Enters a phase: it is noted, and only then acted on. For the commit that is the point of no return.
    pub(crate) fn enter(&self, phase: Phase, number: u64, running: bool) -> Result<(), Stop> {
        self.progress.enter(phase);
        self.note(number, running)
    }

    /// Notes the phase that it is in, by a number that is new.
    pub(crate) fn note(&self, number: u64, running: bool) -> Result<(), Stop> {
        let noted = self.journal.note(number, running);
        noted.map_err(|error| {
            Stop::Failed(format!(
                "{} cannot write its journal: {error}; is its `state-directory` full?",
                self.host
            ))
        })
    }
}
