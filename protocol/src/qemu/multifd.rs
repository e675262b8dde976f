//! QEMU's multifd channels: pages in packets, on sockets of their own beside the stream.
//!
//! Known: the channels of QEMU 7.2 to 10.0 without compression (`migration/multifd.h` there).
//!
//! ```text
//! greeting, once      magic u32 | version u32 | the VM's UUID | channel u8 | 39 bytes unused
//! packet, repeated    magic u32 | version u32 | flags u32 | room u32 | pages u32 | their length u32 |
//!                     number u64 | zero pages u32 | 28 bytes unused | block's name, 256 bytes, NUL behind it |
//!                     128 offsets u64, first those of pages and then those of zero pages
//!                     and the pages
//! ```
//!
//! Integers are big-endian. Nothing orders the channels among each other but the packets with the flag SYNC,
//! one in each channel for every [`super::Kind::Flush`] in the stream, or, where QEMU writes none of those, for
//! every end of a RAM section's records. What a packet holds beside the flag belongs before that point.

use super::decoder::check;
use super::reader::{Reader, Stop};
use super::{Error, FLAGS, MAX_NAME_LEN, PAGE_SIZE, Page};
use crate::memory::Block;

/// Bytes of a greeting.
pub const GREETING_LEN: usize = 64;
/// Most pages in a packet, zero pages included: 512 KiB of 4 KiB pages.
pub const MAX_PACKET_PAGES: usize = 128;
/// Bytes of a packet without its pages.
pub const PACKET_LEN: usize = OFFSETS_AT + MAX_PACKET_PAGES * size_of::<u64>();

const MAGIC: u32 = 0x1122_3344;
const VERSION: u32 = 1;
const SYNC: u32 = 1;
/// Which compression the pages have; 0 for none.
const COMPRESSION: u32 = 0x1f << 1;
/// The packet is a device's state, and not of this form.
const DEVICE_STATE: u32 = 1 << 6;
const ZERO_PAGES_AT: usize = 32;
const NAME_AT: usize = 64;
const NAME_LEN: usize = 256;
const OFFSETS_AT: usize = NAME_AT + NAME_LEN;

/// What a channel begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Greeting {
    /// The VM's UUID; zeros if it has none.
    pub uuid: [u8; 16],
    /// The channel's number, from 0 on.
    pub channel: u8,
}

/// A packet without its pages, which follow it in the channel.
#[derive(Debug, Clone, Copy)]
pub struct Packet<'a> {
    /// The channel is at a point of order when the packet's pages are worked off.
    pub sync: bool,
    /// QEMU's number for it. Not an order: QEMU 9.0 and later number packets when they are written.
    pub number: u64,
    block: u16,
    offsets: &'a [[u8; 8]],
    pages: usize,
}

/// What was decoded has a fixed length, so nothing can be missing.
fn whole<T>(read: Result<T, Stop>) -> Result<T, Error> {
    read.map_err(|stop| match stop {
        Stop::Failed(error) => error,
        Stop::More => Error::PacketEnd,
    })
}

fn head(reader: &mut Reader<'_>) -> Result<(), Error> {
    let magic = whole(reader.u32())?;
    if magic != MAGIC {
        return Err(Error::NotAChannel(magic));
    }
    let version = whole(reader.u32())?;
    if version != VERSION {
        return Err(Error::ChannelVersion(version));
    }
    Ok(())
}

impl Greeting {
    /// Decodes it.
    ///
    /// # Errors
    /// [`Error::NotAChannel`], [`Error::ChannelVersion`].
    pub fn decode(bytes: &[u8; GREETING_LEN]) -> Result<Self, Error> {
        let mut reader = Reader::new(bytes);
        head(&mut reader)?;
        let uuid = *whole(reader.array())?;
        let channel = whole(reader.u8())?;
        Ok(Self { uuid, channel })
    }

    /// Its bytes.
    pub fn encode(&self) -> [u8; GREETING_LEN] {
        let mut out = [0; GREETING_LEN];
        out[..4].copy_from_slice(&MAGIC.to_be_bytes());
        out[4..8].copy_from_slice(&VERSION.to_be_bytes());
        out[8..24].copy_from_slice(&self.uuid);
        out[24] = self.channel;
        out
    }
}

impl<'a> Packet<'a> {
    /// Decodes it. `blocks`: the table of RAM blocks of the stream beside which the channel is. All pages were
    /// checked against it then; that none comes twice is left to the caller.
    ///
    /// # Errors
    /// What is no such packet; see [`Error`].
    pub fn decode(bytes: &'a [u8; PACKET_LEN], blocks: &[Block]) -> Result<Self, Error> {
        let mut reader = Reader::new(bytes);
        head(&mut reader)?;
        let flags = whole(reader.u32())?;
        if flags & DEVICE_STATE != 0 {
            return Err(Error::DeviceInChannel);
        }
        if flags & COMPRESSION != 0 {
            return Err(Error::CompressedChannel);
        }
        if flags & !SYNC != 0 {
            return Err(Error::PacketFlags(flags));
        }
        let room = whole(reader.u32())?;
        let pages = whole(reader.u32())?;
        let length = whole(reader.u32())?;
        let number = whole(reader.u64())?;
        let mut reader = Reader::new(&bytes[ZERO_PAGES_AT..]);
        let zero = whole(reader.u32())?;
        let (tables, _) = bytes[OFFSETS_AT..].as_chunks();
        // Packets of QEMU 9.0 and later that only say SYNC have no room either.
        let sum = u64::from(pages) + u64::from(zero);
        let offsets = usize::try_from(sum)
            .ok()
            .filter(|_| sum <= u64::from(room))
            .and_then(|sum| tables.get(..sum))
            .ok_or(Error::PacketPages { pages, zero, room })?;
        let mut packet = Self {
            sync: flags & SYNC != 0,
            number,
            block: 0,
            offsets,
            pages: 0,
        };
        if offsets.is_empty() {
            // QEMU 7.2 leaves name and length of an earlier packet in one without pages.
            return Ok(packet);
        }
        // It is one of the numbers that fitted above.
        packet.pages = usize::try_from(pages).unwrap_or(0);
        let expected = packet.pages * PAGE_SIZE;
        if expected > 0 && usize::try_from(length) != Ok(expected) {
            return Err(Error::PacketLength { pages, length });
        }
        packet.block = find(&bytes[NAME_AT..OFFSETS_AT], blocks)?;
        for page in packet.all() {
            check(blocks, page)?;
        }
        Ok(packet)
    }

    fn all(&self) -> impl ExactSizeIterator<Item = Page> + use<'a> {
        let block = self.block;
        self.offsets.iter().map(move |&offset| Page {
            block,
            offset: u64::from_be_bytes(offset),
        })
    }

    /// Bytes of pages that follow in the channel, [`PAGE_SIZE`] each.
    pub fn data_len(&self) -> usize {
        self.pages * PAGE_SIZE
    }

    /// Whether it is about no page at all.
    pub fn is_empty(&self) -> bool {
        self.offsets.is_empty()
    }

    /// The pages that follow, in order.
    pub fn pages(&self) -> impl Iterator<Item = Page> + use<'a> {
        self.all().take(self.pages)
    }

    /// The pages that hold zeros only.
    pub fn zero_pages(&self) -> impl Iterator<Item = Page> + use<'a> {
        self.all().skip(self.pages)
    }
}

/// The block of that name, which ends at its NUL.
fn find(name: &[u8], blocks: &[Block]) -> Result<u16, Error> {
    let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
    let name = std::str::from_utf8(name)
        .ok()
        .filter(|name| (1..=MAX_NAME_LEN).contains(&name.len()))
        .ok_or(Error::Name("RAM block"))?;
    (0..)
        .zip(blocks)
        .find_map(|(index, block)| (block.name == name).then_some(index))
        .ok_or_else(|| Error::NoSuchBlock(name.to_owned()))
}

/// A packet's bytes without its pages, as QEMU would write them: for tests and benches. Of `pages` and `zero`,
/// offsets in bytes, the first [`MAX_PACKET_PAGES`] go in; a name is cut at 255 bytes.
pub fn encode_packet(
    sync: bool,
    number: u64,
    block: &str,
    pages: &[u64],
    zero: &[u64],
) -> [u8; PACKET_LEN] {
    let mut out = [0; PACKET_LEN];
    let most = MAX_PACKET_PAGES;
    let pages = &pages[..pages.len().min(most)];
    let zero = &zero[..zero.len().min(most - pages.len())];
    let count = |pages: &[u64]| u32::try_from(pages.len()).unwrap_or(0);
    let fields = [
        MAGIC,
        VERSION,
        u32::from(sync) * SYNC,
        u32::try_from(most).unwrap_or(0),
        count(pages),
        count(pages) * u32::try_from(FLAGS + 1).unwrap_or(0),
    ];
    for (place, field) in out.as_chunks_mut::<4>().0.iter_mut().zip(fields) {
        *place = field.to_be_bytes();
    }
    out[24..32].copy_from_slice(&number.to_be_bytes());
    out[ZERO_PAGES_AT..ZERO_PAGES_AT + 4].copy_from_slice(&count(zero).to_be_bytes());
    let name = &block.as_bytes()[..block.len().min(MAX_NAME_LEN)];
    out[NAME_AT..NAME_AT + name.len()].copy_from_slice(name);
    let places = out[OFFSETS_AT..].as_chunks_mut::<8>().0.iter_mut();
    for (place, offset) in places.zip(pages.iter().chain(zero)) {
        *place = offset.to_be_bytes();
    }
    out
}
