//! Writes the stream of the destination's QEMU.

use std::io::IoSlice;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use transhume_protocol::link::SectionKind;
use transhume_protocol::qemu::{Encoder, Page};

use crate::error::RelayError;
use crate::receive::output::{Arrived, Output, Piece};
use transhume_base::vectored::write_all_vectored;
use transhume_pages::{PAGE_SIZE, PageKey};

/// The writing thread.
pub(crate) struct Writer {
    qemu: UnixStream,
    output: Arc<Output>,
    encoder: Option<Encoder>,
    section: Option<SectionKind>,
}

impl Writer {
    pub(crate) fn new(qemu: UnixStream, output: Arc<Output>) -> Self {
        Self {
            qemu,
            output,
            encoder: None,
            section: None,
        }
    }

    /// Writes until the queue is stopped.
    pub(crate) fn run(mut self) -> Result<(), RelayError> {
        let mut heads = Vec::new();
        loop {
            let piece = self.output.take()?;
            heads.clear();
            let mut zeros = None;
            match piece {
                Piece::Raw(bytes) => heads = bytes,
                Piece::Blocks { section, blocks } => {
                    self.encoder = Some(Encoder::new(section, blocks));
                    continue;
                }
                Piece::Open(kind) => {
                    let encoder = self.encoder()?;
                    match kind {
                        SectionKind::Part => encoder.part(&mut heads),
                        SectionKind::End => encoder.end(&mut heads),
                    }
                    self.section = Some(kind);
                }
                Piece::Close => {
                    self.section = None;
                    close(self.encoder()?, &mut heads);
                }
                Piece::Zero {
                    block,
                    page,
                    count,
                    fill,
                } => {
                    zeros = Some(Arrived { block, page, count });
                    let own = self.open_own(&mut heads)?;
                    let encoder = self.encoder()?;
                    for page in page..page.saturating_add(u64::from(count)) {
                        let offset = page * PAGE_SIZE as u64;
                        let page = Page { block, offset };
                        if fill == 0 {
                            encoder.zero(page, 0, &mut heads)?;
                        } else {
                            // QEMU 10.0 takes no other byte in a record of this kind.
                            encoder.page_header(page, &mut heads)?;
                            heads.resize(heads.len() + PAGE_SIZE, fill);
                        }
                    }
                    if own {
                        close(encoder, &mut heads);
                    }
                }
                Piece::Pages { contents, pages } => {
                    self.pages((*contents).as_ref(), &pages, &mut heads)?;
                    let one = |&(PageKey { block, page }, _): &_| Arrived {
                        block,
                        page,
                        count: 1,
                    };
                    self.output.note(pages.iter().map(one));
                    continue;
                }
                Piece::Discard(discard) => {
                    discard.encode(self.encoder()?.blocks(), &mut heads)?;
                }
                Piece::Hold => continue,
            }
            let mut slices = [IoSlice::new(&heads)];
            write_all_vectored(&mut self.qemu, &mut slices).map_err(RelayError::Socket)?;
            self.output.note(zeros.into_iter());
        }
    }

    fn encoder(&mut self) -> Result<&mut Encoder, RelayError> {
        self.encoder
            .as_mut()
            .ok_or(RelayError::Misplaced("page before the table of RAM blocks"))
    }

    /// Begins a PART of our own where no section is open; says whether it did.
    fn open_own(&mut self, heads: &mut Vec<u8>) -> Result<bool, RelayError> {
        let own = self.section.is_none();
        let encoder = self.encoder()?;
        if own {
            encoder.part(heads);
        }
        Ok(own)
    }

    /// Writes pages without copying them: heads and contents in turn.
    fn pages(
        &mut self,
        contents: &[u8],
        pages: &[(PageKey, u32)],
        heads: &mut Vec<u8>,
    ) -> Result<(), RelayError> {
        let own = self.open_own(heads)?;
        let encoder = self.encoder()?;
        let mut ends = Vec::with_capacity(pages.len());
        for (key, _) in pages {
            let offset = key.page * PAGE_SIZE as u64;
            encoder.page_header(
                Page {
                    block: key.block,
                    offset,
                },
                heads,
            )?;
            ends.push(heads.len());
        }
        if own {
            close(encoder, heads);
        }
        let mut slices = Vec::with_capacity(2 * pages.len() + 1);
        let mut begin = 0;
        for (end, (_, offset)) in ends.into_iter().zip(pages) {
            let offset = *offset as usize;
            slices.push(IoSlice::new(&heads[begin..end]));
            slices.push(IoSlice::new(&contents[offset..offset + PAGE_SIZE]));
            begin = end;
        }
        if begin < heads.len() {
            slices.push(IoSlice::new(&heads[begin..]));
        }
        write_all_vectored(&mut self.qemu, &mut slices).map_err(RelayError::Socket)
    }
}

fn close(encoder: &Encoder, heads: &mut Vec<u8>) {
    encoder.end_of_section(heads);
    encoder.footer(heads);
}
