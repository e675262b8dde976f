//! The two ends of a memory migration, and the phases that they share.
//!
//! [`source::migrate`] drives a migration; [`destination::serve`] answers it. Between them stand the
//! two QEMUs, unmodified, each of which believes that it speaks to the other one:
//!
//! ```text
//! QEMU ── stream ──► source relay ══ link ══► destination relay ── stream ──► QEMU
//!      ◄─ return path ──────────────────────────────────────── return path ──
//! ```

pub mod destination;
mod error;
pub mod progress;
pub mod source;
mod table;
mod threads;

pub use error::{Error, ErrorKind, Stays};
