//! What the tests of several rooms share.

#![allow(clippy::expect_used, reason = "only tests use it")]

pub mod allocation;
mod image;
mod log;
pub mod model_sync;

pub use allocation::peak;
pub use image::qcow2_header;
pub use log::written;
