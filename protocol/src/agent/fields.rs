//! Fields of a message's payload. Integers are little-endian; texts are a length byte and UTF-8.

use super::frame::{FrameError, HEADER_LEN, seal};
use super::message::{Encoded, MAX_TEXT_LEN, MessageError};

/// Writes a payload's fields, behind room for its frame's header.
pub(super) struct Writer<'a> {
    out: &'a mut [u8],
    pub(super) at: usize,
}

impl<'a> Writer<'a> {
    pub(super) fn new(out: &'a mut [u8]) -> Self {
        Self {
            out,
            at: HEADER_LEN,
        }
    }

    pub(super) fn bytes(mut self, bytes: &[u8]) -> Result<Self, FrameError> {
        let end = self.at + bytes.len();
        let room = self.out.len();
        self.out
            .get_mut(self.at..end)
            .ok_or(FrameError::NoRoom { needed: end, room })?
            .copy_from_slice(bytes);
        self.at = end;
        Ok(self)
    }

    /// Texts are for people: one that is too long is cut.
    pub(super) fn text(self, text: &str) -> Result<Self, FrameError> {
        let mut end = text.len().min(MAX_TEXT_LEN);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.bytes(&[u8::try_from(end).unwrap_or(0)])?
            .bytes(&text.as_bytes()[..end])
    }

    pub(super) fn seal(self, kind: u8) -> Encoded {
        seal(self.out, kind, self.at - HEADER_LEN)
    }
}

/// Reads a payload's fields.
pub(super) struct Reader<'a> {
    pub(super) rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn take(&mut self, length: usize) -> Result<&'a [u8], MessageError> {
        let (taken, rest) = self
            .rest
            .split_at_checked(length)
            .ok_or(MessageError::Short)?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], MessageError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    pub(super) fn u8(&mut self) -> Result<u8, MessageError> {
        self.array().map(u8::from_le_bytes)
    }

    pub(super) fn u16(&mut self) -> Result<u16, MessageError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, MessageError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, MessageError> {
        self.array().map(u64::from_le_bytes)
    }

    pub(super) fn text(&mut self) -> Result<&'a str, MessageError> {
        let length = usize::from(self.u8()?);
        if length > MAX_TEXT_LEN {
            return Err(MessageError::Text);
        }
        core::str::from_utf8(self.take(length)?).map_err(|_| MessageError::Text)
    }

    pub(super) fn end<T>(self, message: T) -> Result<T, MessageError> {
        match self.rest.len() {
            0 => Ok(message),
            more => Err(MessageError::Trailing(more)),
        }
    }
}
