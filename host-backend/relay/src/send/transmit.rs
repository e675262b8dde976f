//! Sends what the queue holds over the link.

use std::sync::Arc;

use transhume_protocol::link::{BatchBuilder, BatchEncoding, BatchHeader, FrameKind};

use super::buffers::{BUFFER_LEN, Buffer};
use super::packer::{Packer, Raw};
use super::queue::{Content, Next, Outgoing};
use super::shared::Shared;
use crate::error::RelayError;
use transhume_link::ALIVE_INTERVAL;
use transhume_link::session::Session;

/// Pages of a fill that go into one frame.
const FILL_PAGES: usize = 128;

/// The thread that takes from the flow.
pub(crate) struct Transmitter {
    session: Session<Packer>,
    shared: Arc<Shared>,
}

impl Transmitter {
    pub(crate) fn new(session: Session<Packer>, shared: Arc<Shared>) -> Self {
        Self { session, shared }
    }

    /// Sends until the flow is stopped.
    pub(crate) fn run(self) -> Result<(), RelayError> {
        loop {
            match self.shared.flow.next(ALIVE_INTERVAL)? {
                Next::Control(payload) => self.small(FrameKind::Control, payload)?,
                Next::Hints(payload) => self.small(FrameKind::Hints, payload)?,
                // The session does that.
                Next::Alive => {}
                Next::Batch(outgoing) => {
                    let Outgoing {
                        header,
                        records,
                        buffer,
                        data,
                    } = outgoing;
                    self.pages(FrameKind::Batch, header, records, buffer, data)?;
                }
                Next::Fill {
                    batch,
                    buffer,
                    pages,
                } => self.fill(batch, &buffer, &pages)?,
            }
            self.shared.count_wire_bytes();
        }
    }

    fn small(&self, kind: FrameKind, payload: Vec<u8>) -> Result<(), RelayError> {
        let length = payload.len();
        Ok(self
            .session
            .send(Raw::Small(kind, payload), length, length)?)
    }

    fn pages(
        &self,
        kind: FrameKind,
        header: BatchHeader,
        records: Vec<u8>,
        buffer: Option<Arc<Buffer>>,
        data: Vec<u32>,
    ) -> Result<(), RelayError> {
        let fixed = header.encode().len() + records.len();
        // Few pages are copied out of the buffer at last, and until then keep all of it.
        let held = fixed + if data.is_empty() { 0 } else { BUFFER_LEN };
        let length = fixed + header.data_len;
        let raw = Raw::Pages {
            kind,
            header,
            records,
            buffer,
            data,
        };
        Ok(self.session.send(raw, length, held)?)
    }

    fn fill(&self, batch: u64, buffer: &Arc<Buffer>, pages: &[Content]) -> Result<(), RelayError> {
        for pages in pages.chunks(FILL_PAGES) {
            let mut builder = BatchBuilder::new();
            for page in pages {
                builder.data(page.key.block, page.key.page);
            }
            let (header, records) = builder.finish(batch, BatchEncoding::Plain)?;
            let data = pages.iter().map(|page| page.offset).collect();
            let buffer = Some(Arc::clone(buffer));
            self.pages(FrameKind::Fill, header, records, buffer, data)?;
        }
        Ok(())
    }
}
