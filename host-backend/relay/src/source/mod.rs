//! The source's end: offers a VM, relays its stream, hands it over.
//!
//! Contract: whatever [`migrate`] returns but [`ErrorKind::Unresolved`](super::ErrorKind), exactly one
//! host runs the VM: the destination on success, this one on failure.

mod agreement;
mod answers;
mod buffers;
mod channel;
mod choice;
mod clocks;
mod collect;
mod compression;
mod doubt;
mod ending;
mod facts;
mod flow;
#[cfg(test)]
mod flow_models;
#[cfg(test)]
mod flow_tests;
mod frames;
mod goal;
mod hints;
mod ledger;
mod link_rate;
mod migration;
mod order;
mod postcopy;
mod preparation;
mod rendezvous;
#[cfg(test)]
mod rendezvous_models;
mod report;
mod request;
mod requests;
mod resume;
mod settings;
mod shared;
mod steer;
mod storage;
mod stream;
mod switchover;
mod transmit;

pub use facts::Plan;
pub use migration::migrate;
pub use request::{Destination, Journal, Keeper, Outcome, Presence, Request, ask, locate};
pub use resume::Rest;
pub use storage::{SharedBy, SharedDisk};
use transhume_base::sync;
use transhume_link::window;
