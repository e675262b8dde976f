//! What every room of the host side stands on: files that survive a power cut, bounded input, what is logged and by whom,
//! processes and what they may do. Nothing here knows of a hypervisor, a link or a migration.

#![cfg_attr(test, allow(clippy::disallowed_methods))]

pub mod allocator;
pub mod audit;
pub mod bounded;
pub mod confine;
pub mod durable;
pub mod lines;
pub mod names;
pub mod process_identity;
pub mod process_memory;
pub mod sync;
pub mod task;
pub mod text;
pub mod vectored;
