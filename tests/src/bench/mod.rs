//! Side-by-side measurements of the same guest over the same link.

pub mod measure;
pub mod profile;

pub use measure::{Measured, Side, run};
pub use profile::Profile;
