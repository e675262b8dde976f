//! What is told of a job.

use crate::FailureKind;
use crate::migration::{Phase, Snapshot, Summary};
use serde::{Deserialize, Serialize};
use transhume_base::process_identity::Identity;

/// How a job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobState {
    /// It goes on.
    Running,
    /// The VM runs at its destination.
    Completed,
    /// A dry run has told its plan.
    Planned,
    /// It was refused before the guest was touched.
    Refused,
    /// It failed; the VM runs at the source.
    Failed,
    /// It was cancelled; the VM runs at the source.
    Cancelled,
    /// Nobody knows who has the VM: an operator must look.
    Unresolved,
    /// The VM's guest ended by itself meanwhile: nothing runs it any more.
    Ended,
    /// The VM's QEMU ended, and not by its guest's doing: nothing runs it any more, or part of its memory is lost.
    Lost,
}

impl JobState {
    /// What `transhume` exits with when the job ended so; `None` for a success.
    pub fn failure(self) -> Option<FailureKind> {
        match self {
            Self::Running | Self::Completed | Self::Planned => None,
            Self::Refused => Some(FailureKind::Refused),
            Self::Failed | Self::Cancelled => Some(FailureKind::MigrationFailed),
            Self::Unresolved => Some(FailureKind::Unresolved),
            Self::Ended => Some(FailureKind::Ended),
            Self::Lost => Some(FailureKind::Lost),
        }
    }
}

/// What a destination knows a migration by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Offered {
    /// The offer's number, in hexadecimal.
    pub number: String,
    /// Whether the VM ran.
    pub running: bool,
    /// Whether it goes over, or went, in post-copy: from then on part of its memory may be at the source alone.
    #[serde(default)]
    pub post_copy: bool,
}

impl Offered {
    /// The same as a number.
    pub fn number(&self) -> Option<u64> {
        u64::from_str_radix(&self.number, 16).ok()
    }
}

/// A migration, running or ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct JobInfo {
    /// Its number on this host.
    pub id: u64,
    /// The VM.
    pub vm: String,
    /// The host that it leaves.
    pub from: String,
    /// The host that it goes to.
    pub to: String,
    /// Whether it only tells what would be done.
    pub dry_run: bool,
    /// How it stands.
    pub state: JobState,
    /// When it started, in milliseconds since 1970.
    pub started_ms: u64,
    /// Where it is, or was when it ended.
    pub progress: Snapshot,
    /// The QEMU that it moves; absent where its process is not known.
    #[serde(default)]
    pub qemu: Option<Identity>,
    /// What was offered to the destination; absent before that.
    #[serde(default)]
    pub offer: Option<Offered>,
    /// Whether it is unresolved because nobody knows which of the two hosts has the VM.
    #[serde(default)]
    pub in_doubt: bool,
    /// Why it did not succeed, with what to do; or how it was settled.
    pub error: Option<String>,
    /// How it went, when it is completed.
    pub summary: Option<Summary>,
    /// What would be done, when it is planned.
    pub plan: Option<serde_json::Value>,
    /// The plan, for people.
    pub plan_text: Option<String>,
}

impl JobInfo {
    /// Whether it moves, or moved, that QEMU. One of which nothing is known is no QEMU that it moved.
    pub fn moves(&self, qemu: Option<&Identity>) -> bool {
        match (&self.qemu, qemu) {
            (_, None) => false,
            (Some(moved), Some(found)) => moved == found,
            // Noted by a version that kept no process.
            (None, Some(found)) => found.is_older_than(self.started_ms),
        }
    }

    /// Whether it has sent the commit, or may have.
    pub fn may_be_handed_over(&self) -> bool {
        matches!(self.progress.phase, Phase::Commit | Phase::PostCopy) || self.is_in_post_copy()
    }

    /// Whether the VM was handed over in post-copy, or may have been.
    pub fn is_in_post_copy(&self) -> bool {
        self.offer.as_ref().is_some_and(|offer| offer.post_copy)
    }
}
