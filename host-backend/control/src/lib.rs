//! The service's own room: its tables of VMs and jobs.

#![cfg_attr(test, allow(clippy::disallowed_methods))]

mod arriving_vms;
mod ask_other_hosts;
mod autostart;
mod certificate_expiry;
pub mod config;
pub mod config_hosts;
pub mod daemon;
mod error;
pub mod host_access;
mod in_doubt;
pub mod job;
mod log_bounds;
mod migrate;
pub mod service;
mod socket;
mod state_directory;
mod vm_info;
mod vm_recovery;
mod vm_requests;
mod vm_table;
mod vm_watch;

pub use error::Error;

/// What this room's functions return.
pub type Result<T> = std::result::Result<T, Error>;
