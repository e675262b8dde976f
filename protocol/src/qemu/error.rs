//! What can be wrong with a stream.

use std::borrow::Cow;
use thiserror::Error;

/// Why bytes are not a stream that can be relayed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Error {
    /// The magic number is missing.
    #[error("the stream begins with {0:#010x}: it is not QEMU's migration stream")]
    NotAStream(u32),
    /// The stream's version is not 3.
    #[error("the stream has version {0}, but only version 3 is known")]
    Version(u32),
    /// There is no configuration section.
    #[error(
        "the stream has no configuration section: its machine type is older than 2.4; give the VM a newer one"
    )]
    NoConfiguration,
    /// A section ends without a footer.
    #[error(
        "{found:#04x} stands where section {section}'s footer should: the stream is damaged, or its machine type \
         is older than 2.4"
    )]
    NoFooter {
        /// The section.
        section: u32,
        /// The byte found.
        found: u8,
    },
    /// A footer names another section.
    #[error("section {section} ends with the footer of section {found}: the stream is damaged")]
    WrongFooter {
        /// The section.
        section: u32,
        /// The one that the footer names.
        found: u32,
    },
    /// A name is empty, too long or not UTF-8.
    #[error("the name of a {0} is empty, too long or not UTF-8: the stream is damaged")]
    Name(&'static str),
    /// The configuration has a part that is not known, so its length is not either.
    #[error("the configuration has the unknown part `{0}`: this version of QEMU is not supported")]
    Subsection(String),
    /// The guest's page size is not 4 KiB.
    #[error("the guest's pages have 2^{0} bytes; only 4 KiB pages are supported")]
    PageBits(u32),
    /// A capability changes the stream.
    #[error(
        "the source has `{0}` on, which changes the stream: turn this migration capability off"
    )]
    Capability(Cow<'static, str>),
    /// The migration goes over RDMA.
    #[error("the stream has a record for RDMA: migrate to a socket instead")]
    Rdma,
    /// Post-copy with huge pages changes the block table.
    #[error(
        "the source has `postcopy-ram` on and memory in pages other than 4 KiB (page sizes {0:#x}): \
         turn the capability off, or the huge pages"
    )]
    HugePages(u64),
    /// Flags that no RAM record has.
    #[error(
        "a RAM record has the flags {0:#x}, a combination that is not known: the stream is damaged"
    )]
    Flags(u64),
    /// A section other than ram that is sent in parts.
    #[error("section `{name}` is sent in parts without a length and cannot be relayed: {cure}")]
    Iterative {
        /// The section.
        name: String,
        /// What to do.
        cure: &'static str,
    },
    /// A byte that announces nothing known.
    #[error("{0:#04x} announces no section: the stream is damaged")]
    UnknownSection(u8),
    /// A section where it cannot be.
    #[error("section {section} has a {part} where none can be: the stream is damaged")]
    Order {
        /// The section.
        section: u32,
        /// START, PART, END.
        part: &'static str,
    },
    /// The stream ends before the memory does.
    #[error("the stream ends before the memory does")]
    EarlyEnd,
    /// The ram section has an unknown version.
    #[error("the ram section has version {0}, but only version 4 is known")]
    RamVersion(u32),
    /// A device's state comes before the memory.
    #[error(
        "the state of device `{0}` comes before the memory is whole (virtio-mem does that) and has no length: \
         remove the device"
    )]
    EarlyDevice(String),
    /// The ram section's first part ends without a block table.
    #[error("the stream has no table of RAM blocks: it is damaged")]
    NoTable,
    /// A second block table.
    #[error("the stream has a second table of RAM blocks: it is damaged")]
    SecondTable,
    /// More than [`super::MAX_BLOCKS`] blocks.
    #[error("the guest has more than {max} RAM blocks", max = super::MAX_BLOCKS)]
    TooManyBlocks,
    /// A block's length is not whole pages, or more than is left of the total.
    #[error(
        "RAM block `{name}` has a length of {length:#x} bytes, which is not in whole pages or exceeds the total: \
         the stream is damaged, or the source has `x-ignore-shared` on"
    )]
    BlockLength {
        /// The block.
        name: String,
        /// Its length.
        length: u64,
    },
    /// Two blocks of one name.
    #[error("two RAM blocks have the name `{0}`")]
    DuplicateBlock(String),
    /// A record names a block that the table has not.
    #[error("a record is for RAM block `{0}`, which the table does not have")]
    NoSuchBlock(String),
    /// A record refers to the block before it, and there is none.
    #[error("a record continues a RAM block, but none was named before it")]
    NothingToContinue,
    /// A page lies outside its block.
    #[error("a record is for offset {offset:#x} in RAM block `{block}`, which is not a page of it")]
    OutsideBlock {
        /// The block.
        block: String,
        /// The offset.
        offset: u64,
    },
    /// A command that is not known.
    #[error("command {0:#06x} is not known: this version of QEMU is not supported")]
    UnknownCommand(u16),
    /// A command of the wrong length.
    #[error("command {command:?} has a payload of {length} bytes: the stream is damaged")]
    CommandLength {
        /// The command.
        command: super::CommandKind,
        /// Length of its payload.
        length: usize,
    },
    /// A message on the return path that is not known.
    #[error(
        "message {0:#06x} on the return path is not known: this version of QEMU is not supported"
    )]
    UnknownMessage(u16),
    /// A message on the return path of the wrong length.
    #[error("message {kind:#06x} on the return path has {length} bytes: it is damaged")]
    MessageLength {
        /// Its type.
        kind: u16,
        /// Length of its payload.
        length: u16,
    },
    /// A channel's magic number is missing.
    #[error(
        "a channel has {0:#010x} where a packet should begin: it is not one of QEMU's, or damaged"
    )]
    NotAChannel(u32),
    /// A channel's version is not 1.
    #[error("a channel has version {0}, but only version 1 is known")]
    ChannelVersion(u32),
    /// Pages are compressed.
    #[error(
        "the source compresses the pages of its channels: set the migration parameter `multifd-compression` to `none`"
    )]
    CompressedChannel,
    /// A device's state in a channel.
    #[error(
        "a device sends its state through a channel (VFIO devices can): turn the device's property \
         `x-migration-multifd-transfer` off"
    )]
    DeviceInChannel,
    /// Flags that no packet has.
    #[error("a packet has the flags {0:#x}, which are not known: the channel is damaged")]
    PacketFlags(u32),
    /// More pages than a packet has room for.
    #[error(
        "a packet has {pages} pages and {zero} zero pages in room for {room}: the channel is damaged, or the \
         guest's pages are not of 4 KiB"
    )]
    PacketPages {
        /// Pages that follow it.
        pages: u32,
        /// Zero pages.
        zero: u32,
        /// What it has room for.
        room: u32,
    },
    /// The length of the pages is not theirs.
    #[error("a packet has {pages} pages in {length} bytes: the channel is damaged")]
    PacketLength {
        /// Pages that follow it.
        pages: u32,
        /// Their bytes.
        length: u32,
    },
    /// A field lies beyond the end.
    #[error("a packet ends before its fields do")]
    PacketEnd,
    /// A bitmap of received pages that did not have to come, is too long or is cut off.
    #[error(
        "the destination sends a bitmap of received pages of {0} bytes that does not belong here"
    )]
    ReceivedBitmap(u64),
}
