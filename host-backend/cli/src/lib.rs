//! The command `transhume`: speaks to this host's `transhumed`, and shows people what it says.

#![cfg_attr(test, allow(clippy::disallowed_methods))]

mod cli;
mod client;
mod error;
mod output;
mod show;
mod summary;
mod units;
mod vm_commands;

pub use cli::Cli;
pub use client::Client;
pub use error::Error;

/// What this room's functions return.
pub type Result<T> = std::result::Result<T, Error>;
