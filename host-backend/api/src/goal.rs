//! What a migration is to reach.

use crate::Mode;
use serde::{Deserialize, Serialize};

/// What an operator wants.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Goal {
    /// The VM should run at its destination so long after the command, in seconds. Then the migration ends,
    /// whether or not it has succeeded.
    pub deadline_s: Option<u32>,
    /// Nobody should run it for longer than this, in milliseconds.
    pub max_downtime_ms: Option<u32>,
    /// QEMU may slow the guest down.
    pub may_throttle: bool,
    /// How memory moves.
    #[serde(default, skip_serializing_if = "Mode::is_default")]
    pub mode: Mode,
}
