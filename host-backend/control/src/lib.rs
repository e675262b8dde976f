//! The service's own room: its tables of VMs and jobs.

#![cfg_attr(test, allow(clippy::disallowed_methods))]

pub mod access;
mod certificates;
pub mod config;
pub mod daemon;
mod door;
mod elsewhere;
mod error;
pub mod jobs;
mod logs;
mod resolve;
pub mod server;
mod socket;
mod state;
mod table;
mod vms;
mod watch;

pub use error::Error;

/// What this room's functions return.
pub type Result<T> = std::result::Result<T, Error>;
