//! What the destination does with what arrives: reads pages from disks, verifies and places them, and tells the guest.

pub(crate) mod disk_reader;
pub(crate) mod fault_gate;
pub(crate) mod frames;
pub(crate) mod missing_pages;
#[cfg(test)]
mod models;
pub(crate) mod output;
pub(crate) mod placement;
#[cfg(test)]
mod placement_tests;
pub(crate) mod read_plan;
pub(crate) mod replies;
pub(crate) mod resume_state;

use transhume_base::sync;
