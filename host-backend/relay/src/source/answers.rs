//! What the destination says while memory moves.

use std::sync::Arc;

use transhume_protocol::link::{Ack, Control, FrameKind, Verdict};
use transhume_protocol::qemu::return_path::Message;

use super::shared::Shared;
use super::transmit::Packer;
use crate::error::RelayError;
use crate::progress::Counter;
use transhume_link::bounded_words;
use transhume_link::session::Session;
use transhume_pages::PAGE_SIZE;

/// Most bytes of an unfinished message of the return path.
const PARTIAL_MOST: usize = transhume_protocol::qemu::return_path::MAX_MESSAGE_LEN;

/// The receiving thread.
pub(super) struct Answers {
    session: Session<Packer>,
    shared: Arc<Shared>,
    partial: Vec<u8>,
    /// Length of the longest bitmap of received pages that may come, in bytes.
    longest_bitmap: usize,
}

impl Answers {
    pub(super) fn new(session: Session<Packer>, shared: Arc<Shared>) -> Self {
        Self {
            session,
            shared,
            partial: Vec::new(),
            longest_bitmap: 0,
        }
    }

    /// Of a post-copy that is resumed; the longest block has so many bytes.
    pub(super) fn resumed(session: Session<Packer>, shared: Arc<Shared>, longest: u64) -> Self {
        let words = longest.div_ceil(PAGE_SIZE as u64 * 64);
        Self {
            longest_bitmap: usize::try_from(words * 8).unwrap_or(usize::MAX),
            ..Self::new(session, shared)
        }
    }

    /// Receives until the link ends or a control message closes the matter.
    pub(super) fn run(mut self) -> Result<(), RelayError> {
        loop {
            let frame = self.session.receive()?;
            self.shared.count_wire_bytes();
            match frame.kind {
                FrameKind::Alive | FrameKind::Bye => {}
                FrameKind::Ack => {
                    let ack = Ack::decode(&frame.payload)?;
                    self.shared.flow.acknowledge(ack.batch_bytes)?;
                    self.shared.count_disk_bytes(ack.disk_bytes);
                }
                FrameKind::Verdict => {
                    let verdict = Verdict::decode(&frame.payload)?;
                    let (settled, pages) = self.shared.flow.judge(&verdict)?;
                    let wanted = pages.len() as u64;
                    self.shared.progress.add(Counter::DiskPages, settled);
                    self.shared.progress.add(Counter::MismatchedPages, wanted);
                    self.shared.count_late_pages();
                    if let Some(doubt) = &self.shared.doubt {
                        doubt.judge(settled, wanted, &pages);
                    }
                }
                FrameKind::ReturnPath => self.return_path(&frame.payload)?,
                FrameKind::Control => match bounded_words::decode(&frame.payload)? {
                    Control::Running => {
                        self.shared.answer(Ok(()));
                        if !self.shared.is_over() {
                            return Ok(());
                        }
                        // In post-copy the guest goes on asking for pages.
                    }
                    Control::Endure => self.shared.set_endures(),
                    Control::Loaded if self.shared.keeps_until_loaded() => self.shared.set_loaded(),
                    Control::Stalled(stalls) => self.shared.set_stalls(stalls),
                    Control::Clock { monotonic_ns } => self.shared.clocks.answered(monotonic_ns),
                    Control::Compared(compared) => match &self.shared.doubt {
                        Some(doubt) => doubt.answer(compared),
                        None => return Err(RelayError::Misplaced("comparison of disks")),
                    },
                    Control::GuestEnded(how) if self.shared.is_over() => {
                        self.shared.set_guest_ended(how);
                        return Err(RelayError::GuestEnded(how));
                    }
                    Control::Abort { reason } => {
                        self.shared.answer(Err(reason.clone()));
                        return Err(RelayError::Aborted(reason));
                    }
                    _ => return Err(RelayError::Misplaced("control message")),
                },
                FrameKind::Batch | FrameKind::Hints | FrameKind::Fill => {
                    return Err(RelayError::Misplaced("frame of a source"));
                }
            }
        }
    }

    /// Passes messages on, but for the one that would let QEMU switch over: that one waits.
    fn return_path(&mut self, bytes: &[u8]) -> Result<(), RelayError> {
        self.partial.extend_from_slice(bytes);
        let mut used = 0;
        while let Some((message, length)) =
            Message::decode_resumed(&self.partial[used..], self.longest_bitmap)?
        {
            let bytes = &self.partial[used..used + length];
            if let Message::RequestPagesOf { length, .. } | Message::RequestPages { length, .. } =
                message
            {
                let pages = u64::from(length) / PAGE_SIZE as u64;
                self.shared.progress.add(Counter::RequestedPages, pages);
            }
            // The destination always names the block.
            if let Message::RequestPagesOf {
                block,
                offset,
                length,
            } = message
                && let Some(first) = self.shared.order.waits_for(block, offset)
            {
                let pages = u64::from(length) / PAGE_SIZE as u64;
                self.shared.requests.note(first, pages);
            }
            if matches!(message, Message::SwitchoverAck) {
                self.shared.hold_switchover(bytes);
            } else {
                self.shared.tell_qemu(bytes)?;
            }
            used += length;
        }
        self.partial.drain(..used);
        if self.partial.len() > PARTIAL_MOST.saturating_add(self.longest_bitmap) {
            return Err(RelayError::Misplaced("message of the return path"));
        }
        Ok(())
    }
}
