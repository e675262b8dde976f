//! Why a VM ends by itself, by QEMU's word: the event `SHUTDOWN` and its reason (qapi/run-state.json,
//! `ShutdownCause`). A QEMU that crashes or is killed says nothing.

use super::event::Event;
use transhume_protocol::link::GuestEnd;

/// Why QEMU ends, or stands still for good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Shutdown {
    /// By the guest's doing.
    Guest(GuestEnd),
    /// Somebody told it to, by QMP or a signal.
    Told,
    /// Something else, in QEMU's word.
    Other(String),
}

impl Shutdown {
    /// What the guest did, if it was that.
    pub fn guest(&self) -> Option<GuestEnd> {
        match self {
            Self::Guest(end) => Some(*end),
            Self::Told | Self::Other(_) => None,
        }
    }

    /// By the event `SHUTDOWN`.
    pub(super) fn of(event: &Event) -> Self {
        let reason = event.data.get("reason").and_then(|reason| reason.as_str());
        match reason.unwrap_or("no reason") {
            "guest-shutdown" => Self::Guest(GuestEnd::ShutDown),
            "guest-panic" => Self::Guest(GuestEnd::Panicked),
            "guest-reset" => Self::Guest(GuestEnd::Rebooted),
            "host-qmp-quit" | "host-signal" | "host-ui" => Self::Told,
            other => Self::Other(other.to_owned()),
        }
    }
}

impl std::fmt::Display for Shutdown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Guest(end) => write!(f, "its guest {}", end.did()),
            Self::Told => f.write_str("its QEMU was told to end"),
            Self::Other(reason) => write!(f, "its QEMU ended ({reason})"),
        }
    }
}
