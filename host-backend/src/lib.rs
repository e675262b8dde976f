//! Transhume's host side: the service `transhumed`, the command `transhume`, and the rooms they are
//! made of. A room knows the rooms below it only:
//! `control` → `pki`, `relay` → `pages`, `guest`, `volume`, `link`, `hypervisor`.

#![cfg_attr(test, allow(clippy::disallowed_methods))]

pub mod control;
pub mod hypervisor;
pub mod relay;
