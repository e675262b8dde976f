//! What the tests of several rooms share.

#![allow(clippy::expect_used, reason = "only tests use it")]

pub mod allocation;
mod image;
mod log;
pub mod model_sync;
mod offer;

pub use allocation::peak;
pub use image::qcow2_header;
pub use log::written;
pub use offer::some_offer;
