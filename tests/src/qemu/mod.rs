//! Runs real QEMUs by hand: for the side that Transhume is compared with, and for adoption.

mod launch;
pub mod migrate;
pub mod qmp;
pub mod serial;

pub use launch::{Accelerator, AgentPort, Card, DiskImage, Machine, Vm};
pub(crate) use launch::{BOOT, boots};
