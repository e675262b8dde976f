//! Drivers of hypervisors: start, find, watch and stop virtual machines. They know nothing of pages.

pub mod definition;
mod error;
pub mod lines;
pub mod qmp;
pub mod qmp_commands;
mod size;

pub use definition::Definition;
pub use error::Error;
pub use qmp::Qmp;
pub use size::Size;

/// What this room's functions return.
pub type Result<T> = std::result::Result<T, Error>;
