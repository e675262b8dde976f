//! What QEMU tells unasked (QMP's events).

use serde_json::Value;
use std::time::Duration;

/// Something that QEMU tells unasked.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its name, as in `STOP`.
    pub name: String,
    /// What it says.
    pub data: Value,
    /// When it happened by QEMU's clock: since 1970.
    pub at: Duration,
}
