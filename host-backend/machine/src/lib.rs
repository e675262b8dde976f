//! What a virtual machine is made of, whoever runs it: its definition, and what its disks are based on.

#![cfg_attr(test, allow(clippy::disallowed_methods))]

pub mod definition;
mod error;
pub mod fields;
pub mod image_chain;
pub mod memory_layout;
mod size;

pub use definition::Definition;
pub use error::Error;
pub use size::Size;

/// What this room's functions return.
pub type Result<T> = std::result::Result<T, Error>;
