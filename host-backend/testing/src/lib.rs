//! What the tests of several rooms share.

#![allow(clippy::expect_used, clippy::panic, reason = "only tests use it")]

pub mod allocation;
mod image;
mod log;
pub mod model_sync;
mod offer;
mod program;

pub use allocation::peak;
pub use image::qcow2_header;
pub use log::written;
pub use offer::some_offer;
pub use program::{others_get_through, program};
