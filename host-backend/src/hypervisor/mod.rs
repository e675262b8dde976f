//! Drivers of hypervisors: start, find, watch and stop virtual machines. They know nothing of pages.

pub mod definition;
mod error;
mod size;

pub use definition::Definition;
pub use error::Error;
pub use size::Size;

/// What this room's functions return.
pub type Result<T> = std::result::Result<T, Error>;
