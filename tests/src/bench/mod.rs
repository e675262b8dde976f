//! Side-by-side measurements of the same guest over the same link.
//!
//! Every side is measured alike: from the command, when the destination's QEMU does not run yet, to the
//! guest running there; bytes by the link's own counters, both ways; work and silence by the guest's
//! serial line; and afterwards the guest compares all its data.

pub mod adapt;
mod ballast;
pub mod compare;
mod cpu;
pub mod measure;
pub mod micro;
pub mod post_copy;
pub mod profile;
pub mod relay;
pub mod setup;
mod slow_disk;

pub(crate) use slow_disk::detach;

pub use compare::{Comparison, compare};
pub use measure::{Measured, Side, run};
pub use profile::Profile;
pub use setup::Setup;
