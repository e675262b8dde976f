//! The destination's end: looks at an offer, prepares a QEMU, takes memory in, takes the VM over.
//!
//! Contract: this host runs the VM only after the source's commit. Until then every end of a migration,
//! also that of this process, ends in the QEMU being killed that was prepared for it.

mod answer;
mod attempts;
mod decision;
mod endings;
mod engine;
mod held;
mod host;
mod incoming;
mod journal;
mod offer_check;
mod outcomes;
mod peer_access;
mod post_copy;
mod preparation;
mod recovery;
mod resume;
mod run_directory;
mod service;

pub use host::Host;
pub use journal::Arrivals;
pub use recovery::{Left, Recovered, recover};
pub use run_directory::arriving_job;
pub use service::serve;
