//! Takes the stream apart.

use super::command::Command;
use super::configuration::Configuration;
use super::reader::{Reader, Stop};
use super::{
    Error, FLAGS, MAGIC, MAX_BLOCKS, PAGE, PAGE_SIZE, Page, RAM_NAME, RAM_VERSION, VERSION, flag,
    section,
};
use crate::memory::Block;
use std::borrow::Cow;

/// One item of the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item<'a> {
    /// Bytes of the input that it used; always at least 1.
    pub length: usize,
    /// What it is.
    pub kind: Kind<'a>,
}

/// What an item is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind<'a> {
    /// Magic number and version, which is 3.
    Header,
    /// The configuration section, whole.
    Configuration(Configuration<'a>),
    /// The ram section's START.
    SectionStart {
        /// The number that its other parts use.
        id: u32,
    },
    /// The head of a PART of the ram section.
    SectionPart {
        /// The section.
        id: u32,
    },
    /// The head of the END of the ram section.
    SectionEnd {
        /// The section.
        id: u32,
    },
    /// The table of blocks, which is in [`Decoder::blocks`] now.
    RamBlocks,
    /// A page that holds one repeated byte.
    Zero {
        /// The page; checked against the table.
        page: Page,
        /// The byte. QEMU 10.0 refuses any but 0.
        fill: u8,
    },
    /// A page.
    Page {
        /// The page; checked against the table.
        page: Page,
        /// Its content.
        data: &'a [u8; PAGE_SIZE],
    },
    /// The end mark of the records of a START, PART or END.
    EndOfSection,
    /// What the channels of [`super::multifd`] hold before their next SYNC belongs before this, and what they
    /// hold after it behind.
    Flush,
    /// A section's footer.
    Footer {
        /// The section.
        id: u32,
    },
    /// A command, whole.
    Command(Command<'a>),
    /// Part of what follows the command PACKAGED: the devices of a VM in post-copy.
    Package,
    /// Device state and all that follows it: all of the input.
    Opaque,
    /// The end mark of a stream whose devices came in a package. What follows is [`Self::Opaque`].
    EndOfStream,
}

/// What the next item has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expected {
    Header,
    Configuration,
    /// A section, a command or the end.
    Section,
    /// Records of the ram section.
    Record,
    Footer,
    /// So many bytes of a package, at least 1.
    Package(u32),
    Opaque,
}

/// How far the ram section is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ram {
    Before,
    Started(u32),
    Ending(u32),
    Ended(u32),
}

/// Takes the stream apart, item by item. Holds the block table and no bytes of the stream.
#[derive(Debug, Clone)]
pub struct Decoder {
    expected: Expected,
    ram: Ram,
    blocks: Vec<Block>,
    /// The block that CONTINUE means.
    last: Option<u16>,
    /// Its length in bytes.
    last_length: u64,
    /// Whether pages may come in channels beside the stream.
    channels: bool,
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new()
    }
}

impl Decoder {
    /// A decoder at the stream's first byte.
    pub const fn new() -> Self {
        Self {
            expected: Expected::Header,
            ram: Ram::Before,
            blocks: Vec::new(),
            last: None,
            last_length: 0,
            channels: false,
        }
    }

    /// The same for a stream with channels beside it (see [`super::multifd`]), else refused where they show.
    pub const fn with_channels() -> Self {
        let mut decoder = Self::new();
        decoder.channels = true;
        decoder
    }

    /// A decoder at the first byte of the stream of a post-copy that is resumed: it has neither header nor
    /// table of blocks, which are those of the stream before. Its first section or command comes next.
    pub fn resumed(section: u32, blocks: Vec<Block>) -> Self {
        let mut decoder = Self::new();
        decoder.expected = Expected::Section;
        decoder.ram = Ram::Started(section);
        decoder.blocks = blocks;
        decoder
    }

    /// The guest's RAM blocks; empty before [`Kind::RamBlocks`].
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// Number of the ram section, once it has begun.
    pub fn ram_section(&self) -> Option<u32> {
        match self.ram {
            Ram::Before => None,
            Ram::Started(id) | Ram::Ending(id) | Ram::Ended(id) => Some(id),
        }
    }

    /// Whether the ram section's END has passed, footer included: the stream has no more memory.
    pub fn memory_is_whole(&self) -> bool {
        matches!(self.ram, Ram::Ended(_))
    }

    /// The item at the start of `input`, which begins where the last item ended.
    ///
    /// `None` when more bytes are needed, which is never so with [`super::MAX_ITEM_LEN`] of them. After
    /// `None` and after an error the decoder is as before the call.
    #[inline]
    pub fn next<'a>(&mut self, input: &'a [u8]) -> Result<Option<Item<'a>>, Error> {
        // Nearly all of a stream is pages of the block before.
        if self.expected == Expected::Record
            && let Some(item) = self.next_page(input)
        {
            return Ok(Some(item));
        }
        let mut reader = Reader::new(input);
        match self.read(&mut reader) {
            Ok(kind) => Ok(Some(Item {
                length: reader.used(),
                kind,
            })),
            Err(Stop::More) => Ok(None),
            Err(Stop::Failed(error)) => Err(error),
        }
    }

    /// The item if it is a page of the block before, is whole and lies in the block.
    #[inline]
    fn next_page<'a>(&self, input: &'a [u8]) -> Option<Item<'a>> {
        const PAGE: u64 = flag::PAGE | flag::CONTINUE;
        const ZERO: u64 = flag::ZERO | flag::CONTINUE;
        let (word, rest) = input.split_first_chunk()?;
        let word = u64::from_be_bytes(*word);
        let offset = word & !FLAGS;
        let block = self.last.filter(|_| offset < self.last_length)?;
        let page = Page { block, offset };
        let (content, kind) = match word & FLAGS {
            PAGE => {
                let data = rest.first_chunk()?;
                (PAGE_SIZE, Kind::Page { page, data })
            }
            ZERO => {
                let &fill = rest.first()?;
                (1, Kind::Zero { page, fill })
            }
            _ => return None,
        };
        Some(Item {
            length: 8 + content,
            kind,
        })
    }

    /// Reads an item; changes `self` only if it was whole.
    fn read<'a>(&mut self, reader: &mut Reader<'a>) -> Result<Kind<'a>, Stop> {
        match self.expected {
            Expected::Header => {
                let magic = reader.u32()?;
                if magic != MAGIC {
                    return Err(Error::NotAStream(magic).into());
                }
                let version = reader.u32()?;
                if version != VERSION {
                    return Err(Error::Version(version).into());
                }
                self.expected = Expected::Configuration;
                Ok(Kind::Header)
            }
            Expected::Configuration => {
                if reader.u8()? != section::CONFIGURATION {
                    return Err(Error::NoConfiguration.into());
                }
                let configuration = Configuration::read(reader)?;
                self.expected = Expected::Section;
                Ok(Kind::Configuration(configuration))
            }
            Expected::Section => self.read_section(reader),
            Expected::Record => self.read_record(reader),
            Expected::Footer => self.read_footer(reader),
            Expected::Package(left) => {
                let taken = reader.available(left)?;
                self.expected = match left - taken {
                    0 => Expected::Section,
                    left => Expected::Package(left),
                };
                Ok(Kind::Package)
            }
            Expected::Opaque => {
                reader.available(u32::MAX)?;
                Ok(Kind::Opaque)
            }
        }
    }

    fn read_section<'a>(&mut self, reader: &mut Reader<'a>) -> Result<Kind<'a>, Stop> {
        match reader.u8()? {
            section::START => self.read_start(reader),
            section::PART => {
                let id = reader.u32()?;
                if self.ram != Ram::Started(id) {
                    return Err(misplaced(id, "PART"));
                }
                self.expected = Expected::Record;
                Ok(Kind::SectionPart { id })
            }
            section::END => {
                let id = reader.u32()?;
                if self.ram != Ram::Started(id) {
                    return Err(misplaced(id, "END"));
                }
                self.ram = Ram::Ending(id);
                self.expected = Expected::Record;
                Ok(Kind::SectionEnd { id })
            }
            section::COMMAND => {
                let command = Command::read(reader)?;
                if let Some(length @ 1..) = command.package_len() {
                    self.expected = Expected::Package(length);
                }
                Ok(Kind::Command(command))
            }
            section::FULL => {
                if !self.memory_is_whole() {
                    reader.u32()?;
                    return Err(Error::EarlyDevice(reader.name("section")?.to_owned()).into());
                }
                reader.available(u32::MAX)?;
                self.expected = Expected::Opaque;
                Ok(Kind::Opaque)
            }
            section::END_OF_STREAM => {
                if !self.memory_is_whole() {
                    return Err(Error::EarlyEnd.into());
                }
                self.expected = Expected::Opaque;
                Ok(Kind::EndOfStream)
            }
            other => Err(Error::UnknownSection(other).into()),
        }
    }

    fn read_start<'a>(&mut self, reader: &mut Reader<'a>) -> Result<Kind<'a>, Stop> {
        let id = reader.u32()?;
        let name = reader.name("section")?;
        if name != RAM_NAME {
            return Err(iterative(name).into());
        }
        let _instance = reader.u32()?;
        let version = reader.u32()?;
        if version != RAM_VERSION {
            return Err(Error::RamVersion(version).into());
        }
        if self.ram != Ram::Before {
            return Err(misplaced(id, "START"));
        }
        self.ram = Ram::Started(id);
        self.expected = Expected::Record;
        Ok(Kind::SectionStart { id })
    }

    fn read_footer<'a>(&mut self, reader: &mut Reader<'a>) -> Result<Kind<'a>, Stop> {
        let (Ram::Started(section) | Ram::Ending(section) | Ram::Ended(section)) = self.ram else {
            return Err(misplaced(0, "footer"));
        };
        let found = reader.u8()?;
        if found != section::FOOTER {
            return Err(Error::NoFooter { section, found }.into());
        }
        let found = reader.u32()?;
        if found != section {
            return Err(Error::WrongFooter { section, found }.into());
        }
        if let Ram::Ending(id) = self.ram {
            self.ram = Ram::Ended(id);
        }
        self.expected = Expected::Section;
        Ok(Kind::Footer { id: section })
    }

    fn read_record<'a>(&mut self, reader: &mut Reader<'a>) -> Result<Kind<'a>, Stop> {
        let word = reader.u64()?;
        let offset = word & !FLAGS;
        let flags = word & FLAGS;
        match flags & !flag::CONTINUE {
            flag::PAGE => {
                let block = self.read_block(reader, flags)?;
                let page = self.page(block, offset)?;
                let data = reader.array()?;
                self.remember(block);
                Ok(Kind::Page { page, data })
            }
            flag::ZERO => {
                let block = self.read_block(reader, flags)?;
                let page = self.page(block, offset)?;
                let fill = reader.u8()?;
                self.remember(block);
                Ok(Kind::Zero { page, fill })
            }
            flag::END_OF_SECTION if word == flag::END_OF_SECTION => {
                // Its first part is the table; a guest without memory is none.
                if self.blocks.is_empty() {
                    return Err(Error::NoTable.into());
                }
                self.expected = Expected::Footer;
                Ok(Kind::EndOfSection)
            }
            flag::MULTIFD_FLUSH if word == flag::MULTIFD_FLUSH && self.channels => Ok(Kind::Flush),
            flag::MEM_SIZE if flags == flag::MEM_SIZE => {
                if !self.blocks.is_empty() {
                    return Err(Error::SecondTable.into());
                }
                self.blocks = read_table(reader, offset)?;
                Ok(Kind::RamBlocks)
            }
            _ => Err(refused(flags).into()),
        }
    }

    /// The block of a record: named in it, or the one before.
    fn read_block(&self, reader: &mut Reader<'_>, flags: u64) -> Result<u16, Stop> {
        if flags & flag::CONTINUE != 0 {
            return self.last.ok_or(Error::NothingToContinue.into());
        }
        let name = reader.name("RAM block")?;
        (0..)
            .zip(&self.blocks)
            .find_map(|(index, block)| (block.name == name).then_some(index))
            .ok_or_else(|| Error::NoSuchBlock(name.to_owned()).into())
    }

    fn page(&self, block: u16, offset: u64) -> Result<Page, Error> {
        let page = Page { block, offset };
        check(&self.blocks, page).map(|_| page)
    }

    fn remember(&mut self, block: u16) {
        self.last = Some(block);
        self.last_length = self
            .blocks
            .get(usize::from(block))
            .map_or(0, |block| block.length);
    }
}

/// The block of a page that lies in the guest's memory.
pub(super) fn check(blocks: &[Block], page: Page) -> Result<&Block, Error> {
    let Some(block) = blocks.get(usize::from(page.block)) else {
        return Err(Error::NoSuchBlock(format!("number {}", page.block)));
    };
    // A block is whole pages, so a page that begins in it ends in it.
    if page.offset >= block.length || page.offset & FLAGS != 0 {
        return Err(Error::OutsideBlock {
            block: block.name.clone(),
            offset: page.offset,
        });
    }
    Ok(block)
}

/// Reads blocks until their lengths make up the total.
fn read_table(reader: &mut Reader<'_>, total: u64) -> Result<Vec<Block>, Stop> {
    let mut blocks = Vec::<Block>::new();
    let mut left = total;
    while left > 0 {
        if blocks.len() == MAX_BLOCKS {
            return Err(Error::TooManyBlocks.into());
        }
        let name = reader.name("RAM block")?;
        let length = reader.u64()?;
        let name = name.to_owned();
        if blocks.iter().any(|block| block.name == name) {
            return Err(Error::DuplicateBlock(name).into());
        }
        if !length.is_multiple_of(PAGE) || length > left {
            return Err(Error::BlockLength { name, length }.into());
        }
        left -= length;
        blocks.push(Block { name, length });
    }
    Ok(blocks)
}

fn misplaced(section: u32, part: &'static str) -> Stop {
    Error::Order { section, part }.into()
}

fn iterative(name: &str) -> Error {
    let cure = match name {
        "dirty-bitmap" => "turn the migration capability `dirty-bitmaps` off",
        "block" => "turn the migration capability `block` off",
        _ => "remove the device (VFIO devices send one)",
    };
    Error::Iterative {
        name: name.to_owned(),
        cure,
    }
}

fn refused(flags: u64) -> Error {
    let capability = |name| Error::Capability(Cow::Borrowed(name));
    match flags & !flag::CONTINUE {
        flag::XBZRLE => capability("xbzrle"),
        flag::COMPRESS => capability("compress"),
        flag::MULTIFD_FLUSH => capability("multifd"),
        flag::HOOK => Error::Rdma,
        _ => Error::Flags(flags),
    }
}
