//! The two ends of a memory migration, and the phases that they share.
//!
//! [`source::migrate`] drives a migration; [`destination::serve`] answers it. Between them stand the
//! two QEMUs, unmodified, each of which believes that it speaks to the other one:
//!
//! ```text
//! QEMU ── stream ──► source relay ══ link ══► destination relay ── stream ──► QEMU
//!      ◄─ return path ──────────────────────────────────────── return path ──
//! ```

#![cfg_attr(test, allow(clippy::disallowed_methods))]

pub mod destination;
mod error;
mod moved_guest;
mod policy;
pub mod progress;
mod qemu;
mod ram_blocks;
mod receive;
mod send;
pub mod source;
mod storage;
mod threads;

/// How long the link may be away while neither host's QEMU can run a VM in post-copy: the source's has written
/// its devices' state and does not go back, and the destination's has not loaded it.
const SWITCHOVER_LINK_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(86_400);

pub use error::{Error, ErrorKind, Stays};
pub use moved_guest::set_clock_right;
