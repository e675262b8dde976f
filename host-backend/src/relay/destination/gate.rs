//! Processes of a VM in post-copy sleep where a whole CPU would stop: its agent is told which memory is absent,
//! and what arrives; and it says what is waited for, which is asked for at the source.
//!
//! All of it may fail, and nothing waits for it: without it, it is plain post-copy.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use transhume_protocol::agent::{FrameRun, GateCounts};
use transhume_protocol::qemu::return_path::Message;

use super::output::{Arrived, Output};
use super::placement::Placement;
use super::reply::Reply;
use crate::guest::{self, unusable};
use crate::hypervisor::Vm;
use crate::hypervisor::layout::{Layout, Region, main_memory_end};
use crate::pages::bitmap::Bitmap;
use crate::pages::{PAGE_SIZE, PageKey};

/// How long the agent may take to answer, from before the VM runs. It runs on memory that is partly absent itself.
const PATIENCE: Duration = Duration::from_secs(5);
/// Arrivals that somebody waits for are told this late at most, about.
const TICK: Duration = Duration::from_millis(3);
/// Other arrivals are told this late at most, since each time costs the guest's CPU.
const HOLD: Duration = Duration::from_millis(50);
/// Pages whose arrival is held back so, at most.
const MOST_HELD: u64 = 1024;
/// Frames between arrivals, none of them absent, that are told with them at most: to mark them as arrived costs the
/// guest less than one run more.
const GAP: u64 = 8192;
/// The agent lets everybody go when it hears nothing for a second.
const ALIVE: Duration = Duration::from_millis(200);
/// How long the last word of the agent is waited for.
const LAST_WORD: Duration = Duration::from_secs(3);
/// Absent runs that are told, at most. Those beyond them stop a CPU as ever.
const MOST_RUNS: usize = 1 << 18;
/// Pages that are asked for with one message, at most: what a huge page of the guest has.
const MOST_ASKED: u64 = 512;

/// A VM's RAM block, as far as this needs it.
pub(super) struct Block {
    pub(super) name: String,
    /// Pages that are missing.
    pub(super) missing: Bitmap,
    /// Pages that a process of the guest waits for.
    pub(super) wanted: Bitmap,
}

impl Block {
    pub(super) fn new(name: String, missing: Bitmap) -> Self {
        let wanted = Bitmap::new(missing.len());
        Self {
            name,
            missing,
            wanted,
        }
    }
}

/// Ends it when it is dropped.
pub(super) struct Gate {
    stop: Arc<AtomicBool>,
    /// What comes of it.
    counts: oneshot::Receiver<GateCounts>,
}

impl Gate {
    /// Ends it, and tells what came of it, if the agent says so in time.
    pub(super) async fn end(mut self, patience: Duration) -> Option<GateCounts> {
        self.stop.store(true, Ordering::Relaxed);
        let counts = tokio::time::timeout(patience, &mut self.counts).await;
        counts.ok()?.ok()
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Begins, if the VM has an agent; best before the VM runs.
pub(super) fn start(vm: Arc<Vm>, placement: Arc<Placement>, replies: mpsc::Sender<Reply>) -> Gate {
    let stop = Arc::new(AtomicBool::new(false));
    let (sender, counts) = oneshot::channel();
    let gate = Gate {
        stop: Arc::clone(&stop),
        counts,
    };
    tokio::spawn(async move {
        let layout = tokio::time::timeout(PATIENCE, Layout::read(vm.qmp())).await;
        let Ok(Ok(layout)) = layout else {
            tracing::info!(vm = vm.name(), "its memory's layout is not known: no gate");
            return;
        };
        let run = move || {
            let Some(socket) = vm.agent_socket() else {
                return;
            };
            let name = vm.name();
            match run(socket, layout.regions(), &placement, &replies, &stop) {
                Ok(Some(counts)) => {
                    tell(name, &counts);
                    let _ = sender.send(counts);
                }
                Ok(None) => {
                    tracing::info!(vm = name, "the agent does not say what came of its gate");
                }
                Err(reason) => tracing::info!(
                    vm = name,
                    reason,
                    "memory that is absent stops its CPUs, not only processes"
                ),
            }
        };
        let thread = std::thread::Builder::new().name("relay-gate".to_owned());
        if let Err(error) = thread.spawn(run) {
            tracing::warn!(%error, "a thread");
        }
    });
    gate
}

fn tell(vm: &str, counts: &GateCounts) {
    tracing::info!(
        vm,
        gated_pages = counts.gated,
        waits = counts.waits,
        waited_ms = counts.waited_us / 1000,
        longest_ms = counts.longest_us / 1000,
        passed = counts.passed,
        expired = counts.expired,
        absent_pages = counts.absent,
        cpu_ms = counts.cpu_us / 1000,
        "processes slept for memory that was absent"
    );
}

fn run(
    socket: &Path,
    regions: &[Region],
    placement: &Placement,
    replies: &mpsc::Sender<Reply>,
    stop: &AtomicBool,
) -> Result<Option<GateCounts>, String> {
    let began = Instant::now();
    let mut session = [0; 8];
    getrandom::fill(&mut session).map_err(|error| error.to_string())?;
    let blocks = loop {
        if let Some(blocks) = placement.watch() {
            break blocks;
        }
        if stop.load(Ordering::Relaxed) || began.elapsed() > PATIENCE {
            return Err("what is absent was not known in time".to_owned());
        }
        std::thread::sleep(TICK);
    };
    // The agent can be asleep: its VM may not run yet.
    let opening = guest::open(socket, u64::from_ne_bytes(session), PATIENCE)?;
    let _watch = Watch(&placement.output);
    let map = Map::new(regions, &blocks);
    let mut absent = Absent { blocks };
    let frames = main_memory_end(regions, PAGE_SIZE as u64);
    opening.gate(frames, &absent.runs(&map)).map_err(unusable)?;
    let mut left = absent.count(&map);
    let (mut agent, _) = opening.agreed(Vec::new(), PATIENCE)?;
    agent.set_tick(TICK).map_err(unusable)?;
    agent.gate_opened(PATIENCE)?;
    let after_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    tracing::info!(pages = left, after_ms, "the agent knows what is absent");
    let mut last = Instant::now();
    let mut held = Held::default();
    while left > 0 && !stop.load(Ordering::Relaxed) {
        let arrived = placement.output.arrived();
        for one in arrived {
            let (frames, was_wanted) = absent.take(&map, one);
            left -= frames.min(left);
            held.is_urgent |= was_wanted;
            map.frames(one, |run| held.add(run));
        }
        if held.is_due(last.elapsed()) {
            let there = |from, to| absent.is_there(&map, from, to);
            agent.name_arrived(&held.take(there)).map_err(unusable)?;
            last = Instant::now();
        } else if last.elapsed() > ALIVE {
            agent.stay().map_err(unusable)?;
            last = Instant::now();
        }
        let news = agent.gate_news().map_err(unusable)?;
        if news.over.is_some() {
            return Ok(news.over);
        }
        for run in news.wanted {
            map.pages(run, |wanted| {
                let asked = absent.ask(wanted);
                // It is there, and was only not told yet.
                held.is_urgent |= asked.is_none() && !held.runs.is_empty();
                if let Some((key, count)) = asked {
                    let name = &absent.blocks[usize::from(key.block)].name;
                    // The receiver ends only when the relay does.
                    let _ = replies.send(Reply::ReturnPath(request(name, key.page, count)));
                }
            });
        }
    }
    agent.close_gate(LAST_WORD).map_err(unusable)
}

/// Nothing is noted for nobody.
struct Watch<'a>(&'a Output);

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        self.0.unwatch();
    }
}

/// Arrivals that were not told yet.
#[derive(Default)]
struct Held {
    runs: Vec<FrameRun>,
    pages: u64,
    /// Somebody waits for some of them.
    is_urgent: bool,
}

impl Held {
    fn add(&mut self, run: FrameRun) {
        self.pages += run.pages;
        match self.runs.last_mut() {
            Some(last) if last.pfn + last.pages == run.pfn => last.pages += run.pages,
            _ => self.runs.push(run),
        }
    }

    /// Whether they are to be told, so long after the last time that something was.
    fn is_due(&self, since: Duration) -> bool {
        !self.runs.is_empty() && (self.is_urgent || self.pages >= MOST_HELD || since >= HOLD)
    }

    /// All of them, in order: as few runs as there can be. `is_there`: whether no frame of a range is absent.
    fn take(&mut self, is_there: impl Fn(u64, u64) -> bool) -> Vec<FrameRun> {
        let mut held = std::mem::take(self);
        held.runs.sort_unstable_by_key(|run| run.pfn);
        let mut joined: Vec<FrameRun> = Vec::new();
        for run in held.runs {
            match joined.last_mut() {
                Some(last) if is_there(last.pfn + last.pages, run.pfn) => {
                    last.pages = last.pages.max(run.pfn + run.pages - last.pfn);
                }
                _ => joined.push(run),
            }
        }
        joined
    }
}

fn request(block: &str, page: u64, count: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    let size = PAGE_SIZE as u64;
    Message::RequestPagesOf {
        block,
        offset: page * size,
        // MOST_ASKED pages at most.
        length: u32::try_from(count * size).unwrap_or(0),
    }
    .encode(&mut bytes);
    bytes
}

/// A stretch of page frames that a block backs.
struct Stretch {
    pfn: u64,
    pages: u64,
    block: u16,
    first: u64,
}

/// Which frames are which pages.
struct Map(Vec<Stretch>);

impl Map {
    fn new(regions: &[Region], blocks: &[Block]) -> Self {
        let size = PAGE_SIZE as u64;
        let stretch = |region: &Region| {
            let block = blocks.iter().position(|block| block.name == region.block)?;
            let aligned = [region.start, region.length, region.offset];
            aligned.iter().all(|at| at % size == 0).then_some(Stretch {
                pfn: region.start / size,
                pages: region.length / size,
                block: u16::try_from(block).ok()?,
                first: region.offset / size,
            })
        };
        Self(regions.iter().filter_map(stretch).collect())
    }

    /// The frames of pages.
    fn frames(&self, pages: Arrived, mut each: impl FnMut(FrameRun)) {
        let end = pages.page.saturating_add(u64::from(pages.count));
        for one in self.0.iter().filter(|one| one.block == pages.block) {
            let from = pages.page.max(one.first);
            let to = end.min(one.first.saturating_add(one.pages));
            if from < to {
                each(FrameRun {
                    pfn: one.pfn + (from - one.first),
                    pages: to - from,
                });
            }
        }
    }

    /// The pages of frames that a guest named: any numbers.
    fn pages(&self, run: FrameRun, mut each: impl FnMut((PageKey, u64))) {
        let end = run.pfn.saturating_add(run.pages.min(MOST_ASKED));
        for one in &self.0 {
            let from = run.pfn.max(one.pfn);
            let to = end.min(one.pfn.saturating_add(one.pages));
            if from < to {
                let key = PageKey {
                    block: one.block,
                    page: one.first + (from - one.pfn),
                };
                each((key, to - from));
            }
        }
    }
}

/// What was missing when it began and has neither come nor been asked for since.
struct Absent {
    blocks: Vec<Block>,
}

impl Absent {
    /// Visits the missing pages of each stretch, as runs.
    fn visit(&self, map: &Map, mut each: impl FnMut(FrameRun)) {
        for one in &map.0 {
            let missing = &self.blocks[usize::from(one.block)].missing;
            let end = one.first.saturating_add(one.pages).min(missing.len());
            let mut page = one.first;
            while let Some(first) = missing.first_present(page, end) {
                page = missing.first_absent(first, end).unwrap_or(end);
                each(FrameRun {
                    pfn: one.pfn + (first - one.first),
                    pages: page - first,
                });
            }
        }
    }

    fn runs(&self, map: &Map) -> Vec<FrameRun> {
        let mut runs = Vec::new();
        self.visit(map, |run| {
            if runs.len() < MOST_RUNS {
                runs.push(run);
            }
        });
        runs
    }

    fn count(&self, map: &Map) -> u64 {
        let mut pages = 0;
        self.visit(map, |run| pages += run.pages);
        pages
    }

    /// Pages have come; how many frames were absent until now, and whether one of them was waited for.
    fn take(&mut self, map: &Map, arrived: Arrived) -> (u64, bool) {
        let (mut frames, mut was_wanted) = (0, false);
        let Some(block) = self.blocks.get_mut(usize::from(arrived.block)) else {
            return (0, false);
        };
        let end = arrived.page.saturating_add(u64::from(arrived.count));
        for page in arrived.page..end {
            was_wanted |= block.wanted.remove(page);
            if block.missing.remove(page) {
                let one = Arrived {
                    page,
                    count: 1,
                    ..arrived
                };
                map.frames(one, |run| frames += run.pages);
            }
        }
        (frames, was_wanted)
    }

    /// Whether a short range of frames is memory, and none of it absent.
    fn is_there(&self, map: &Map, from: u64, to: u64) -> bool {
        if from >= to {
            return true;
        }
        let pages = to - from;
        pages <= GAP
            && map.0.iter().any(|one| {
                let missing = &self.blocks[usize::from(one.block)].missing;
                let first = from.checked_sub(one.pfn).map(|at| one.first + at);
                first.is_some_and(|first| {
                    to <= one.pfn.saturating_add(one.pages)
                        && missing.first_present(first, first + pages).is_none()
                })
            })
    }

    /// What is to be asked for of pages that somebody waits for: those that are still absent. QEMU asks for a
    /// page more than once, too, but only when it has to.
    fn ask(&mut self, (key, count): (PageKey, u64)) -> Option<(PageKey, u64)> {
        let Block {
            missing, wanted, ..
        } = self.blocks.get_mut(usize::from(key.block))?;
        let end = key.page.saturating_add(count);
        let first = missing.first_present(key.page, end)?;
        let end = missing.first_absent(first, end).unwrap_or(end);
        wanted.insert_run(first, end - first);
        let block = key.block;
        Some((PageKey { block, page: first }, end - first))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(start: u64, pages: u64, block: &str, offset: u64) -> Region {
        Region {
            start: start * 4096,
            length: pages * 4096,
            block: block.to_owned(),
            offset: offset * 4096,
        }
    }

    fn absent(missing: &[u64]) -> Absent {
        let mut ram = Bitmap::new(64);
        for &page in missing {
            ram.insert(page);
        }
        let block = |name: &str, missing| Block::new(name.to_owned(), missing);
        Absent {
            blocks: vec![block("vga.vram", Bitmap::new(8)), block("pc.ram", ram)],
        }
    }

    fn apart(from: u64, to: u64) -> bool {
        from >= to
    }

    fn arrived(page: u64, count: u32) -> Arrived {
        Arrived {
            block: 1,
            page,
            count,
        }
    }

    #[test]
    fn pages_are_frames_below_and_above_the_hole() {
        let regions = [
            region(0, 32, "pc.ram", 0),
            region(48, 8, "vga.vram", 0),
            region(100, 32, "pc.ram", 32),
            region(200, 1, "nobody's", 0),
        ];
        assert_eq!(main_memory_end(&regions, 4096), 132);
        assert_eq!(main_memory_end(&[], 4096), 0);
        let mut absent = absent(&[3, 4, 31, 32, 40]);
        let map = Map::new(&regions, &absent.blocks);
        let run = |pfn, pages| FrameRun { pfn, pages };
        assert_eq!(
            absent.runs(&map),
            [run(3, 2), run(31, 1), run(100, 1), run(108, 1)]
        );
        assert_eq!(absent.count(&map), 5);

        let mut held = Held::default();
        map.frames(arrived(30, 4), |run| held.add(run));
        assert_eq!(held.take(apart), [run(30, 2), run(100, 2)]);
        assert_eq!(absent.take(&map, arrived(30, 4)), (2, false));
        assert_eq!(absent.take(&map, arrived(30, 4)), (0, false));
        assert_eq!(absent.take(&map, arrived(63, 9)), (0, false));
        assert_eq!(absent.count(&map), 3);
        let page = |page| (PageKey { block: 1, page }, 1);
        assert_eq!(absent.ask(page(40)), Some(page(40)));
        assert_eq!(absent.take(&map, arrived(40, 1)), (1, true));
        assert_eq!(absent.take(&map, arrived(40, 1)), (0, false));
        assert_eq!(absent.ask(page(40)), None);
    }

    #[test]
    fn arrivals_are_held_until_there_are_some_or_somebody_waits() {
        let run = |pfn, pages| FrameRun { pfn, pages };
        let mut held = Held::default();
        assert!(!held.is_due(HOLD));
        held.is_urgent = true;
        assert!(!held.is_due(HOLD), "there is nothing to tell");
        held.add(run(9, 1));
        assert!(held.is_due(Duration::ZERO));
        assert_eq!(held.take(apart), [run(9, 1)]);
        for pfn in [7, 3, 4, 1, 8, 2] {
            held.add(run(pfn, 1));
        }
        assert!(held.is_due(HOLD) && !held.is_due(Duration::ZERO));
        assert_eq!(held.take(apart), [run(1, 4), run(7, 2)]);
        held.add(run(0, MOST_HELD));
        assert!(held.is_due(Duration::ZERO));
    }

    #[test]
    fn what_is_between_arrivals_and_there_is_told_with_them() {
        let regions = [region(0, 32, "pc.ram", 0), region(40, 32, "pc.ram", 32)];
        let mut absent = absent(&[3, 9, 20, 31, 32]);
        let map = Map::new(&regions, &absent.blocks);
        let run = |pfn, pages| FrameRun { pfn, pages };
        let mut held = Held::default();
        for page in [32, 3, 20, 31] {
            absent.take(&map, arrived(page, 1));
            map.frames(arrived(page, 1), |run| held.add(run));
        }
        // 9 is absent still, and from 32 to 39 there is no memory.
        let there = |from, to| absent.is_there(&map, from, to);
        assert_eq!(held.take(there), [run(3, 1), run(20, 12), run(40, 1)]);
        assert!(!absent.is_there(&map, 0, u64::MAX));
    }

    #[test]
    fn a_guest_is_given_only_what_is_absent() {
        let regions = [region(0, 32, "pc.ram", 0), region(100, 32, "pc.ram", 32)];
        let mut absent = absent(&[3, 4, 5, 40]);
        let map = Map::new(&regions, &absent.blocks);
        let mut ask = |pfn, pages| {
            let mut asked = Vec::new();
            map.pages(FrameRun { pfn, pages }, |wanted| {
                asked.extend(absent.ask(wanted).map(|(key, count)| (key.page, count)));
            });
            asked
        };
        assert_eq!(ask(0, 32), [(3, 3)]);
        assert_eq!(ask(4, 1), [(4, 1)]);
        assert_eq!(ask(6, 90), []);
        assert_eq!(ask(108, u64::MAX), [(40, 1)]);
        assert_eq!(ask(u64::MAX, u64::MAX), []);
        assert_eq!(ask(0, 512), [(3, 3), (40, 1)]);
        let bytes = request("pc.ram", 3, 2);
        let (message, length) = Message::decode(&bytes).unwrap().unwrap();
        assert_eq!(length, bytes.len());
        let block = "pc.ram";
        assert_eq!(
            message,
            Message::RequestPagesOf {
                block,
                offset: 3 * 4096,
                length: 2 * 4096
            }
        );
    }
}
