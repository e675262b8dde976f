//! Transhume's host side: the service `transhumed` and the command `transhume`, of those rooms that are no crates yet.
//! A room knows the rooms below it only: `control` → `relay` → `hypervisor`; all of them stand on the crates beside
//! this one (docs/decisions/0029).

#![cfg_attr(test, allow(clippy::disallowed_methods))]

pub mod control;
pub mod hypervisor;
pub mod relay;
