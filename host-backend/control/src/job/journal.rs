//! Notes a job's phases before they are acted on.

use super::{Job, Jobs};
use std::io;
use std::sync::Arc;
use transhume_api::Offered;
use transhume_api::migration::Phase;
use transhume_relay::source::Journal;

/// Notes a job's phases.
pub(crate) struct JobJournal {
    pub(crate) jobs: Arc<Jobs>,
    pub(crate) job: Arc<Job>,
}

impl Journal for JobJournal {
    fn note(&self, number: u64, running: bool) -> io::Result<()> {
        let info = self.job.info();
        let offered = Offered {
            number: format!("{number:016x}"),
            running,
            // It stays so, whatever phase comes after.
            post_copy: info.progress.phase == Phase::PostCopy || info.is_in_post_copy(),
        };
        let noted = self.jobs.note(&self.job, offered);
        noted.map_err(io::Error::other)
    }
}
