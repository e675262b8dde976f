//! What the destination says while memory moves.

use std::sync::Arc;

use transhume_protocol::link::{Ack, Control, FrameKind, Verdict};

use super::packer::Packer;
use super::shared::Shared;
use crate::error::RelayError;
use crate::progress::Counter;
use transhume_link::bounded_words;
use transhume_link::session::Session;

/// What becomes of the bytes that the destination's hypervisor says.
pub(crate) type ReturnPath = Box<dyn FnMut(&[u8], &Shared) -> Result<(), RelayError> + Send>;

/// The receiving thread.
pub(crate) struct Answers {
    session: Session<Packer>,
    shared: Arc<Shared>,
    return_path: ReturnPath,
}

impl Answers {
    pub(crate) fn new(
        session: Session<Packer>,
        shared: Arc<Shared>,
        return_path: ReturnPath,
    ) -> Self {
        Self {
            session,
            shared,
            return_path,
        }
    }

    /// Receives until the link ends or a control message closes the matter.
    pub(crate) fn run(mut self) -> Result<(), RelayError> {
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
                FrameKind::ReturnPath => (self.return_path)(&frame.payload, &self.shared)?,
                FrameKind::Control => match bounded_words::decode(&frame.payload)? {
                    Control::Running => {
                        self.shared.answer(Ok(()));
                        if !self.shared.is_committed() {
                            return Ok(());
                        }
                        // In post-copy the guest goes on asking for pages.
                    }
                    Control::KeepWaiting => self.shared.set_keeps_waiting(),
                    Control::Loaded if self.shared.keeps_until_loaded() => self.shared.set_loaded(),
                    Control::Stalled(stalls) => self.shared.set_stalls(stalls),
                    Control::Clock { monotonic_ns } => self.shared.clocks.answered(monotonic_ns),
                    Control::Compared(compared) => match &self.shared.doubt {
                        Some(doubt) => doubt.answer(compared),
                        None => return Err(RelayError::Misplaced("comparison of disks")),
                    },
                    Control::GuestEnded(how) if self.shared.is_committed() => {
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
}
