//! Transhume's host side: the service `transhumed`, the command `transhume`, and the rooms they are
//! made of. A room knows the rooms below it only:
//! `control` → `pki`, `relay` → `pages`, `guest`, `volume`, `link`, `hypervisor`.

#![cfg_attr(test, allow(clippy::disallowed_methods))]

pub mod allocator;
pub mod audit;
mod bounded;
pub mod control;
#[cfg(test)]
mod counted;
mod durable;
pub mod guest;
pub mod hypervisor;
pub mod link;
pub mod pages;
pub mod pki;
pub mod relay;
mod task;
mod text;
pub mod volume;
