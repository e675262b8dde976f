//! Transhume's host side: the service `transhumed`, of those rooms that are no crates yet.
//! `control` knows `relay`, and both stand on the crates beside this one (docs/decisions/0029).

#![cfg_attr(test, allow(clippy::disallowed_methods))]

pub mod control;
pub mod relay;
