//! Transhume's guest agent: tells the host which page frames hold clean page cache, and where on
//! disk the same data stands.
//!
//! [`Session`] is the agent's side of the channel without I/O and without allocation: bytes from the
//! host go in, and it is asked for one frame at a time. What it reports comes from a [`PageCache`]; a [`Gate`]
//! puts processes to sleep that touch memory which has not arrived, where there is one, [`Classes`] tell which
//! memory is wanted first, and a [`Clock`] is set right that stood still while the guest moved.
//! Without the feature `linux` nothing else is here, so that a guest without an operating system
//! speaks the same code.
//!
//! ```
//! use core::time::Duration;
//! use transhume_agent::{Action, PageCache, Session};
//! use transhume_protocol::agent::MAX_FRAME_LEN;
//!
//! fn turn(session: &mut Session, cache: &mut impl PageCache, input: &[u8], now: Duration) {
//!     session.receive(input);
//!     let mut frame = [0; MAX_FRAME_LEN];
//!     match session.poll(cache, now, &mut frame) {
//!         Action::Send(length) => { /* write frame[..length] whole, then poll again */ }
//!         Action::Wait(pause) => { /* poll again after the pause, or when input comes */ }
//!         Action::Idle => { /* poll again when input comes */ }
//!     }
//! }
//! ```
#![cfg_attr(not(any(feature = "linux", feature = "compare", test)), no_std)]

mod cache;
mod classes;
mod clock;
#[cfg(feature = "compare")]
pub mod compare;
mod gate;
#[cfg(feature = "linux")]
pub mod linux;
mod pace;
mod session;
mod text;

pub use cache::{Disk, PageCache, Step};
pub use classes::{Classes, Named, NoClasses};
pub use clock::{Clock, NoClock};
pub use gate::{Gate, NoGate};
pub use session::{Action, Session};
pub use text::Text;
