//! Keeps disk and link busy at the same time during the first scan of memory.
//!
//! QEMU scans memory in order, and page cache lies in long stretches: left alone, the link would idle
//! while the disk works, and then the disk while the link does. A request for a page, as a destination
//! in post-copy makes it, moves QEMU's scan there also in pre-copy (`get_queued_page` in QEMU's
//! `migration/ram.c`: the search goes on from the page). So the scan is moved to memory that the link
//! must carry when the link runs dry, and to memory that disks hold when the link has enough. While the
//! guest's report is not whole, the scan keeps to memory that is known to be on disk: the rest might be.

use std::time::{Duration, Instant};

use transhume_protocol::memory::Block;

use transhume_pages::bitmap::Bitmap;
use transhume_pages::hint_table::HintTable;
use transhume_pages::{PAGE_SIZE, PageKey};

/// Pages that are of one kind, by the majority.
const CHUNK: u64 = 256;
/// Smaller blocks, in bytes, are not worth it.
const MINIMUM: u64 = 64 << 20;
/// Pause between two moves: QEMU follows in some milliseconds.
const MOVE_INTERVAL: Duration = Duration::from_millis(10);

/// What the link needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LinkDemand {
    /// Nothing waits to be sent.
    Starved,
    /// Neither too little waits nor too much.
    Balanced,
    /// Enough waits: it could only wait longer.
    Saturated,
}

/// Where QEMU's scan should go.
#[derive(Debug)]
pub(crate) struct ScanSteering {
    block: u16,
    name: String,
    /// Whether disks hold most of a chunk.
    on_disk: Vec<bool>,
    /// Whether that is from a whole report.
    whole: bool,
    /// Chunks to look at next, for the link and for disks.
    next: [usize; 2],
    moved: Instant,
}

impl ScanSteering {
    /// For the largest of QEMU's RAM blocks, if it is worth it.
    pub(crate) fn new(blocks: &[Block]) -> Option<Self> {
        let (number, block) = blocks
            .iter()
            .enumerate()
            .max_by_key(|(_, block)| block.length)?;
        if block.length < MINIMUM {
            return None;
        }
        let chunks = (block.length / PAGE_SIZE as u64).div_ceil(CHUNK);
        Some(Self {
            block: u16::try_from(number).ok()?,
            name: block.name.clone(),
            on_disk: vec![false; usize::try_from(chunks).ok()?],
            whole: false,
            next: [0; 2],
            moved: Instant::now(),
        })
    }

    /// The block's number and name.
    pub(crate) fn block(&self) -> (u16, &str) {
        (self.block, &self.name)
    }

    /// Takes the guest's report, as far as it came.
    pub(crate) fn set_table(&mut self, table: &HintTable, whole: bool) {
        self.whole = whole;
        let mut counts = vec![0_u64; self.on_disk.len()];
        for run in table.runs().iter().filter(|run| run.block == self.block) {
            let end = run.page.saturating_add(u64::from(run.pages));
            let mut page = run.page;
            while page < end {
                let chunk = page / CHUNK;
                let stop = end.min((chunk + 1) * CHUNK);
                let count = usize::try_from(chunk)
                    .ok()
                    .and_then(|chunk| counts.get_mut(chunk));
                let Some(count) = count else { break };
                *count += stop - page;
                page = stop;
            }
        }
        self.on_disk = counts.iter().map(|&count| count > CHUNK / 2).collect();
    }

    /// The page that QEMU's scan, now at `at`, should move to. `sent` has the pages of the block that QEMU
    /// has sent; `room` says whether more may be left to disks now.
    pub(crate) fn target(
        &mut self,
        sent: &Bitmap,
        at: PageKey,
        demand: LinkDemand,
        room: bool,
    ) -> Option<u64> {
        let chunk = usize::try_from(at.page / CHUNK).ok();
        let here = (at.block == self.block)
            .then(|| self.on_disk.get(chunk?).copied())
            .flatten()?;
        let to_disk = match (here, demand) {
            (false, _) if !self.whole && room => true,
            (_, _) if !self.whole => return None,
            (true, LinkDemand::Starved) => false,
            (true, LinkDemand::Balanced) if !room => false,
            (false, LinkDemand::Saturated) if room => true,
            _ => return None,
        };
        if self.moved.elapsed() < MOVE_INTERVAL {
            return None;
        }
        let page = self.find(sent, to_disk)?;
        self.moved = Instant::now();
        Some(page)
    }

    /// The next page of that kind that QEMU has not sent.
    fn find(&mut self, sent: &Bitmap, on_disk: bool) -> Option<u64> {
        let start = self.next[usize::from(on_disk)];
        let chunks = self.on_disk.len();
        for chunk in (start..chunks).chain(0..start) {
            if self.on_disk[chunk] != on_disk {
                continue;
            }
            let first = chunk as u64 * CHUNK;
            if let Some(page) = sent.first_absent(first, first + CHUNK) {
                self.next[usize::from(on_disk)] = chunk;
                return Some(page);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use transhume_protocol::link::HintRun;

    const PAGES: u64 = MINIMUM / PAGE_SIZE as u64;

    fn steer() -> ScanSteering {
        let block = |name: &str, length| Block {
            name: name.to_owned(),
            length,
        };
        let mut steer = ScanSteering::new(&[block("bios", 4096), block("pc.ram", MINIMUM)])
            .expect("large enough");
        assert_eq!(steer.block(), (1, "pc.ram"));
        // Chunks 2 and 3, and a little of 5.
        let run = |page, pages| HintRun {
            block: 1,
            page,
            pages,
            disk: 0,
            sector: 0,
        };
        steer.set_table(
            &HintTable::new(vec![
                run(2 * CHUNK, 512),
                run(5 * CHUNK, 100),
                run(PAGES - 1, u32::MAX),
            ]),
            true,
        );
        steer.moved = Instant::now().checked_sub(MOVE_INTERVAL).expect("a clock");
        steer
    }

    fn at(page: u64) -> PageKey {
        PageKey { block: 1, page }
    }

    #[test]
    fn a_dry_link_gets_what_no_disk_holds() {
        let mut sent = Bitmap::new(PAGES);
        (0..300).for_each(|page| {
            sent.insert(page);
        });
        let mut steer = steer();
        assert_eq!(
            steer.target(&sent, at(600), LinkDemand::Balanced, true),
            None
        );
        assert_eq!(
            steer.target(&sent, at(600), LinkDemand::Starved, true),
            Some(300)
        );
        // It has just moved.
        assert_eq!(
            steer.target(&sent, at(600), LinkDemand::Starved, true),
            None
        );
    }

    #[test]
    fn a_full_link_rests_while_disks_have_room() {
        let sent = Bitmap::new(PAGES);
        assert_eq!(
            steer().target(&sent, at(0), LinkDemand::Saturated, false),
            None
        );
        assert_eq!(
            steer().target(&sent, at(0), LinkDemand::Saturated, true),
            Some(2 * CHUNK)
        );
        let mut sent = Bitmap::new(PAGES);
        (2 * CHUNK..4 * CHUNK).for_each(|page| {
            sent.insert(page);
        });
        assert_eq!(
            steer().target(&sent, at(0), LinkDemand::Saturated, true),
            None
        );
    }

    #[test]
    fn what_nobody_named_yet_comes_later() {
        let sent = Bitmap::new(PAGES);
        let mut steer = steer();
        steer.whole = false;
        let known = 2 * CHUNK;
        assert_eq!(
            steer.target(&sent, at(known), LinkDemand::Starved, true),
            None
        );
        assert_eq!(
            steer.target(&sent, at(0), LinkDemand::Starved, true),
            Some(known)
        );
    }

    #[test]
    fn disks_without_room_leave_the_scan_to_the_link() {
        let sent = Bitmap::new(PAGES);
        assert_eq!(
            steer().target(&sent, at(3 * CHUNK), LinkDemand::Balanced, false),
            Some(0)
        );
        let elsewhere = PageKey { block: 0, page: 0 };
        assert_eq!(
            steer().target(&sent, elsewhere, LinkDemand::Saturated, true),
            None
        );
    }
}
