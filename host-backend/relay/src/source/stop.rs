//! Why a migration ends before its commit.

use std::time::Duration;

use crate::error::RelayError;
use transhume_hypervisor as hypervisor;

/// How long the link may be away while nobody runs the VM.
pub(crate) const PAUSED_TIMEOUT: Duration = Duration::from_secs(3);

/// Why the phases before the commit were left.
#[derive(Debug)]
pub(crate) enum Stop {
    Cancelled,
    /// QEMU ends, and has said why.
    Ended,
    Failed(String),
}

impl From<RelayError> for Stop {
    fn from(error: RelayError) -> Self {
        Self::Failed(error.to_string())
    }
}

impl From<hypervisor::Error> for Stop {
    fn from(error: hypervisor::Error) -> Self {
        Self::Failed(error.to_string())
    }
}

impl From<std::io::Error> for Stop {
    fn from(error: std::io::Error) -> Self {
        Self::Failed(error.to_string())
    }
}

pub(crate) fn link_away_while_paused() -> Stop {
    Stop::Failed(format!(
        "the link went away while the VM was paused, and did not come back for {} seconds",
        PAUSED_TIMEOUT.as_secs()
    ))
}
