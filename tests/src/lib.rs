//! Transhume's test bed: everything that it takes to move a real guest between two hosts on one
//! machine, from Debian's packages alone.
//!
//! It runs as root on Debian with Rust, needs no KVM, installs nothing but a few build tools, and
//! keeps all that it makes under `target/testbed`.

pub mod bench;
pub mod cleanup;
pub mod command;
pub mod error;
pub mod guest;
pub mod hosts;
pub mod layout;
pub mod packages;
pub mod progress;
pub mod qemu;
pub mod report;
pub mod scenario;
pub mod suite;

pub use error::{Error, Result};
