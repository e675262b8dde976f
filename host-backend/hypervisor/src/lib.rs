//! Drivers of hypervisors: start, find, watch and stop virtual machines. They know nothing of pages.

#![cfg_attr(test, allow(clippy::disallowed_methods))]

mod ask_binary;
pub mod command_line;
#[cfg(test)]
mod confine_tests;
mod error;
mod event;
#[cfg(any(test, feature = "fake"))]
pub mod fake;
mod files;
mod handed;
mod holders;
mod inspect;
pub mod layout;
pub mod limits;
mod logs;
pub mod memory;
pub mod preflight;
mod process;
mod qemu_versions;
pub mod qmp;
pub mod qmp_commands;
mod shutdown;
pub mod stream;
mod tap;
pub mod virtqueues;
mod vm;

pub use command_line::Start;
pub use error::Error;
pub use event::Event;
pub use files::{LaunchSettings, RunFiles};
pub use handed::{Names, OpenedFiles};
pub use holders::holders;
pub use layout::Layout;
pub use limits::Limits;
pub use logs::Logs;
pub use qemu_versions::Build;
pub use qmp::Qmp;
pub use shutdown::Shutdown;
pub use vm::{Vm, is_block_device};

/// What this room's functions return.
pub type Result<T> = std::result::Result<T, Error>;
