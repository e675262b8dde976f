//! Puts a stream together.

use super::configuration::Configuration;
use super::decoder::check;
use super::{Error, MAGIC, PAGE_SIZE, Page, RAM_NAME, RAM_VERSION, VERSION, flag, section};
use crate::memory::Block;

/// Appends sections and RAM records to a buffer.
///
/// It leaves a block's name out where the record before was for the same block. So whatever else goes
/// into the stream must have no RAM records, or [`Self::forget_block`] be called after it.
#[derive(Debug, Clone)]
pub struct Encoder {
    section: u32,
    blocks: Vec<Block>,
    last: Option<u16>,
}

/// Appends magic number, version and configuration.
pub fn start_stream(configuration: &Configuration<'_>, out: &mut Vec<u8>) {
    out.extend_from_slice(&MAGIC.to_be_bytes());
    out.extend_from_slice(&VERSION.to_be_bytes());
    configuration.encode(out);
}

/// Appends a name of at most 255 bytes.
pub(super) fn put_name(name: &str, out: &mut Vec<u8>) {
    let length = name.len().min(super::MAX_NAME_LEN);
    out.push(u8::try_from(length).unwrap_or(u8::MAX));
    out.extend_from_slice(&name.as_bytes()[..length]);
}

impl Encoder {
    /// An encoder for the ram section of this number and these blocks, as
    /// [`super::Decoder::ram_section`] and [`super::Decoder::blocks`] have them.
    pub fn new(section: u32, blocks: Vec<Block>) -> Self {
        Self {
            section,
            blocks,
            last: None,
        }
    }

    /// The blocks.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// Names the block in the next record whatever was before.
    pub fn forget_block(&mut self) {
        self.last = None;
    }

    /// Appends the section's START with the table of blocks, whole.
    pub fn start(&self, out: &mut Vec<u8>) {
        self.head(section::START, out);
        put_name(RAM_NAME, out);
        out.extend_from_slice(&0_u32.to_be_bytes());
        out.extend_from_slice(&RAM_VERSION.to_be_bytes());
        let total: u64 = self.blocks.iter().map(|block| block.length).sum();
        out.extend_from_slice(&(total | flag::MEM_SIZE).to_be_bytes());
        for block in &self.blocks {
            put_name(&block.name, out);
            out.extend_from_slice(&block.length.to_be_bytes());
        }
        self.end_of_section(out);
        self.footer(out);
    }

    /// Appends the head of a PART. Records, [`Self::end_of_section`] and [`Self::footer`] follow.
    pub fn part(&self, out: &mut Vec<u8>) {
        self.head(section::PART, out);
    }

    /// Appends the head of the END. Records, [`Self::end_of_section`] and [`Self::footer`] follow.
    pub fn end(&self, out: &mut Vec<u8>) {
        self.head(section::END, out);
    }

    /// Appends a page.
    pub fn page(
        &mut self,
        page: Page,
        data: &[u8; PAGE_SIZE],
        out: &mut Vec<u8>,
    ) -> Result<(), Error> {
        self.page_header(page, out)?;
        out.extend_from_slice(data);
        Ok(())
    }

    /// Appends what goes before a page's [`PAGE_SIZE`] bytes, which the caller writes.
    pub fn page_header(&mut self, page: Page, out: &mut Vec<u8>) -> Result<(), Error> {
        self.record(flag::PAGE, page, out)
    }

    /// Appends a page that holds one repeated byte. QEMU 10.0 takes 0 only.
    pub fn zero(&mut self, page: Page, fill: u8, out: &mut Vec<u8>) -> Result<(), Error> {
        self.record(flag::ZERO, page, out)?;
        out.push(fill);
        Ok(())
    }

    /// Appends the end mark of a section's records.
    pub fn end_of_section(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&flag::END_OF_SECTION.to_be_bytes());
    }

    /// Appends the section's footer.
    pub fn footer(&self, out: &mut Vec<u8>) {
        self.head(section::FOOTER, out);
    }

    fn head(&self, kind: u8, out: &mut Vec<u8>) {
        out.push(kind);
        out.extend_from_slice(&self.section.to_be_bytes());
    }

    fn record(&mut self, flags: u64, page: Page, out: &mut Vec<u8>) -> Result<(), Error> {
        let block = check(&self.blocks, page)?;
        if self.last == Some(page.block) {
            out.extend_from_slice(&(page.offset | flags | flag::CONTINUE).to_be_bytes());
        } else {
            out.extend_from_slice(&(page.offset | flags).to_be_bytes());
            put_name(&block.name, out);
            self.last = Some(page.block);
        }
        Ok(())
    }
}
