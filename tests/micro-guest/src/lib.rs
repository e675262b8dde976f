//! What the micro-guest and the host that tests it share.
//!
//! The guest itself is the binary of this package; see `README.md` for its parameters and commands.
#![cfg_attr(not(any(feature = "host", test)), no_std)]

pub mod content;
#[cfg(feature = "host")]
pub mod control;
#[cfg(feature = "host")]
pub mod image;
