//! The guest's reports, translated to pages of QEMU's RAM blocks.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use transhume_protocol::agent::FrameRun;
use transhume_protocol::link::HintRun;
use transhume_protocol::memory::Block;

use super::frame_map::Frames;
use super::queue::SendQueue;
use transhume_guest::GuestRange;
use transhume_pages::SECTORS_PER_PAGE;
use transhume_pages::hint_table::{HintTable, MAX_RUNS};

#[derive(Default)]
struct State {
    /// Ranges that wait for the table of blocks.
    waiting: Vec<GuestRange>,
    blocks: Vec<Block>,
    table: Arc<HintTable>,
    whole: bool,
}

/// The reports of one migration.
pub(crate) struct Hints {
    frames: Arc<Frames>,
    flow: Arc<SendQueue>,
    state: Mutex<State>,
}

impl Hints {
    pub(crate) fn new(frames: Arc<Frames>, flow: Arc<SendQueue>) -> Self {
        Self {
            frames,
            flow,
            state: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The table to look pages up in, and whether a whole report is in it.
    pub(crate) fn current(&self) -> (Arc<HintTable>, bool) {
        let state = self.lock();
        (Arc::clone(&state.table), state.whole)
    }

    /// Pages named.
    pub(crate) fn pages(&self) -> u64 {
        let state = self.lock();
        let waiting = state.waiting.iter().map(|range| u64::from(range.pages));
        waiting.fold(state.table.pages(), u64::saturating_add)
    }

    /// Takes part of a report, or with `whole` the last of it.
    pub(crate) fn extend(&self, ranges: &[GuestRange], whole: bool) {
        let mut state = self.lock();
        let room = MAX_RUNS.saturating_sub(state.waiting.len());
        let ranges = ranges.get(..room).unwrap_or(ranges);
        state.waiting.extend_from_slice(ranges);
        state.whole |= whole;
        self.publish(&mut state, false);
    }

    /// Takes a whole report, which replaces all before.
    pub(crate) fn replace(&self, ranges: Vec<GuestRange>) {
        let mut state = self.lock();
        state.waiting = ranges;
        state.table = Arc::default();
        state.whole = true;
        self.publish(&mut state, true);
    }

    /// Takes QEMU's table of blocks, which comes with the stream.
    pub(crate) fn set_blocks(&self, blocks: &[Block]) {
        let mut state = self.lock();
        state.blocks = blocks.to_vec();
        self.publish(&mut state, false);
    }

    /// Translates what waits, and has it go to the destination: each page once, however often the guest names it.
    fn publish(&self, state: &mut State, replaces: bool) {
        if state.blocks.is_empty() {
            return;
        }
        let mut new = Vec::with_capacity(state.waiting.len());
        for range in std::mem::take(&mut state.waiting) {
            if new.len() >= MAX_RUNS {
                break;
            }
            self.translate(range, &state.blocks, &mut new);
        }
        let part = Arc::new(HintTable::new(new));
        state.table = if state.table.runs().is_empty() {
            Arc::clone(&part)
        } else {
            Arc::new(HintTable::new([part.runs(), state.table.runs()].concat()))
        };
        self.flow.report(part, replaces);
    }

    /// Cuts a range along the regions of memory; what lies outside of them is dropped.
    fn translate(&self, range: GuestRange, blocks: &[Block], runs: &mut Vec<HintRun>) {
        let run = FrameRun {
            pfn: range.pfn,
            pages: u64::from(range.pages),
        };
        for piece in self.frames.pieces(run, blocks) {
            let Some(sector) = piece
                .skipped
                .checked_mul(SECTORS_PER_PAGE)
                .and_then(|sectors| range.sector.checked_add(sectors))
            else {
                continue;
            };
            runs.push(HintRun {
                block: piece.block,
                page: piece.page,
                // Not longer than the range.
                pages: u32::try_from(piece.pages).unwrap_or(range.pages),
                disk: range.disk,
                sector,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    use transhume_protocol::link::{BATCH_HEADER_LEN, BatchEncoding, BatchHeader, decode_hints};

    use crate::send::queue::{Next, Outgoing};
    use transhume_machine::memory_layout::Region;
    use transhume_pages::PageKey;
    use transhume_pages::hint_table::Place;

    const GIB: u64 = 1 << 30;

    #[test]
    fn memory_above_four_gigabytes_is_found_in_its_block() {
        let region = |start, length, offset| Region {
            start,
            length,
            block: "pc.ram".to_owned(),
            offset,
        };
        let layout = vec![region(0, 2 * GIB, 0), region(4 * GIB, 3 * GIB, 2 * GIB)];
        let hints = Hints::new(Arc::new(Frames::new(layout)), Arc::new(SendQueue::new()));
        let block = |name: &str, length| Block {
            name: name.to_owned(),
            length,
        };
        hints.set_blocks(&[block("vga.vram", 1 << 24), block("pc.ram", 5 * GIB)]);
        // The last two pages below the hole, two in the hole; the last of the hole and the first above.
        let hole = GuestRange {
            pfn: 2 * GIB / 4096 - 2,
            pages: 4,
            disk: 0,
            sector: 80,
        };
        let above = GuestRange {
            pfn: 4 * GIB / 4096 - 1,
            pages: 2,
            disk: 1,
            sector: 800,
        };
        hints.extend(&[hole], false);
        assert_eq!((hints.pages(), hints.current().1), (2, false));
        hints.extend(&[above], true);
        let (table, whole) = hints.current();
        assert!(whole);
        assert_eq!(table.pages(), 3);
        let found = |page| table.look_up(PageKey { block: 1, page }, &mut 0);
        assert_eq!(
            found(2 * GIB / 4096 - 1),
            Some(Place {
                disk: 0,
                sector: 88
            })
        );
        assert_eq!(
            found(2 * GIB / 4096),
            Some(Place {
                disk: 1,
                sector: 808
            })
        );
        assert_eq!(found(2 * GIB / 4096 + 1), None);
        hints.replace(vec![above]);
        assert_eq!(hints.pages(), 1);
    }

    #[test]
    fn pages_that_are_named_again_and_again_go_out_once() {
        const PAGES: u32 = 15_000;
        let region = Region {
            start: 0,
            length: GIB,
            block: "pc.ram".to_owned(),
            offset: 0,
        };
        let flow = Arc::new(SendQueue::new());
        let hints = Hints::new(Arc::new(Frames::new(vec![region])), Arc::clone(&flow));
        hints.set_blocks(&[Block {
            name: "pc.ram".to_owned(),
            length: GIB,
        }]);
        let all = |sector| GuestRange {
            pfn: 0,
            pages: PAGES,
            disk: 0,
            sector,
        };
        hints.extend(&(0..20_000).map(all).collect::<Vec<_>>(), true);
        let runs = sent(&flow);
        assert_eq!(runs.len(), 1);
        assert_eq!((runs[0].page, runs[0].pages), (0, PAGES));
        assert_eq!(hints.pages(), u64::from(PAGES));
    }

    /// All runs that go out now.
    fn sent(flow: &SendQueue) -> Vec<HintRun> {
        let mut runs = Vec::new();
        while let Next::Hints(payload) = flow.next(Duration::ZERO).expect("it goes on") {
            runs.extend(decode_hints(&payload).map(|run| run.expect("a run")));
        }
        runs
    }

    #[test]
    fn a_guest_that_reports_without_an_end_gets_a_tenth_of_the_link() {
        const RANGES: u64 = 200_000;
        let region = Region {
            start: 0,
            length: 4 * GIB,
            block: "pc.ram".to_owned(),
            offset: 0,
        };
        let flow = Arc::new(SendQueue::new());
        let hints = Hints::new(Arc::new(Frames::new(vec![region])), Arc::clone(&flow));
        hints.set_blocks(&[Block {
            name: "pc.ram".to_owned(),
            length: 4 * GIB,
        }]);
        let report = |sector| {
            (0..RANGES)
                .map(|n| GuestRange {
                    pfn: 2 * n,
                    pages: 1,
                    disk: 0,
                    sector,
                })
                .collect::<Vec<_>>()
        };
        let ((sent, data), most) = transhume_testing::peak(|| {
            let (mut sent, mut data) = (0, 0);
            for n in 0..30 {
                hints.replace(report(n));
                let header = BatchHeader {
                    number: n,
                    encoding: BatchEncoding::Plain,
                    records_len: 0,
                    data_len: 1 << 20,
                };
                let batch = Outgoing {
                    header,
                    records: Vec::new(),
                    buffer: None,
                    data: Vec::new(),
                };
                flow.push(batch, Vec::new()).expect("it goes on");
                flow.acknowledge(data).expect("it was sent");
                loop {
                    match flow.next(Duration::ZERO).expect("it goes on") {
                        Next::Hints(payload) => sent += payload.len() as u64,
                        Next::Batch(_) => data += (BATCH_HEADER_LEN + (1 << 20)) as u64,
                        _ => break,
                    }
                }
            }
            (sent, data)
        });
        // What is one frame too many.
        assert!(
            sent <= (1 << 20) + data / 10 + (64 << 10),
            "{sent} of {data}"
        );
        assert!(data >= 30 << 20, "all data went out");
        assert!(sent > data / 10, "{sent} of {data}");
        assert!(most < 64 << 20, "{most} bytes");
    }
}
