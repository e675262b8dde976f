//! Frames on their way to the peer: numbered, kept until it has worked them off, and sent again when the
//! connection breaks that carried them. Without threads and clocks.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use transhume_protocol::link::{FrameKind, LinkError, SESSION_FRAME_ROOM};

/// A connection that a session has or had; never used twice.
pub(super) type Carrier = u64;

/// Part of a payload.
#[derive(Clone)]
pub enum Piece {
    /// The frame's own.
    Bytes(Vec<u8>),
    /// Ranges of bytes that others use as well.
    Shared(Arc<dyn AsRef<[u8]> + Send + Sync>, Vec<Range<usize>>),
}

/// A frame as it will be sent, every time.
#[derive(Clone)]
pub struct Prepared {
    /// What it carries.
    pub kind: FrameKind,
    /// Its payload.
    pub pieces: Vec<Piece>,
}

impl Prepared {
    /// A payload in one piece.
    pub fn new(kind: FrameKind, payload: Vec<u8>) -> Self {
        Self {
            kind,
            pieces: vec![Piece::Bytes(payload)],
        }
    }

    /// Bytes of memory that it keeps: all of what others use as well, however little of it is sent.
    pub(super) fn held(&self) -> u64 {
        let held = self.pieces.iter().map(|piece| match piece {
            Piece::Bytes(bytes) => bytes.len(),
            Piece::Shared(bytes, _) => (**bytes).as_ref().len(),
        });
        held.sum::<usize>() as u64
    }

    /// The payload, in order.
    pub(super) fn slices(&self) -> Vec<&[u8]> {
        let mut slices = Vec::new();
        for piece in &self.pieces {
            match piece {
                Piece::Bytes(bytes) => slices.push(&**bytes),
                Piece::Shared(bytes, ranges) => {
                    let bytes = (**bytes).as_ref();
                    slices.extend(ranges.iter().filter_map(|range| bytes.get(range.clone())));
                }
            }
        }
        slices
    }
}

/// What a connection should send.
pub(super) enum Task<R> {
    /// A frame that is to be prepared first: see [`Outbox::prepared`].
    Fresh(u64, R),
    /// A frame that was sent before.
    Again(u64, Arc<Prepared>),
}

/// What a frame takes in the window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Room {
    /// Until it is prepared.
    pub(super) raw: u64,
    /// From then on at least: what the peer counts.
    pub(super) least: u64,
}

impl Room {
    /// Of a frame whose payload is no longer than `length`, and which keeps `held` bytes until it is prepared.
    pub(super) fn new(length: usize, held: usize) -> Self {
        Self {
            raw: length.max(held) as u64 + SESSION_FRAME_ROOM,
            least: length as u64 + SESSION_FRAME_ROOM,
        }
    }
}

struct Kept {
    /// None while it is being prepared.
    frame: Option<Arc<Prepared>>,
    /// The connection that it was sent on; none when it need not be sent again, or waits for that.
    carrier: Option<Carrier>,
    room: u64,
    least: u64,
}

/// See the module. `R` is a frame before it is prepared.
pub(super) struct Outbox<R> {
    /// Not sent yet, with the room that each takes.
    waiting: VecDeque<(R, Room)>,
    kept: BTreeMap<u64, Kept>,
    again: BTreeSet<u64>,
    /// The last number that was given.
    last: u64,
    /// The peer has worked off all frames up to this.
    taken: u64,
}

impl<R> Outbox<R> {
    pub(super) fn new() -> Self {
        Self {
            waiting: VecDeque::new(),
            kept: BTreeMap::new(),
            again: BTreeSet::new(),
            last: 0,
            taken: 0,
        }
    }

    /// Puts a frame behind all others.
    pub(super) fn push(&mut self, frame: R, room: Room) {
        self.waiting.push_back((frame, room));
    }

    /// How many frames no connection has taken yet.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Whether the peer has worked everything off.
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.kept.is_empty()
    }

    /// What a connection should send next.
    pub(super) fn next(&mut self, carrier: Carrier) -> Option<Task<R>> {
        while let Some(number) = self.again.pop_first() {
            if let Some(kept) = self.kept.get_mut(&number)
                && let Some(frame) = &kept.frame
            {
                kept.carrier = Some(carrier);
                return Some(Task::Again(number, Arc::clone(frame)));
            }
        }
        let (frame, room) = self.waiting.pop_front()?;
        self.last += 1;
        let kept = Kept {
            frame: None,
            carrier: Some(carrier),
            room: room.raw,
            least: room.least,
        };
        self.kept.insert(self.last, kept);
        Some(Task::Fresh(self.last, frame))
    }

    /// A frame was prepared by the connection that took it. Returns the room that it does not need any more.
    pub(super) fn prepared(&mut self, number: u64, frame: Arc<Prepared>) -> u64 {
        let Some(kept) = self.kept.get_mut(&number) else {
            return 0;
        };
        let needed = kept.least.max(frame.held() + SESSION_FRAME_ROOM);
        let surplus = kept.room.saturating_sub(needed);
        kept.room -= surplus;
        kept.frame = Some(frame);
        if kept.carrier.is_none() {
            // Its connection broke meanwhile.
            self.again.insert(number);
        }
        surplus
    }

    /// A connection broke: what it carried is sent again on another.
    pub(super) fn broken(&mut self, carrier: Carrier) {
        for (number, kept) in &mut self.kept {
            if kept.carrier == Some(carrier) {
                kept.carrier = None;
                if kept.frame.is_some() {
                    self.again.insert(*number);
                }
            }
        }
    }

    /// The peer has received all frames up to `number`: none of them need be sent again.
    pub(super) fn received(&mut self, number: u64) -> Result<(), LinkError> {
        self.check(number)?;
        self.again.retain(|again| *again > number);
        for (_, kept) in self.kept.range_mut(..=number) {
            kept.carrier = None;
        }
        Ok(())
    }

    /// The peer has worked off all frames up to `taken`. Returns the room that they took.
    pub(super) fn acknowledge(&mut self, taken: u64) -> Result<u64, LinkError> {
        self.check(taken)?;
        // An older one may come later, by another connection.
        let mut room = 0;
        while let Some(first) = self.kept.first_entry()
            && *first.key() <= taken
        {
            room += first.remove().room;
        }
        if taken > self.taken {
            self.taken = taken;
            self.again = self.again.split_off(&(taken + 1));
        }
        Ok(room)
    }

    /// Whether the peer can have all frames up to `number`.
    fn check(&self, number: u64) -> Result<(), LinkError> {
        let mut unsent = self.kept.range(..=number);
        if number > self.last || unsent.any(|(_, kept)| kept.frame.is_none()) {
            return Err(LinkError::OutOfBounds("count of frames"));
        }
        Ok(())
    }
}
