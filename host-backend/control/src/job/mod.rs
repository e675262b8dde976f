//! A migration that was asked for, running or ended.

mod journal;
pub(super) mod messages;
mod table;

pub(super) use journal::JobJournal;
pub use table::{Begun, Jobs};

use super::state_directory::Unreadable;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::watch;
use transhume_api::migration::Summary;
use transhume_api::{JobInfo, JobState, Offered};
use transhume_relay::progress::Progress;

/// A migration, running or ended.
#[derive(Debug)]
pub struct Job {
    started: JobInfo,
    offer: Mutex<Option<Offered>>,
    progress: Arc<Progress>,
    cancel: watch::Sender<bool>,
    ended: watch::Sender<Option<JobInfo>>,
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Ending {
    /// The VM runs at its destination.
    Completed(Box<Summary>),
    /// A dry run's plan, for programs and for people.
    Planned(serde_json::Value, String),
    /// It did not succeed: one of the other states, and why.
    Failed(JobState, String),
    /// Nobody knows which host has the VM; what to do.
    InDoubt(String),
    /// It was in doubt, and is not any more: how it ended, and by whose word.
    Settled(JobState, String),
}

impl std::fmt::Display for Ending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Completed(summary) => write!(f, "{} runs on {}", summary.vm, summary.to),
            Self::Planned(_, text)
            | Self::Failed(_, text)
            | Self::InDoubt(text)
            | Self::Settled(_, text) => f.write_str(text),
        }
    }
}

impl Job {
    fn new(started: JobInfo, progress: Progress) -> Self {
        let ended = (started.state != JobState::Running).then(|| started.clone());
        Self {
            offer: Mutex::new(started.offer.clone()),
            started,
            progress: Arc::new(progress),
            cancel: watch::Sender::new(false),
            ended: watch::Sender::new(ended),
        }
    }

    /// One whose file cannot be read: its number and its VM's name are held back. It is never written, so the file
    /// stays as it is.
    fn unreadable(file: &Unreadable) -> Option<Self> {
        let (id, path) = (file.job()?, file.path.display());
        let vm = file.vm.clone();
        let vm_words = vm.as_deref().unwrap_or("the VM, whose name is not in it");
        let error = format!(
            "{path} cannot be read: {}. Look on both hosts which one has {vm_words} (`transhume vm show`). Then move the \
             file away, and restart transhumed",
            file.error
        );
        let progress = Progress::new();
        let info = JobInfo {
            id,
            vm: vm.unwrap_or_else(|| "?".to_owned()),
            from: "?".to_owned(),
            to: "?".to_owned(),
            dry_run: false,
            state: JobState::Unresolved,
            started_ms: 0,
            progress: progress.snapshot(),
            qemu: None,
            offer: None,
            in_doubt: true,
            error: Some(error),
            summary: None,
            plan: None,
            plan_text: None,
        };
        Some(Self::new(info, progress))
    }

    /// Its number.
    pub fn id(&self) -> u64 {
        self.started.id
    }

    /// The VM that it moves.
    pub fn vm(&self) -> &str {
        &self.started.vm
    }

    /// What its relay writes to.
    pub fn progress(&self) -> &Arc<Progress> {
        &self.progress
    }

    /// Turns true when it is to end.
    pub fn cancelled(&self) -> watch::Receiver<bool> {
        self.cancel.subscribe()
    }

    /// Asks it to end.
    pub fn cancel(&self) {
        self.cancel.send_replace(true);
    }

    /// Whether it goes on.
    pub fn is_running(&self) -> bool {
        self.ended.borrow().is_none()
    }

    /// Waits for its end.
    pub async fn ended(&self) {
        // An error would mean that the sender is gone, which we hold.
        let _ = self.ended.subscribe().wait_for(Option::is_some).await;
    }

    /// How it stands now, or stood when it ended.
    pub fn info(&self) -> JobInfo {
        let ended = self.ended.borrow().clone();
        ended.unwrap_or_else(|| self.now())
    }

    fn now(&self) -> JobInfo {
        let offer = self.offer.lock().unwrap_or_else(PoisonError::into_inner);
        JobInfo {
            progress: self.progress.snapshot(),
            offer: offer.clone(),
            state: JobState::Running,
            in_doubt: false,
            error: None,
            ..self.started.clone()
        }
    }
}
