//! Takes the source's frames apart.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use transhume_protocol::link::{
    Ack, BATCH_HEADER_LEN, BatchEncoding, BatchReader, Control, FrameKind, GuestClock, LinkError,
    Record, decode_hints,
};
use zstd::bulk::Decompressor;

use super::output::Contents;
use super::placement::{Placement, ZERO_PAGES};
use super::replies::{Replies, Reply};
use crate::SWITCHOVER_LINK_TIMEOUT;
use crate::error::RelayError;
use crate::ram_blocks;
use crate::storage::shown::Questions;
use transhume_guest::{Known, Lead, monotonic_ns};
use transhume_link::session::{Ready, Session};
use transhume_link::{Payload, Pool, bounded_words};
use transhume_pages::hint_table::Place;
use transhume_pages::{PAGE_SIZE, PageKey};

/// The receiving thread.
pub(crate) struct Intake {
    session: Session<Ready>,
    placement: Arc<Placement>,
    replies: Arc<Replies>,
    decompressor: Decompressor<'static>,
    pool: Arc<Pool>,
    done: u64,
    /// Counted by the disk readers.
    disk_bytes: Arc<AtomicU64>,
    /// The guest's memory by its definition.
    memory_bytes: u64,
    /// Of the source that compares the disks.
    questions: Questions,
    guest_clock: Option<Known>,
}

impl Intake {
    pub(crate) fn new(
        session: Session<Ready>,
        placement: Arc<Placement>,
        replies: Arc<Replies>,
        disk_bytes: Arc<AtomicU64>,
        memory_bytes: u64,
        questions: Questions,
    ) -> Result<Self, RelayError> {
        let decompressor = Decompressor::new().map_err(RelayError::Decompress)?;
        Ok(Self {
            session,
            placement,
            replies,
            decompressor,
            pool: Arc::default(),
            done: 0,
            disk_bytes,
            memory_bytes,
            questions,
            guest_clock: None,
        })
    }

    /// How far the guest's clock would be ahead of this host's, had it not moved, if the source said so.
    pub(crate) fn guest_clock(&self) -> Option<Known> {
        self.guest_clock
    }

    /// Receives until the source commits. In post-copy more comes after that.
    pub(crate) fn run(&mut self) -> Result<(), RelayError> {
        loop {
            // Each frame may be answered, and a source that hears nothing gets no answers.
            self.replies.wait_for_room()?;
            let frame = self.session.receive()?;
            match frame.kind {
                FrameKind::Alive | FrameKind::Bye => {}
                FrameKind::Batch => {
                    self.done += self.batch(frame.payload)?;
                    let ack = Ack {
                        batch_bytes: self.done,
                        disk_bytes: self.disk_bytes.load(Ordering::Relaxed),
                    };
                    let _ = self.replies.send(Reply::Ack(ack));
                }
                FrameKind::Fill => self.fill(frame.payload)?,
                FrameKind::Hints => {
                    let runs = decode_hints(&frame.payload).collect::<Result<Vec<_>, _>>()?;
                    self.placement.hint(&runs);
                }
                FrameKind::Control => match bounded_words::decode(&frame.payload)? {
                    Control::Commit => return Ok(()),
                    Control::Abort { reason } => return Err(RelayError::Aborted(reason)),
                    Control::GuestClock(GuestClock {
                        ahead_ns,
                        within_ns,
                    }) => {
                        let lead = Lead {
                            ahead_ns,
                            within_ns,
                        };
                        self.guest_clock = Some(Known::new(lead, monotonic_ns()));
                    }
                    Control::ClockWanted => {
                        let monotonic_ns = monotonic_ns();
                        let answer = Control::Clock { monotonic_ns };
                        let _ = self.replies.send(Reply::Control(answer));
                    }
                    Control::Compare(comparison) => self.questions.ask(comparison)?,
                    Control::KeepWaiting => {
                        self.session.set_patience(SWITCHOVER_LINK_TIMEOUT);
                        let _ = self.replies.send(Reply::Control(Control::KeepWaiting));
                    }
                    _ => return Err(RelayError::Misplaced("control message")),
                },
                FrameKind::Verdict | FrameKind::ReturnPath | FrameKind::Ack => {
                    return Err(RelayError::Misplaced("frame of a destination"));
                }
            }
        }
    }

    /// The decoded data of a batch, and where in the memory they begin.
    fn contents(
        &mut self,
        payload: &Arc<Payload>,
        reader: &BatchReader<'_>,
    ) -> Result<(Contents, usize), RelayError> {
        let output = &self.placement.output;
        match reader.header.encoding {
            BatchEncoding::Plain => {
                let begin = payload.len() - reader.data.len();
                let length = payload.len();
                let payload = Shared(Arc::clone(payload));
                Ok((output.keep(payload, length), begin))
            }
            BatchEncoding::Zstd => {
                // The header's length was bounded by `parse`.
                let mut data = self.pool.take(reader.header.data_len);
                let length = self
                    .decompressor
                    .decompress_to_buffer(reader.data, &mut *data)
                    .map_err(RelayError::Decompress)?;
                if length != reader.header.data_len {
                    return Err(LinkError::OutOfBounds("data of a batch").into());
                }
                Ok((output.keep(data, length), 0))
            }
        }
    }

    /// Works a batch off and returns how many bytes it counts for in acknowledgements.
    fn batch(&mut self, payload: Payload) -> Result<u64, RelayError> {
        let payload = Arc::new(payload);
        let reader = BatchReader::parse(&payload)?;
        let header = reader.header;
        self.placement.output.wait_for_room()?;
        let (contents, mut offset) = self.contents(&payload, &reader)?;
        let mut index = 0;
        let mut needed = Vec::new();
        for record in reader.records() {
            // A few bytes of a record can be many of QEMU's.
            self.placement.output.wait_for_room()?;
            match record? {
                Record::Raw(bytes) => self.placement.raw(bytes.to_vec())?,
                Record::Blocks { section, blocks } => {
                    self.placement.set_blocks(
                        section,
                        ram_blocks::check(blocks.into_iter(), self.memory_bytes)?,
                    )?;
                }
                Record::Discard { block, page, count } => {
                    self.placement.discard(block, page, count)?;
                }
                Record::Package => self.placement.package()?,
                Record::SectionOpen(kind) => self.placement.open(kind)?,
                Record::SectionClose => self.placement.close()?,
                Record::Zero {
                    block,
                    page,
                    count,
                    fill,
                } => self.zero(block, page, count, fill)?,
                Record::Data { block, page, count } => {
                    let pages = run(block, page, count, &mut offset);
                    self.placement.data(Arc::clone(&contents), pages)?;
                }
                Record::References {
                    block,
                    page,
                    disk,
                    sector,
                    digests,
                } => {
                    let first = PageKey { block, page };
                    self.placement.references(
                        header.number,
                        &mut index,
                        first,
                        Place { disk, sector },
                        digests,
                        &mut needed,
                    )?;
                }
            }
        }
        self.placement.demand(&mut needed);
        Ok((BATCH_HEADER_LEN + header.records_len + header.data_len) as u64)
    }

    /// A record of pages of one byte may name all memory.
    fn zero(&self, block: u16, page: u64, count: u32, fill: u8) -> Result<(), RelayError> {
        let mut done = 0;
        while done < count {
            let some = (count - done).min(ZERO_PAGES);
            self.placement
                .zero(block, page + u64::from(done), some, fill)?;
            done += some;
            self.placement.output.wait_for_room()?;
        }
        Ok(())
    }

    fn fill(&mut self, payload: Payload) -> Result<(), RelayError> {
        let payload = Arc::new(payload);
        let reader = BatchReader::parse(&payload)?;
        self.placement.output.wait_for_room()?;
        let (contents, mut offset) = self.contents(&payload, &reader)?;
        for record in reader.records() {
            self.placement.output.wait_for_room()?;
            let Record::Data { block, page, count } = record? else {
                return Err(RelayError::Misplaced("record in a fill"));
            };
            let pages = run(block, page, count, &mut offset);
            self.placement
                .fill(reader.header.number, &contents, pages)?;
        }
        Ok(())
    }
}

/// A payload that a batch's records are read from, and its pages.
struct Shared(Arc<Payload>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

fn run(block: u16, page: u64, count: u32, offset: &mut usize) -> Vec<(PageKey, u32)> {
    (0..u64::from(count))
        .map(|n| {
            // Data are at most MAX_BATCH_DATA long.
            let at = u32::try_from(*offset).unwrap_or(u32::MAX);
            *offset += PAGE_SIZE;
            (
                PageKey {
                    block,
                    page: page + n,
                },
                at,
            )
        })
        .collect()
}
