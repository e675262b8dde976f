//! What goes into the destination's QEMU: a bounded queue, which `qemu/stream_writer.rs` writes out.
//!
//! The order of the queue is the order in QEMU's stream. Pages may be put in at any time between the
//! set-up and the end of the last RAM section; where no section is open, the writer makes one.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};

use transhume_protocol::link::SectionKind;
use transhume_protocol::memory::{Block, Discard};

use super::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use crate::error::RelayError;
use transhume_pages::PageKey;

/// Bytes of memory that the queue keeps, at most: what the pieces take, and all of what they refer to, however little
/// of it goes to QEMU. Whoever puts something in waits for room before; so it may be more by what one record holds.
const QUEUE_LIMIT: usize = 24 << 20;

/// Ranges that QEMU is to forget, joined at most.
const MAX_RANGES: usize = 4096;

/// Memory that holds pages: a received batch, or what was read from a disk.
pub(crate) type Contents = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// Contents that count as kept by a queue until nobody refers to them.
struct Kept<C> {
    contents: C,
    length: usize,
    output: Weak<Output>,
}

impl<C: AsRef<[u8]>> AsRef<[u8]> for Kept<C> {
    fn as_ref(&self) -> &[u8] {
        self.contents.as_ref()
    }
}

impl<C> Drop for Kept<C> {
    fn drop(&mut self) {
        if let Some(output) = self.output.upgrade() {
            output.lock().kept -= self.length;
            output.changed.notify_all();
        }
    }
}

/// A piece of the stream.
pub(crate) enum Piece {
    /// Bytes as they came.
    Raw(Vec<u8>),
    /// QEMU's RAM section and its blocks: needed before the first page.
    Blocks { section: u32, blocks: Vec<Block> },
    /// A RAM section begins.
    Open(SectionKind),
    /// It ends.
    Close,
    /// Pages that hold one repeated byte.
    Zero {
        block: u16,
        page: u64,
        count: u32,
        fill: u8,
    },
    /// Pages, and where each one lies in the memory.
    Pages {
        contents: Contents,
        pages: Vec<(PageKey, u32)>,
    },
    /// Pages that QEMU forgets.
    Discard(Discard),
    /// What follows waits for [`Output::release`].
    Hold,
}

impl Piece {
    /// Bytes of memory that it takes, without what it refers to.
    fn size(&self) -> usize {
        let beside = match self {
            Self::Raw(bytes) => bytes.len(),
            Self::Pages { pages, .. } => size_of_val(pages.as_slice()),
            Self::Discard(discard) => size_of_val(discard.ranges.as_slice()),
            Self::Blocks { .. } | Self::Open(_) | Self::Close | Self::Zero { .. } | Self::Hold => 0,
        };
        size_of::<Self>() + beside
    }
}

/// Pages that were written to QEMU's stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Arrived {
    pub(crate) block: u16,
    pub(crate) page: u64,
    pub(crate) count: u32,
}

struct Queue {
    pieces: VecDeque<Piece>,
    /// What was written since it was asked for last, if anybody watches. In post-copy each page comes once, so
    /// there are never more than the guest has.
    arrived: Option<Vec<Arrived>>,
    /// See [`QUEUE_LIMIT`].
    kept: usize,
    released: bool,
    stopped: bool,
}

impl Queue {
    fn is_held(&self) -> bool {
        matches!(self.pieces.front(), Some(Piece::Hold)) && !self.released
    }
}

/// The queue.
pub(crate) struct Output {
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Output {
    pub(crate) fn new() -> Self {
        let queue = Queue {
            pieces: VecDeque::new(),
            arrived: None,
            kept: 0,
            released: false,
            stopped: false,
        };
        Self {
            queue: Mutex::new(queue),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends everyone's waiting with an error.
    pub(crate) fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }

    /// Counts contents as kept until the last piece that refers to them was written.
    pub(crate) fn keep<C: AsRef<[u8]> + Send + Sync + 'static>(
        self: &Arc<Self>,
        contents: C,
        length: usize,
    ) -> Contents {
        self.lock().kept += length;
        Arc::new(Kept {
            contents,
            length,
            output: Arc::downgrade(self),
        })
    }

    /// Waits until the queue has room for more.
    ///
    /// # Errors
    /// When there will be none: a package waits for the hand-over, and what has come behind its beginning is more than
    /// any package.
    pub(crate) fn wait_for_room(&self) -> Result<(), RelayError> {
        let mut queue = self.lock();
        while !queue.stopped && queue.kept >= QUEUE_LIMIT {
            if queue.is_held() {
                return Err(RelayError::Misplaced(
                    "more than a package before the hand-over",
                ));
            }
            queue = self
                .changed
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if queue.stopped {
            Err(RelayError::Stopped)
        } else {
            Ok(())
        }
    }

    /// Puts a piece into the queue, room or not: so that it can be done under the lock that decided the
    /// order.
    pub(crate) fn push(&self, piece: Piece) {
        let mut queue = self.lock();
        if let (Some(Piece::Discard(last)), Piece::Discard(next)) =
            (queue.pieces.back_mut(), &piece)
            && last.block == next.block
            && last.ranges.len() < MAX_RANGES
        {
            // Many ranges make one command.
            last.ranges.extend_from_slice(&next.ranges);
            queue.kept += size_of_val(next.ranges.as_slice());
            return;
        }
        queue.kept += piece.size();
        queue.pieces.push_back(piece);
        self.changed.notify_all();
    }

    /// From now on it is noted what is written.
    pub(crate) fn watch(&self) {
        self.lock().arrived = Some(Vec::new());
    }

    /// Nobody watches any more.
    pub(crate) fn unwatch(&self) {
        self.lock().arrived = None;
    }

    /// What was written since this was called last.
    pub(crate) fn arrived(&self) -> Vec<Arrived> {
        let mut queue = self.lock();
        let arrived = queue.arrived.as_mut();
        arrived.map(std::mem::take).unwrap_or_default()
    }

    pub(crate) fn note(&self, pages: impl Iterator<Item = Arrived>) {
        if let Some(arrived) = &mut self.lock().arrived {
            arrived.extend(pages);
        }
    }

    /// Lets go on what waits for it.
    pub(crate) fn release(&self) {
        self.lock().released = true;
        self.changed.notify_all();
    }

    /// The next piece; waits for it.
    pub(crate) fn take(&self) -> Result<Piece, RelayError> {
        let mut queue = self.lock();
        loop {
            if queue.stopped {
                return Err(RelayError::Stopped);
            }
            if !queue.is_held()
                && let Some(piece) = queue.pieces.pop_front()
            {
                queue.kept -= piece.size();
                self.changed.notify_all();
                return Ok(piece);
            }
            queue = self
                .changed
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}
