//! Frames of the agent channel, little-endian:
//!
//! ```text
//! u32 magic | u8 kind | u8 reserved (0) | u16 payload length | u32 CRC-32 | payload
//! ```
//!
//! The checksum covers kind, reserved, length and payload.

use thiserror::Error;

const MAGIC: [u8; 4] = *b"THA1";

/// Bytes before the payload.
pub const HEADER_LEN: usize = 12;
/// Longest payload, in bytes.
pub const MAX_PAYLOAD_LEN: usize = 16 * 1024;
/// Longest frame, in bytes.
pub const MAX_FRAME_LEN: usize = HEADER_LEN + MAX_PAYLOAD_LEN;

/// Why bytes were not a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum FrameError {
    /// The output has no room for the frame.
    #[error("a frame of {needed} bytes does not fit in a buffer of {room}")]
    NoRoom {
        /// Length of the frame.
        needed: usize,
        /// Length of the buffer.
        room: usize,
    },
    /// The payload is longer than [`MAX_PAYLOAD_LEN`].
    #[error("a payload of {0} bytes is longer than a frame may carry")]
    TooLong(usize),
}

fn checksum(head: &[u8], payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(head);
    hasher.update(payload);
    hasher.finalize()
}

/// Writes the frame's header in front of a payload that already stands at `HEADER_LEN..` of
/// `out`, and returns the frame's length.
pub(super) fn seal(out: &mut [u8], kind: u8, payload_len: usize) -> Result<usize, FrameError> {
    let length = u16::try_from(payload_len).map_err(|_| FrameError::TooLong(payload_len))?;
    if payload_len > MAX_PAYLOAD_LEN {
        return Err(FrameError::TooLong(payload_len));
    }
    let needed = HEADER_LEN + payload_len;
    let room = out.len();
    let frame = out
        .get_mut(..needed)
        .ok_or(FrameError::NoRoom { needed, room })?;
    let (head, payload) = frame.split_at_mut(HEADER_LEN);
    head[..4].copy_from_slice(&MAGIC);
    head[4] = kind;
    head[5] = 0;
    head[6..8].copy_from_slice(&length.to_le_bytes());
    let sum = checksum(&head[4..8], payload);
    head[8..12].copy_from_slice(&sum.to_le_bytes());
    Ok(needed)
}

/// Encodes one frame into `out` and returns its length in bytes.
pub fn encode_frame(out: &mut [u8], kind: u8, payload: &[u8]) -> Result<usize, FrameError> {
    let needed = HEADER_LEN + payload.len();
    let room = out.len();
    if payload.len() > MAX_PAYLOAD_LEN {
        return Err(FrameError::TooLong(payload.len()));
    }
    out.get_mut(HEADER_LEN..needed)
        .ok_or(FrameError::NoRoom { needed, room })?
        .copy_from_slice(payload);
    seal(out, kind, payload.len())
}

/// Finds frames in a byte stream, skipping what is none.
///
/// Holds [`MAX_FRAME_LEN`] bytes, so that memory is bounded whatever the other side sends.
pub struct Decoder {
    buffer: [u8; MAX_FRAME_LEN],
    filled: usize,
    /// Bytes at the front that the last returned frame used.
    used: usize,
    skipped: u64,
}

impl Default for Decoder {
    fn default() -> Self {
        Self::new()
    }
}

impl Decoder {
    /// An empty decoder.
    pub const fn new() -> Self {
        Self {
            buffer: [0; MAX_FRAME_LEN],
            filled: 0,
            used: 0,
            skipped: 0,
        }
    }

    /// Bytes thrown away so far because they belonged to no frame.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Whether the stream stands inside a frame (or inside bytes that may become one).
    pub fn is_mid_frame(&self) -> bool {
        self.filled > self.used
    }

    /// Takes the frame that is incomplete for one that never will be: what was pushed behind its beginning is looked
    /// through for others.
    pub fn give_up_frame(&mut self) {
        self.drop_used();
        if self.filled > 0 {
            self.buffer.copy_within(1..self.filled, 0);
            self.filled -= 1;
            self.skipped += 1;
        }
    }

    /// Forgets everything that was pushed.
    pub fn reset(&mut self) {
        self.filled = 0;
        self.used = 0;
    }

    /// Takes as much of `input` as there is room for and returns how much that was.
    ///
    /// Call [`Self::next_frame`] until it returns `None`, then push the rest: a push after that
    /// always takes at least one byte.
    pub fn push(&mut self, input: &[u8]) -> usize {
        self.drop_used();
        let room = &mut self.buffer[self.filled..];
        let taken = room.len().min(input.len());
        room[..taken].copy_from_slice(&input[..taken]);
        self.filled += taken;
        taken
    }

    /// The next whole frame, as kind and payload; `None` when more bytes are needed.
    pub fn next_frame(&mut self) -> Option<(u8, &[u8])> {
        self.drop_used();
        let mut at = 0;
        let length = loop {
            match parse(&self.buffer[at..self.filled]) {
                Parsed::Frame(length) => break Some(length),
                Parsed::Incomplete => break None,
                Parsed::Garbage(bytes) => {
                    at += bytes;
                    self.skipped += bytes as u64;
                }
            }
        };
        self.buffer.copy_within(at..self.filled, 0);
        self.filled -= at;
        let length = length?;
        self.used = length;
        Some((self.buffer[4], &self.buffer[HEADER_LEN..length]))
    }

    fn drop_used(&mut self) {
        if self.used > 0 {
            self.buffer.copy_within(self.used..self.filled, 0);
            self.filled -= self.used;
            self.used = 0;
        }
    }
}

enum Parsed {
    /// A whole frame of this many bytes.
    Frame(usize),
    /// What is there may begin a frame.
    Incomplete,
    /// This many bytes (at least one) belong to no frame.
    Garbage(usize),
}

fn parse(bytes: &[u8]) -> Parsed {
    let magic_seen = bytes.len().min(MAGIC.len());
    if bytes[..magic_seen] != MAGIC[..magic_seen] {
        let next = bytes.iter().skip(1).position(|&byte| byte == MAGIC[0]);
        return Parsed::Garbage(next.map_or(bytes.len(), |position| position + 1));
    }
    if bytes.len() < HEADER_LEN {
        return Parsed::Incomplete;
    }
    let payload_len = usize::from(u16::from_le_bytes([bytes[6], bytes[7]]));
    if bytes[5] != 0 || payload_len > MAX_PAYLOAD_LEN {
        return Parsed::Garbage(1);
    }
    let length = HEADER_LEN + payload_len;
    if bytes.len() < length {
        return Parsed::Incomplete;
    }
    let sum = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
    if checksum(&bytes[4..8], &bytes[HEADER_LEN..length]) == sum {
        Parsed::Frame(length)
    } else {
        Parsed::Garbage(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frames(stream: &[u8], step: usize) -> Vec<(u8, Vec<u8>)> {
        let mut decoder = Decoder::new();
        let mut found = Vec::new();
        for mut piece in stream.chunks(step.max(1)) {
            while !piece.is_empty() {
                let taken = decoder.push(piece);
                assert!(taken > 0, "a push after the last frame makes progress");
                piece = &piece[taken..];
                while let Some((kind, payload)) = decoder.next_frame() {
                    found.push((kind, payload.to_vec()));
                }
            }
        }
        found
    }

    proptest! {
        #[test]
        fn frames_survive_any_cut(
            sent in prop::collection::vec((any::<u8>(), prop::collection::vec(any::<u8>(), 0..300)), 0..12),
            step in 1_usize..700,
        ) {
            let mut stream = Vec::new();
            for (kind, payload) in &sent {
                let mut out = [0; MAX_FRAME_LEN];
                let length = encode_frame(&mut out, *kind, payload).unwrap();
                stream.extend_from_slice(&out[..length]);
            }
            prop_assert_eq!(frames(&stream, step), sent);
        }

        #[test]
        fn a_frame_is_found_behind_garbage(
            garbage in prop::collection::vec(any::<u8>(), 0..2000),
            payload in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            let mut out = [0; MAX_FRAME_LEN];
            let length = encode_frame(&mut out, 7, &payload).unwrap();
            let mut stream = garbage;
            // Garbage that looks like a header can claim a payload: it costs at most one frame's length.
            stream.extend(std::iter::repeat_n(0, MAX_FRAME_LEN));
            stream.extend_from_slice(&out[..length]);
            prop_assert!(frames(&stream, 4096).contains(&(7, payload)));
        }
    }

    #[test]
    fn a_frame_is_found_behind_one_that_was_cut_off() {
        let mut out = [0; MAX_FRAME_LEN];
        let mut decoder = Decoder::new();
        decoder.give_up_frame();
        let length = encode_frame(&mut out, 3, &[7; 5000]).unwrap();
        decoder.push(&out[..length / 2]);
        let length = encode_frame(&mut out, 4, b"hello").unwrap();
        decoder.push(&out[..length]);
        assert_eq!(decoder.next_frame(), None);
        assert!(decoder.is_mid_frame());
        decoder.give_up_frame();
        assert_eq!(decoder.next_frame(), Some((4, &b"hello"[..])));
        assert_eq!(decoder.next_frame(), None);
        assert!(!decoder.is_mid_frame());
    }

    #[test]
    fn a_payload_that_is_too_long_is_refused() {
        let mut out = [0; 2 * MAX_FRAME_LEN];
        let payload = [0; MAX_PAYLOAD_LEN + 1];
        assert_eq!(
            encode_frame(&mut out, 1, &payload),
            Err(FrameError::TooLong(MAX_PAYLOAD_LEN + 1))
        );
    }
}
