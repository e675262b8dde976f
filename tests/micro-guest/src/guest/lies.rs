//! Lies about the page cache, for tests of a host that must not believe its guest.

use crate::parameters::Lie;
use alloc::vec;
use core::time::Duration;
use micro_guest::content::{Random, SECTORS_PER_PAGE};
use transhume_protocol::agent::{AgentMessage, Decoder, FrameRun, MAX_FRAME_LEN, Range, VERSION};

/// Tells the chosen lie, or none.
#[derive(Clone)]
pub(crate) struct Liar {
    lie: Lie,
    random: Random,
    /// Fell silent for good.
    silent: bool,
    /// Began to babble.
    babbling: bool,
    /// Ranges that were invented for this report.
    invented: u64,
}

/// Invented ranges of a report that comes to an end.
const OVERLAPPING: u64 = 20_000;
const MANY: u64 = 100_000;
/// Frames that each of the overlapping ranges names, and where they begin.
const OVERLAP_PAGES: u32 = 15_000;
const OVERLAP_FROM: u64 = 1 << 12;
/// How much faster time goes for a guest that does not wait between reports.
const HASTE: u32 = 256;

impl Liar {
    /// A liar whose choices follow from `seed`.
    pub(crate) fn new(lie: Lie, seed: u64) -> Self {
        Self {
            lie,
            random: Random::new(!seed),
            silent: false,
            babbling: false,
            invented: 0,
        }
    }

    /// Whether the report costs nothing by its own word, so that the host's limit never bites.
    pub(crate) fn hides_its_cost(&self) -> bool {
        matches!(self.lie, Lie::Flood | Lie::Overlap | Lie::ManyReports)
    }

    /// The time as the session sees it.
    pub(crate) fn time(&self, now: Duration) -> Duration {
        match self.lie {
            Lie::ManyReports => now * HASTE,
            _ => now,
        }
    }

    /// A report begins.
    pub(crate) fn begin(&mut self) {
        self.invented = 0;
    }

    /// Whether dirty cache pages are reported as clean.
    pub(crate) fn names_dirty_pages(&self) -> bool {
        self.lie == Lie::Stale
    }

    /// A range from nowhere, instead of the next true one.
    pub(crate) fn invented(&mut self, sectors: u64) -> Option<Range> {
        let (most, pfns) = match self.lie {
            Lie::Flood => (u64::MAX, 1 << 21),
            Lie::ManyReports => (MANY, 1 << 15),
            Lie::Overlap => (OVERLAPPING, 0),
            _ => return None,
        };
        if self.invented >= most {
            return None;
        }
        self.invented += 1;
        let sector = self.random.below(sectors.max(1));
        Some(if self.lie == Lie::Overlap {
            Range {
                pfn: OVERLAP_FROM,
                sector,
                pages: OVERLAP_PAGES,
            }
        } else {
            Range {
                pfn: self.random.below(pfns),
                sector,
                pages: self.random.below(64) as u32 + 1,
            }
        })
    }

    /// Frames from nowhere, instead of the next that are the guest's own or that it writes.
    pub(crate) fn invented_frames(&mut self) -> Option<FrameRun> {
        (self.lie == Lie::Flood).then(|| FrameRun {
            pfn: self.random.below(1 << 21),
            pages: self.random.below(64) + 1,
        })
    }

    /// Frames as they are named.
    pub(crate) fn frames(&mut self, run: FrameRun) -> FrameRun {
        match self.lie {
            Lie::OutsideMemory => FrameRun {
                pfn: self.place_outside(),
                pages: 1 << self.random.below(60),
            },
            _ => run,
        }
    }

    /// A frame where no memory is: in the hole below 4 GiB, right above any memory, at the end of all numbers.
    fn place_outside(&mut self) -> u64 {
        let places = [0xfe000, 1 << 22, 1 << 40, u64::MAX - 7];
        places[self.random.below(4) as usize] + self.random.below(8)
    }

    /// The range as it is reported. `sectors` is the disk's size.
    pub(crate) fn range(&mut self, mut range: Range, sectors: u64) -> Range {
        match self.lie {
            Lie::Wrong => {
                let away = SECTORS_PER_PAGE * (1 + self.random.below((sectors / 8).max(2) - 1));
                range.sector = (range.sector + away) % sectors;
            }
            Lie::OutsideMemory => range.pfn = self.place_outside(),
            Lie::OutsideDisk => {
                let places = [sectors, sectors.saturating_sub(1), 1 << 54, u64::MAX - 7];
                range.sector = places[self.random.below(4) as usize] + self.random.below(8);
            }
            _ => {}
        }
        range
    }

    /// Has its way with a frame of `length` bytes before it is sent, and returns its new length;
    /// 0 for silence.
    pub(crate) fn frame(&mut self, out: &mut [u8], length: usize) -> usize {
        match self.lie {
            Lie::MidFrame => self.fall_silent(out, length),
            Lie::Version => other_version(out, length),
            Lie::Garbage => {
                self.babbling = true;
                self.babble(out)
            }
            _ => length,
        }
    }

    /// Whether to send random bytes from now on, without being asked.
    pub(crate) fn is_babbling(&self) -> bool {
        self.babbling
    }

    /// Fills the buffer with random bytes and returns their number.
    pub(crate) fn babble(&mut self, out: &mut [u8]) -> usize {
        out.fill_with(|| self.random.number() as u8);
        out.len()
    }

    /// Cuts the first frame of ranges in its middle; nothing follows.
    fn fall_silent(&mut self, out: &[u8], length: usize) -> usize {
        if self.silent {
            return 0;
        }
        self.silent = read(&out[..length], |message| {
            matches!(message, AgentMessage::Ranges(_))
        })
        .unwrap_or(false);
        if self.silent { length / 2 } else { length }
    }
}

/// Puts a version into a hello that no host offers.
fn other_version(out: &mut [u8], length: usize) -> usize {
    let mut changed = vec![0; MAX_FRAME_LEN];
    let encoded = read(&out[..length], |message| match message {
        AgentMessage::Hello {
            session,
            source,
            page_shift,
            agent,
            ..
        } => {
            let version = VERSION.wrapping_add(1000);
            AgentMessage::Hello {
                version,
                session,
                source,
                page_shift,
                agent,
            }
            .encode(&mut changed)
            .ok()
        }
        _ => None,
    });
    let Some(Some(length)) = encoded else {
        return length;
    };
    out[..length].copy_from_slice(&changed[..length]);
    length
}

/// Reads back a frame that the session wrote.
fn read<R>(frame: &[u8], then: impl FnOnce(AgentMessage<'_>) -> R) -> Option<R> {
    let mut decoder = Decoder::new();
    decoder.push(frame);
    let (kind, payload) = decoder.next_frame()?;
    AgentMessage::decode(kind, payload).ok().map(then)
}
