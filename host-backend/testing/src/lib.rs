//! What the tests of several rooms share.

#![allow(clippy::expect_used, reason = "only tests use it")]

pub mod allocation;
mod log;
pub mod model_sync;

pub use allocation::peak;
pub use log::written;
