//! Reads big-endian integers and names from bytes that may end early.

use super::{Error, MAX_NAME_LEN};

/// Why an item was not decoded.
pub(super) enum Stop {
    /// The input ends before the item does.
    More,
    /// The input is wrong.
    Failed(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

#[derive(Clone, Copy)]
pub(super) struct Reader<'a> {
    rest: &'a [u8],
    whole: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(input: &'a [u8]) -> Self {
        Self {
            rest: input,
            whole: input.len(),
        }
    }

    /// Bytes read so far.
    pub(super) fn used(&self) -> usize {
        self.whole - self.rest.len()
    }

    pub(super) fn bytes(&mut self, length: usize) -> Result<&'a [u8], Stop> {
        let (bytes, rest) = self.rest.split_at_checked(length).ok_or(Stop::More)?;
        self.rest = rest;
        Ok(bytes)
    }

    /// Skips up to `most` bytes, at least one, and returns how many there were.
    pub(super) fn available(&mut self, most: u32) -> Result<u32, Stop> {
        let taken = u32::try_from(self.rest.len()).map_or(most, |length| length.min(most));
        self.bytes(taken as usize)?;
        if taken == 0 {
            Err(Stop::More)
        } else {
            Ok(taken)
        }
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<&'a [u8; N], Stop> {
        let (array, rest) = self.rest.split_first_chunk().ok_or(Stop::More)?;
        self.rest = rest;
        Ok(array)
    }

    /// The next byte, which stays unread.
    pub(super) fn peek(&self) -> Result<u8, Stop> {
        self.rest.first().copied().ok_or(Stop::More)
    }

    pub(super) fn u8(&mut self) -> Result<u8, Stop> {
        self.array().map(|&[byte]| byte)
    }

    pub(super) fn u16(&mut self) -> Result<u16, Stop> {
        self.array().copied().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Stop> {
        self.array().copied().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Stop> {
        self.array().copied().map(u64::from_be_bytes)
    }

    /// A length byte and text.
    pub(super) fn name(&mut self, what: &'static str) -> Result<&'a str, Stop> {
        let length = self.u8()?;
        self.text(u32::from(length), what)
    }

    /// Text of a length that was read before it.
    pub(super) fn text(&mut self, length: u32, what: &'static str) -> Result<&'a str, Stop> {
        let length = usize::try_from(length)
            .ok()
            .filter(|length| (1..=MAX_NAME_LEN).contains(length))
            .ok_or(Error::Name(what))?;
        std::str::from_utf8(self.bytes(length)?).map_err(|_| Error::Name(what).into())
    }
}
