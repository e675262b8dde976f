//! Turns a rate into pages to work on now.

use crate::clock::HZ;
use micro_guest::content::PAGE_SIZE;

/// What one page costs in bytes times ticks per second.
const PAGE_COST: u64 = HZ * PAGE_SIZE as u64;
/// Most pages in one turn of the main loop.
const MAX_TURN: u64 = 128;

/// A rate, and what of it is not used up.
pub(crate) struct Pace {
    bytes_per_second: u64,
    credit: u64,
}

impl Pace {
    /// A pace of so many bytes per second.
    pub(crate) fn new(bytes_per_second: u64) -> Self {
        Self {
            bytes_per_second: bytes_per_second.min(1 << 34),
            credit: 0,
        }
    }

    /// Pages that are due after so many ticks, up to a bound. What a stall of more than a quarter
    /// of a second left undone is not made up for: a burst would not be the rate that was asked for.
    pub(crate) fn due(&mut self, ticks: u64) -> u64 {
        let most = (self.bytes_per_second * (HZ / 4)).max(PAGE_COST);
        self.credit = (self.credit + self.bytes_per_second * ticks).min(most);
        let pages = (self.credit / PAGE_COST).min(MAX_TURN);
        self.credit -= pages * PAGE_COST;
        pages
    }
}
