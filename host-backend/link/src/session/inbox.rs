//! Frames from the peer, put into their order. Without threads and clocks.

use std::collections::BTreeMap;

use transhume_protocol::link::{LinkError, MAX_FRAME_PAYLOAD, SESSION_FRAME_ROOM, SESSION_WINDOW};

use crate::Frame;

/// What a peer that keeps to its window can have sent at most, in bytes.
const LIMIT: u64 = SESSION_WINDOW + MAX_FRAME_PAYLOAD as u64 + SESSION_FRAME_ROOM;

/// See the module.
pub(super) struct Inbox {
    /// Received, not yet worked off.
    frames: BTreeMap<u64, Frame>,
    /// The room that they take.
    room: u64,
    /// All frames up to this number have come.
    received: u64,
    /// All frames up to this number were worked off.
    taken: u64,
}

pub(super) fn room(frame: &Frame) -> u64 {
    frame.payload.len() as u64 + SESSION_FRAME_ROOM
}

impl Inbox {
    pub(super) fn new() -> Self {
        Self {
            frames: BTreeMap::new(),
            room: 0,
            received: 0,
            taken: 0,
        }
    }

    /// All frames up to this number have come.
    pub(super) fn received(&self) -> u64 {
        self.received
    }

    /// All frames up to this number were handed out.
    pub(super) fn taken(&self) -> u64 {
        self.taken
    }

    /// Takes a frame, once: a second one of its number is dropped.
    pub(super) fn insert(&mut self, number: u64, frame: Frame) -> Result<(), LinkError> {
        if number <= self.received || self.frames.contains_key(&number) {
            return Ok(());
        }
        let room = self.room + room(&frame);
        let ahead = number - self.taken;
        if room > LIMIT || ahead > LIMIT / SESSION_FRAME_ROOM {
            return Err(LinkError::OutOfBounds("frames ahead of the window"));
        }
        self.room = room;
        self.frames.insert(number, frame);
        while self.frames.contains_key(&(self.received + 1)) {
            self.received += 1;
        }
        Ok(())
    }

    /// The next frame in order, if it has come.
    pub(super) fn pop(&mut self) -> Option<Frame> {
        let frame = self.frames.remove(&(self.taken + 1))?;
        self.taken += 1;
        self.room -= room(&frame);
        Some(frame)
    }
}
