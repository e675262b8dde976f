//! QEMU's migration stream and its return path.
//!
//! Known: the stream of QEMU 7.2 to 10.0 on x86 for machine types from 2.4 on (older ones send neither
//! configuration nor footers), version 3, plain RAM records, and the channels of [`multifd`]. Refused with the
//! name of what to turn off: capabilities that change the records. Multifd leaves no trace in the stream of QEMU
//! 7.2, so whoever starts the migration must see that it is off where nobody reads the channels.
//!
//! ```text
//! magic u32 | version u32 | 7 configuration
//! 8 command ..                                        OPEN_RETURN_PATH, PING, POSTCOPY_ADVISE
//! 1 START ram | record MEM_SIZE + table | EOS | footer
//! 2 PART | records .. | EOS | footer                  repeated, commands between them
//! 3 END  | records .. | EOS | footer
//! 4 FULL ..                                           devices: no length, so the rest is opaque
//! ```
//!
//! Integers are big-endian. A record is a `u64` of page-aligned offset and flags, the block's name (a
//! length byte and text) unless CONTINUE says "as before", and the content.
//!
//! In post-copy the devices come early, inside the command PACKAGED, and PART and END follow it.

mod command;
mod configuration;
mod decoder;
mod discard;
mod encoder;
mod error;
pub mod multifd;
mod reader;
pub mod return_path;

pub use command::{Command, CommandKind};
pub use configuration::Configuration;
pub use decoder::{Decoder, Item, Kind};
pub use encoder::{Encoder, start_stream};
pub use error::Error;

/// Bytes of a page in a RAM record: the target page size of x86.
pub const PAGE_SIZE: usize = 4096;
/// [`PAGE_SIZE`] as a length in memory.
const PAGE: u64 = 4096;
/// Bits of a record's first word that are flags.
const FLAGS: u64 = PAGE - 1;
/// Most RAM blocks in a stream. A VM has one or few for its memory and one for each device's ROM.
pub const MAX_BLOCKS: usize = 1024;
/// Longest name of a block, a section or a machine, in bytes.
pub const MAX_NAME_LEN: usize = 255;
/// Longest item that [`Decoder::next`] needs whole (a block table), in bytes: with so much input it
/// never asks for more.
pub const MAX_ITEM_LEN: usize = 8 + MAX_BLOCKS * (1 + MAX_NAME_LEN + 8);

/// A page of the guest's memory. A place in a block, not a guest-physical address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Page {
    /// Number of the block in the table.
    pub block: u16,
    /// Offset in the block, in bytes; a multiple of [`PAGE_SIZE`].
    pub offset: u64,
}

const MAGIC: u32 = 0x5145_564d;
const VERSION: u32 = 3;
/// Version of the ram section.
const RAM_VERSION: u32 = 4;
const RAM_NAME: &str = "ram";

/// What a byte between sections announces.
mod section {
    pub(super) const END_OF_STREAM: u8 = 0x00;
    pub(super) const START: u8 = 0x01;
    pub(super) const PART: u8 = 0x02;
    pub(super) const END: u8 = 0x03;
    pub(super) const FULL: u8 = 0x04;
    pub(super) const SUBSECTION: u8 = 0x05;
    pub(super) const CONFIGURATION: u8 = 0x07;
    pub(super) const COMMAND: u8 = 0x08;
    pub(super) const FOOTER: u8 = 0x7e;
}

/// Flags of a RAM record.
mod flag {
    pub(super) const ZERO: u64 = 0x002;
    pub(super) const MEM_SIZE: u64 = 0x004;
    pub(super) const PAGE: u64 = 0x008;
    pub(super) const END_OF_SECTION: u64 = 0x010;
    pub(super) const CONTINUE: u64 = 0x020;
    pub(super) const XBZRLE: u64 = 0x040;
    pub(super) const HOOK: u64 = 0x080;
    pub(super) const COMPRESS: u64 = 0x100;
    pub(super) const MULTIFD_FLUSH: u64 = 0x200;
}
