//! The source's end: offers a VM, relays its stream, hands it over.
//!
//! Contract: whatever [`migrate`] returns but [`ErrorKind::Unresolved`](super::ErrorKind), exactly one
//! host runs the VM: the destination on success, this one on failure.

mod agent_listener;
mod cancel;
mod engine;
mod hand_over;
mod journal;
mod migration;
mod negotiation;
mod plan;
mod post_copy;
mod post_copy_start;
mod preparation;
mod remainder;
mod request;
mod resume;
mod stop;
mod survey;
mod undo;
mod watch;

pub use crate::storage::agreed::{SharedBy, SharedDisk};
pub use journal::Journal;
pub use migration::migrate;
pub use plan::DryRunPlan;
pub use request::{Destination, Keeper, Outcome, Presence, Request, ask, locate};
pub use resume::Rest;
