//! In which order memory goes in post-copy: what the guest cannot do without first.
//!
//! Near the end of the first scan the guest is asked. What it names as its kernel's and has written meanwhile is
//! requested from QEMU before the VM goes over, as a destination in post-copy requests pages (see
//! [`scan_steering`](super::scan_steering)). Afterwards the relay knows by what the destination is to forget which pages QEMU
//! owes, and requests of them what is named: near the pages that the guest waits for, then by class. QEMU serves
//! requests in the order in which they come, so few are under way at a time: the guest's own must not stand behind
//! them.
//!
//! Nothing a guest says is believed: whatever it names, all pages come, each once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use transhume_protocol::agent::MemoryClass;
use transhume_protocol::memory::{Block, PageRequest};

use super::frame_map::Frames;
use pending_pages::{PendingPages, Run};
use transhume_api::migration::Classes;
use transhume_guest::MemoryOrder;
use transhume_pages::bitmap::Bitmap;
use transhume_pages::{PAGE_SIZE, PageKey};

mod pending_pages;

/// The guest looks at what is touched from so long before the end of the first scan on.
const WATCH_BEFORE: Duration = Duration::from_secs(1);
/// And for so long at least.
const MIN_WATCH: Duration = Duration::from_millis(300);
/// How long it may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// How long the kernel's pages may take. The guest runs on meanwhile.
const KERNEL_TIMEOUT: Duration = Duration::from_secs(2);
/// So many bytes may be between QEMU and us: its socket's buffer, and its own. What comes behind them was chosen by a
/// QEMU that knew of our requests.
const ON_THE_WAY: u64 = 5 << 20;
/// Requests of the kernel's pages, at most; QEMU keeps each of them.
const MAX_REQUESTS: usize = 8192;
/// The kernel's runs with fewer pages between them are requested as one.
const GAP: u64 = 16;
/// How often each page may be named, on average: beyond that nothing counts.
const MAX_NAMED: u64 = 4;
/// What is under way after the switch: this time of the link, and what QEMU's narrowed socket holds, in pages.
const AHEAD: Duration = Duration::from_millis(2);
const IN_SOCKET: u64 = 24;
const MAX_AHEAD: u64 = 256;

/// What the listener is to ask the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Question {
    Watch,
    Order,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Stage {
    /// Nothing was asked.
    #[default]
    Before,
    /// The guest watches.
    Watching(Instant),
    /// It was asked.
    Asked(Instant),
    /// The kernel's pages were requested; what QEMU sends behind so many bytes of its stream shows whether it has
    /// sent them.
    Kernel { since: Instant, behind: u64 },
    /// The VM can go over.
    Ready,
}

#[derive(Default)]
struct State {
    stage: Stage,
    question: Option<Question>,
    is_attended: bool,
    blocks: Vec<Block>,
    answer: Option<MemoryOrder>,
    /// The kernel's pages, a bitmap a block, until the VM goes over.
    kernel: Vec<Bitmap>,
    owed: PendingPages,
}

/// See the module.
#[derive(Default)]
pub(crate) struct Prefetch {
    frames: Arc<Frames>,
    /// No page frame number reaches this. `None` if the VM will not go over to post-copy.
    end: Option<u64>,
    /// Pages of the stream show how far it is.
    looks_at_pages: AtomicBool,
    state: Mutex<State>,
}

impl Prefetch {
    pub(crate) fn new(frames: Arc<Frames>, end: Option<u64>) -> Self {
        Self {
            frames,
            end,
            ..Self::default()
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What no page frame number reaches, if the VM will go over to post-copy.
    pub(crate) fn end(&self) -> Option<u64> {
        self.end
    }

    /// Whether somebody passes questions on to the guest.
    pub(crate) fn attend(&self, is_attended: bool) {
        self.lock().is_attended = is_attended;
    }

    /// What the guest is to be asked now.
    pub(crate) fn take_question(&self) -> Option<Question> {
        self.lock().question.take()
    }

    /// Takes the guest's answer, and returns what it comes to.
    pub(crate) fn answer(&self, answer: MemoryOrder) -> Classes {
        let classes = classes(&answer);
        let mut state = self.lock();
        // One that comes too late could be about another moment.
        if matches!(state.stage, Stage::Asked(_)) {
            state.answer = Some(answer);
        }
        classes
    }

    /// Takes QEMU's table of blocks.
    pub(crate) fn set_blocks(&self, blocks: &[Block]) {
        let mut state = self.lock();
        state.blocks = blocks.to_vec();
        state.owed = PendingPages::new(blocks, Vec::new());
    }

    /// Goes on with what is to be done before the VM goes over. `left`: how long the first scan still takes, nothing
    /// when it is over. `stream`: bytes of QEMU's stream that came. Returns whether all is done, and what is to be
    /// asked for.
    pub(crate) fn prepare(&self, left: Duration, stream: u64) -> (bool, Option<Vec<PageRequest>>) {
        let mut state = self.lock();
        let now = Instant::now();
        let mut said = None;
        match state.stage {
            // Nobody can be asked now.
            _ if !state.is_attended => {}
            Stage::Before if left <= WATCH_BEFORE => {
                state.question = Some(Question::Watch);
                state.stage = Stage::Watching(now);
            }
            Stage::Watching(since) if left.is_zero() && now - since >= MIN_WATCH => {
                state.question = Some(Question::Order);
                state.stage = Stage::Asked(now);
            }
            Stage::Asked(since) => {
                if let Some(answer) = state.answer.take() {
                    let requests = self.take_order(&mut state, &answer);
                    let behind = stream.saturating_add(ON_THE_WAY);
                    state.stage = Stage::Kernel { since: now, behind };
                    self.looks_at_pages.store(true, Ordering::Relaxed);
                    said = Some(requests);
                } else if now - since >= ANSWER_TIMEOUT {
                    state.stage = Stage::Ready;
                }
            }
            Stage::Kernel { since, .. } if now - since >= KERNEL_TIMEOUT => {
                state.stage = Stage::Ready;
            }
            _ => {}
        }
        let is_ready = state.stage == Stage::Ready || !state.is_attended;
        if is_ready {
            self.looks_at_pages.store(false, Ordering::Relaxed);
            state.kernel = Vec::new();
        }
        (is_ready, said)
    }

    /// Notes what the guest named, and returns the requests for the kernel's pages.
    fn take_order(&self, state: &mut State, answer: &MemoryOrder) -> Vec<PageRequest> {
        let mut list = Vec::with_capacity(answer.runs.len());
        let mut kernel = Vec::new();
        let pages = |block: &Block| block.length / PAGE_SIZE as u64;
        let mut room = MAX_NAMED * state.blocks.iter().map(pages).sum::<u64>();
        for &(class, run) in &answer.runs {
            let pieces = self.frames.pieces(run, &state.blocks).map(|piece| Run {
                block: piece.block,
                page: piece.page,
                pages: piece.pages,
            });
            let before = list.len();
            list.extend(pieces);
            let named: u64 = list[before..].iter().map(|run| run.pages).sum();
            if named > room {
                list.truncate(before);
                break;
            }
            room -= named;
            if class == MemoryClass::Kernel {
                kernel.extend_from_slice(&list[before..]);
            }
        }
        state.owed = PendingPages::new(&state.blocks, list);
        let kernel = joined(kernel);
        let bitmap = |block: &Block| Bitmap::new(block.length / PAGE_SIZE as u64);
        state.kernel = state.blocks.iter().map(bitmap).collect();
        for run in &kernel {
            if let Some(set) = state.kernel.get_mut(usize::from(run.block)) {
                set.insert_run(run.page, run.pages);
            }
        }
        requests(&kernel, &state.blocks)
    }

    /// Takes a page of the stream before the VM goes over; whether it is one of the kernel's that were requested.
    /// `stream`: bytes of the stream that came.
    pub(crate) fn passes(&self, key: PageKey, stream: u64) -> bool {
        if !self.looks_at_pages.load(Ordering::Relaxed) {
            return false;
        }
        let mut state = self.lock();
        let Stage::Kernel { behind, .. } = state.stage else {
            return false;
        };
        let kernel = state.kernel.get(usize::from(key.block));
        if kernel.is_some_and(|kernel| kernel.contains(key.page)) {
            return true;
        }
        // Whatever was requested goes ahead of what was not.
        if stream > behind {
            state.stage = Stage::Ready;
        }
        false
    }

    /// QEMU owes these pages: the destination is to forget them.
    pub(crate) fn owe(&self, block: u16, page: u64, count: u64) {
        self.lock().owed.add(block, page, count);
    }

    /// A page has come after the switch; whether it was asked for by us.
    pub(crate) fn came(&self, key: PageKey) -> bool {
        self.lock().owed.came(key)
    }

    /// The guest waits for pages of a block; the first of them.
    pub(crate) fn waits_for(&self, block: &str, offset: u64) -> Option<PageKey> {
        let mut state = self.lock();
        let number = state.blocks.iter().position(|known| known.name == block)?;
        let key = PageKey {
            block: u16::try_from(number).ok()?,
            page: offset / PAGE_SIZE as u64,
        };
        state.owed.waits_for(key);
        Some(key)
    }

    /// What is to be asked for after the switch, if anything is. `rate`: of the link, in bytes a second.
    pub(crate) fn next(&self, rate: f64) -> Option<Vec<PageRequest>> {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "clamped"
        )]
        let ahead =
            (rate * AHEAD.as_secs_f64() / PAGE_SIZE as f64).clamp(1.0, MAX_AHEAD as f64) as u64;
        let mut state = self.lock();
        let runs = state.owed.next(ahead + IN_SOCKET);
        (!runs.is_empty()).then(|| requests(&runs, &state.blocks))
    }
}

/// Runs of one block with little between them as one, so many of them as QEMU is to keep.
fn joined(mut runs: Vec<Run>) -> Vec<Run> {
    runs.sort_unstable();
    let mut joined: Vec<Run> = Vec::new();
    for run in runs {
        match joined.last_mut() {
            Some(last) if last.block == run.block && run.page <= last.page + last.pages + GAP => {
                last.pages = last.pages.max(run.page + run.pages - last.page);
            }
            _ => joined.push(run),
        }
    }
    joined.truncate(MAX_REQUESTS);
    joined
}

fn requests(runs: &[Run], blocks: &[Block]) -> Vec<PageRequest> {
    let request = |run: &Run| {
        let block = blocks.get(usize::from(run.block))?;
        Some(PageRequest {
            block: block.name.clone(),
            page: run.page,
            count: run.pages,
        })
    };
    runs.iter().filter_map(request).collect()
}

fn classes(answer: &MemoryOrder) -> Classes {
    let working_sets = answer
        .runs
        .iter()
        .filter(|(class, _)| matches!(class, MemoryClass::WorkingSet(_)));
    let counts = answer.counts;
    Classes {
        kernel: counts.kernel,
        slab: counts.slab,
        page_tables: counts.page_tables,
        anonymous: counts.anonymous,
        clean_file: counts.clean_file,
        dirty_file: counts.dirty_file,
        free: counts.free,
        other: counts.other,
        working_sets: working_sets.fold(0, |sum, (_, run)| sum.saturating_add(run.pages)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use transhume_machine::memory_layout::Region;
    use transhume_protocol::agent::{ClassCounts, FrameRun};

    const PAGES: u64 = 1000;

    fn order() -> Prefetch {
        let region = Region {
            start: 0,
            length: PAGES * PAGE_SIZE as u64,
            block: "pc.ram".to_owned(),
            offset: 0,
        };
        let order = Prefetch::new(Arc::new(Frames::new(vec![region])), Some(PAGES));
        order.set_blocks(&[Block {
            name: "pc.ram".to_owned(),
            length: PAGES * PAGE_SIZE as u64,
        }]);
        order
    }

    #[test]
    fn who_names_all_memory_many_times_is_not_heard_to_the_end() {
        let order = order();
        let all = FrameRun {
            pfn: 0,
            pages: u64::MAX,
        };
        let answer = MemoryOrder {
            runs: vec![(MemoryClass::Kernel, all); 1 << 18],
            counts: ClassCounts::default(),
        };
        let mut state = order.lock();
        let requests = order.take_order(&mut state, &answer);
        assert_eq!(decoded(&requests), [(0, PAGES)]);
        assert_eq!(state.owed.listed_pages(), MAX_NAMED * PAGES);
    }

    fn key(page: u64) -> PageKey {
        PageKey { block: 0, page }
    }

    /// First page and length in pages of each request.
    fn decoded(said: &[PageRequest]) -> Vec<(u64, u64)> {
        let one = |request: &PageRequest| {
            assert_eq!(request.block, "pc.ram");
            (request.page, request.count)
        };
        said.iter().map(one).collect()
    }

    fn answer(runs: &[(MemoryClass, u64, u64)]) -> MemoryOrder {
        let runs = runs
            .iter()
            .map(|&(class, pfn, pages)| (class, FrameRun { pfn, pages }));
        MemoryOrder {
            runs: runs.collect(),
            counts: ClassCounts::default(),
        }
    }

    fn ago(duration: Duration) -> Instant {
        Instant::now().checked_sub(duration).expect("a clock")
    }

    #[test]
    fn a_guest_without_an_agent_keeps_nobody_waiting() {
        assert_eq!(order().prepare(Duration::from_secs(9), 0), (true, None));
    }

    #[test]
    fn the_guest_is_asked_and_the_kernel_goes_first() {
        let order = order();
        order.attend(true);
        assert_eq!(order.prepare(Duration::from_secs(9), 0), (false, None));
        assert_eq!(order.take_question(), None);
        assert_eq!(order.prepare(WATCH_BEFORE, 0), (false, None));
        assert_eq!(order.take_question(), Some(Question::Watch));
        order.answer(answer(&[(MemoryClass::Kernel, 0, 9)]));
        order.lock().stage = Stage::Watching(ago(MIN_WATCH));
        assert_eq!(order.prepare(Duration::ZERO, 0), (false, None));
        assert_eq!(order.take_question(), Some(Question::Order));
        assert_eq!(order.take_question(), None);
        assert_eq!(order.prepare(Duration::ZERO, 0), (false, None));
        let classes = order.answer(answer(&[
            (MemoryClass::Kernel, 20, 3),
            (MemoryClass::Kernel, 27, 1),
            (MemoryClass::Kernel, 998, 50),
            (MemoryClass::WorkingSet(0), 500, 30),
        ]));
        assert_eq!(classes.working_sets, 30);
        let (ready, said) = order.prepare(Duration::ZERO, 100);
        assert!(!ready);
        let said = decoded(&said.expect("requests"));
        assert_eq!(said, [(20, 8), (998, 2)]);

        assert!(!order.passes(key(500), 100), "QEMU sent it before");
        assert!(order.passes(key(21), 100 + ON_THE_WAY + 1));
        assert_eq!(order.prepare(Duration::ZERO, 0), (false, None));
        assert!(!order.passes(key(500), 100 + ON_THE_WAY + 1));
        assert_eq!(order.prepare(Duration::ZERO, 0), (true, None));
        assert!(!order.passes(key(21), u64::MAX), "nobody looks any more");

        order.owe(0, 0, 510);
        assert_eq!(
            decoded(&order.next(0.0).expect("requests")),
            [(20, 3), (27, 1), (500, 10)]
        );
        assert_eq!(order.next(1e12), None);
        assert!(order.came(key(500)) && !order.came(key(499)));
    }

    #[test]
    fn nobody_waits_for_long() {
        let order = order();
        order.attend(true);
        order.lock().stage = Stage::Asked(ago(ANSWER_TIMEOUT));
        assert_eq!(order.prepare(Duration::ZERO, 0), (true, None));
        let since = ago(KERNEL_TIMEOUT);
        order.lock().stage = Stage::Kernel { since, behind: 9 };
        assert_eq!(order.prepare(Duration::ZERO, 0), (true, None));
    }

    #[test]
    fn a_page_that_the_guest_waits_for_is_not_asked_for_by_us() {
        let order = order();
        order.attend(true);
        order.lock().stage = Stage::Asked(Instant::now());
        order.answer(answer(&[(MemoryClass::WorkingSet(3), 0, 100)]));
        order.prepare(Duration::ZERO, 0);
        order.owe(0, 0, PAGES);
        order.waits_for("pc.ram", 90 * PAGE_SIZE as u64 + 5);
        order.waits_for("elsewhere", 0);
        let said = decoded(&order.next(0.0).expect("requests"));
        assert_eq!(said, [(58, 25)]);
    }

    #[test]
    fn of_too_many_runs_some_are_left_out() {
        let many = (0..MAX_REQUESTS as u64 * 2).map(|n| Run {
            block: 0,
            page: n * 100,
            pages: 1,
        });
        assert_eq!(joined(many.collect()).len(), MAX_REQUESTS);
    }
}
