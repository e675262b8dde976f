//! Ranges of page cache: what an agent's report is made of.

use super::fields::Writer;
use super::frame::{FrameError, HEADER_LEN, MAX_PAYLOAD_LEN, seal};
use super::message::{Encoded, MessageError, kind};
use crate::varint;

/// Clean page cache: `pages` page frames from `pfn` on hold what the disk holds from `sector` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Range {
    /// First page frame number (guest-physical address divided by the page size).
    pub pfn: u64,
    /// First sector of 512 bytes on the whole disk.
    pub sector: u64,
    /// Length in pages; at least 1.
    pub pages: u32,
}

/// The ranges of one message, all on one disk, decoded as they are iterated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ranges<'a> {
    /// Number of the disk, as in [`AgentMessage::Disk`].
    pub disk: u16,
    pub(super) body: &'a [u8],
}

/// What differences are taken against: where the range before ended.
#[derive(Debug, Clone, Copy, Default)]
struct Position {
    pfn: u64,
    sector: u64,
}

/// Packs ranges of one disk into a [`AgentMessage::Ranges`] frame.
///
/// A range is three LEB128 integers: the zigzag differences of its page frame and of its sector to
/// where the range before ended, and its length in pages; mostly 4 to 8 bytes.
pub struct RangeEncoder<'a> {
    out: &'a mut [u8],
    at: usize,
    last: Position,
    sectors_per_page: u64,
}

impl<'a> RangeEncoder<'a> {
    /// Starts a message in `out`; `sectors_per_page` is the page size divided by 512.
    pub fn new(out: &'a mut [u8], disk: u16, sectors_per_page: u64) -> Result<Self, FrameError> {
        let at = Writer::new(&mut *out).bytes(&disk.to_le_bytes())?.at;
        Ok(Self {
            out,
            at,
            last: Position::default(),
            sectors_per_page,
        })
    }

    /// Adds a range; `false` when the message is full and the range was not taken.
    #[must_use]
    pub fn add(&mut self, range: Range) -> bool {
        let pfn = range.pfn.wrapping_sub(self.last.pfn).cast_signed();
        let sector = range.sector.wrapping_sub(self.last.sector).cast_signed();
        let end = self.out.len().min(HEADER_LEN + MAX_PAYLOAD_LEN);
        let Some(out) = self.out.get_mut(..end) else {
            return false;
        };
        let put = varint::put(out, self.at, varint::zigzag(pfn))
            .and_then(|at| varint::put(out, at, varint::zigzag(sector)))
            .and_then(|at| varint::put(out, at, u64::from(range.pages)));
        let Some(at) = put else { return false };
        self.at = at;
        self.last = after(range, self.sectors_per_page);
        true
    }

    /// Whether no range was added.
    pub fn is_empty(&self) -> bool {
        self.at == HEADER_LEN + 2
    }

    /// Seals the frame and returns its length in bytes.
    pub fn finish(self) -> Encoded {
        seal(self.out, kind::RANGES, self.at - HEADER_LEN)
    }
}

fn after(range: Range, sectors_per_page: u64) -> Position {
    Position {
        pfn: range.pfn.wrapping_add(u64::from(range.pages)),
        sector: range
            .sector
            .wrapping_add(u64::from(range.pages).wrapping_mul(sectors_per_page)),
    }
}

impl<'a> Ranges<'a> {
    /// Iterates over the ranges; the first error ends the iteration.
    /// `sectors_per_page` is the page size divided by 512.
    pub fn iter(
        &self,
        sectors_per_page: u64,
    ) -> impl Iterator<Item = Result<Range, MessageError>> + use<'a> {
        let body = self.body;
        let mut at = 0;
        let mut last = Position::default();
        core::iter::from_fn(move || {
            if at >= body.len() {
                return None;
            }
            let decoded = decode_range(body, at, last);
            match decoded {
                Ok((range, next)) => {
                    at = next;
                    last = after(range, sectors_per_page);
                    Some(Ok(range))
                }
                Err(error) => {
                    at = body.len();
                    Some(Err(error))
                }
            }
        })
    }
}

fn decode_range(body: &[u8], at: usize, last: Position) -> Result<(Range, usize), MessageError> {
    let (pfn, at) = varint::get(body, at).ok_or(MessageError::Short)?;
    let (sector, at) = varint::get(body, at).ok_or(MessageError::Short)?;
    let (pages, at) = varint::get(body, at).ok_or(MessageError::Short)?;
    let range = Range {
        pfn: last.pfn.wrapping_add_signed(varint::unzigzag(pfn)),
        sector: last.sector.wrapping_add_signed(varint::unzigzag(sector)),
        pages: u32::try_from(pages).map_err(|_| MessageError::OutOfBounds("pages"))?,
    };
    if range.pages == 0 {
        return Err(MessageError::OutOfBounds("pages"));
    }
    Ok((range, at))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::frame::MAX_FRAME_LEN;
    use crate::agent::message::AgentMessage;
    use crate::agent::message::tests::reframe;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ranges_round_trip(
            disk: u16,
            sent in prop::collection::vec((any::<u64>(), any::<u64>(), 1_u32..), 0..200),
        ) {
            let sent: Vec<Range> =
                sent.into_iter().map(|(pfn, sector, pages)| Range { pfn, sector, pages }).collect();
            let mut out = [0; MAX_FRAME_LEN];
            let mut encoder = RangeEncoder::new(&mut out, disk, 8).unwrap();
            for &range in &sent {
                prop_assert!(encoder.add(range));
            }
            let length = encoder.finish().unwrap();
            let (kind, payload) = reframe(&out[..length]);
            let Ok(AgentMessage::Ranges(ranges)) = AgentMessage::decode(kind, &payload) else {
                panic!("kind {kind}");
            };
            prop_assert_eq!(ranges.disk, disk);
            let got: Result<Vec<Range>, _> = ranges.iter(8).collect();
            prop_assert_eq!(got, Ok(sent));
        }
    }

    #[test]
    fn a_full_message_refuses_the_next_range() {
        let mut out = [0; HEADER_LEN + 2 + 7];
        let mut encoder = RangeEncoder::new(&mut out, 0, 8).unwrap();
        assert!(encoder.is_empty());
        assert!(encoder.add(Range {
            pfn: 1,
            sector: 1,
            pages: 1
        }));
        assert!(!encoder.add(Range {
            pfn: 1 << 40,
            sector: 1 << 40,
            pages: 1
        }));
        assert!(encoder.add(Range {
            pfn: 2,
            sector: 9,
            pages: 1
        }));
        assert_eq!(encoder.finish(), Ok(HEADER_LEN + 2 + 6));
    }
}
