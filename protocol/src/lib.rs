//! What Transhume puts on a wire: decoders and encoders, without I/O.
//!
//! Every decoder takes bytes that it does not trust: it bounds a length before it believes it, never
//! panics, and says what was wrong.
#![cfg_attr(not(any(feature = "std", test)), no_std)]

pub mod agent;
#[cfg(feature = "std")]
pub mod link;
#[cfg(feature = "std")]
pub mod memory;
pub mod nbd;
#[cfg(feature = "std")]
pub mod qemu;
mod varint;
