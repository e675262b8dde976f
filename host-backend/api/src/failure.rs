//! What did not succeed.

use serde::{Deserialize, Serialize};

/// Why something was not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What that means for the guest.
    pub kind: FailureKind,
    /// Cause and cure, for people.
    pub message: String,
}

/// What a failure means for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureKind {
    /// It failed.
    Failed,
    /// It was refused before anything was touched.
    Refused,
    /// The migration failed or was cancelled; the guest runs at the source.
    MigrationFailed,
    /// The outcome is not known: an operator must look.
    Unresolved,
    /// The VM's guest ended by itself during the migration: nothing runs it any more.
    Ended,
    /// The VM's QEMU ended during the migration, and not by its guest's doing.
    Lost,
}

impl FailureKind {
    /// The exit code of `transhume`.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::Refused => 3,
            Self::MigrationFailed => 4,
            Self::Unresolved => 5,
            Self::Ended => 6,
            Self::Lost => 7,
        }
    }
}
