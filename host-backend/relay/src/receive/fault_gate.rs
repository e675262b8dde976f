//! Processes of a VM in post-copy sleep where a whole CPU would stop: its agent is told which memory is absent,
//! and what arrives; and it says what is waited for, which is asked for at the source.
//!
//! All of it may fail, and nothing waits for it: without it, it is plain post-copy.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use transhume_protocol::agent::GateCounts;
use transhume_protocol::memory::PageRequest;

use super::missing_pages::AbsentBlock;
use super::output::{Arrived, Output};
use super::placement::Placement;
use super::replies::{Replies, Reply};
use absent_frames::{Absent, Held, Map};
use transhume_guest::{self as guest, Agent, ClockSet, ClockSetter, Known, MovedGuest, unusable};
use transhume_machine::memory_layout::{Region, main_memory_end};
use transhume_pages::PAGE_SIZE;

mod absent_frames;

/// How long the agent may take to answer, from before the VM runs, until it is asked anew. It runs on memory that is partly
/// absent itself.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Arrivals that somebody waits for are told this late at most, about.
const TICK: Duration = Duration::from_millis(3);
/// The agent lets everybody go when it hears nothing for a second.
const ALIVE: Duration = Duration::from_millis(200);
/// How long the last word of the agent is waited for.
const LAST_WORD: Duration = Duration::from_secs(3);
/// How often one gate is opened, at most, where it is over because the agent stood still.
const MAX_OPENED: u32 = 8;

/// What a gate and its thread tell one another.
#[derive(Default)]
struct Flags {
    /// It is to end.
    stop: AtomicBool,
    /// The agent has opened it, so there is something to be told of it.
    is_open: AtomicBool,
}

impl Flags {
    fn stops(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// Ends it when it is dropped.
pub(crate) struct Gate {
    flags: Arc<Flags>,
    /// What comes of it.
    counts: oneshot::Receiver<GateCounts>,
}

impl Gate {
    /// Ends it, and tells what came of it, if the agent says so in time.
    pub(crate) async fn end(mut self, patience: Duration) -> Option<GateCounts> {
        self.flags.stop.store(true, Ordering::Relaxed);
        if !self.flags.is_open.load(Ordering::Relaxed) {
            return None;
        }
        let counts = tokio::time::timeout(patience, &mut self.counts).await;
        counts.ok()?.ok()
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.flags.stop.store(true, Ordering::Relaxed);
    }
}

/// What a gate needs to know.
pub(crate) struct Setting {
    pub(crate) guest: MovedGuest,
    pub(crate) placement: Arc<Placement>,
    pub(crate) replies: Arc<Replies>,
    /// See [`MovedGuest::greet`].
    pub(crate) clock: Option<Known>,
    /// Makes a message to the source's hypervisor of requests.
    pub(crate) page_requests: fn(&[PageRequest]) -> Vec<u8>,
}

/// Begins, if the VM has an agent; best before the VM runs. `layout`: what its hypervisor says of its memory.
pub(crate) fn start(
    setting: Setting,
    layout: impl Future<Output = Option<Vec<Region>>> + Send + 'static,
) -> Gate {
    let flags = Arc::<Flags>::default();
    let (sender, counts) = oneshot::channel();
    let gate = Gate {
        flags: Arc::clone(&flags),
        counts,
    };
    transhume_base::task::spawn(async move {
        let layout = tokio::time::timeout(TIMEOUT, layout).await;
        let Ok(Some(regions)) = layout else {
            let vm = &setting.guest.vm;
            tracing::info!(vm, "its memory's layout is not known: no gate");
            return;
        };
        let run = move || {
            if let Some(socket) = &setting.guest.socket {
                attend(socket, &regions, &setting, &flags, sender);
                // If that was not done while there was a gate.
                setting.guest.set_clock_right();
            }
        };
        if let Err(error) = transhume_base::task::thread("relay-gate", run) {
            tracing::warn!(%error, "a thread");
        }
    });
    gate
}

/// Keeps the gate from its beginning to its end, and tells what came of it.
fn attend(
    socket: &Path,
    regions: &[Region],
    setting: &Setting,
    flags: &Flags,
    counts: oneshot::Sender<GateCounts>,
) {
    let vm = &setting.guest.vm;
    let was_set = |set| setting.guest.clock_was_set(set);
    let mut clock = GuestClock {
        expected: setting.clock,
        was_set: &was_set,
    };
    let once = || run(socket, regions, setting, flags, &mut clock);
    match open_with_retry(vm, flags, TIMEOUT, once) {
        Ok(Some(told)) => {
            log_counts(vm, &told);
            let _ = counts.send(told);
        }
        Ok(None) => {
            tracing::info!(vm, "the agent does not say what came of its gate");
        }
        Err(reason) => tracing::info!(
            vm,
            reason,
            "memory that is absent stops its CPUs, not only processes"
        ),
    }
}

/// The guest's clock, until it is set right.
struct GuestClock<'a> {
    /// See [`MovedGuest::greet`].
    expected: Option<Known>,
    /// Hears what became of it.
    was_set: &'a dyn Fn(ClockSet),
}

impl GuestClock<'_> {
    fn begin(&self, agent: &mut Agent) {
        if let Some(expected) = self.expected {
            agent.begin_clock(ClockSetter::new(expected));
        }
    }

    fn took(&mut self, set: Option<ClockSet>) {
        if let Some(set) = set {
            (self.was_set)(set);
            self.expected = None;
        }
    }
}

fn log_counts(vm: &str, counts: &GateCounts) {
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

/// Tries until there is a gate, or the agent refuses, which it does at once. One that is silent for `patience` may wait for
/// memory that is absent itself.
fn open_with_retry<T>(
    vm: &str,
    flags: &Flags,
    patience: Duration,
    mut once: impl FnMut() -> Result<T, String>,
) -> Result<T, String> {
    let mut is_said = false;
    loop {
        let began = Instant::now();
        let reason = match once() {
            Ok(done) => return Ok(done),
            Err(reason) => reason,
        };
        if began.elapsed() < patience || flags.stops() {
            return Err(reason);
        }
        if !is_said {
            tracing::info!(
                vm,
                reason,
                "the agent does not put processes to sleep yet: it is asked again"
            );
            is_said = true;
        }
    }
}

fn run(
    socket: &Path,
    regions: &[Region],
    setting: &Setting,
    flags: &Flags,
    clock: &mut GuestClock<'_>,
) -> Result<Option<GateCounts>, String> {
    let Setting {
        placement,
        replies,
        page_requests,
        ..
    } = setting;
    let began = Instant::now();
    let blocks = loop {
        if let Some(blocks) = placement.watch() {
            break blocks;
        }
        if flags.stops() || began.elapsed() > TIMEOUT {
            return Err("what is absent was not known in time".to_owned());
        }
        std::thread::sleep(TICK);
    };
    let _watch = Watch(&placement.output);
    let arrived = || placement.output.arrived();
    let ask = |block: &str, page, count| {
        // Where the link is away QEMU asks for it when a CPU stands there.
        if replies.has_room() {
            replies.send(Reply::ReturnPath(page_requests(&[PageRequest {
                block: block.to_owned(),
                page,
                count,
            }])));
        }
    };
    serve_gate(socket, regions, blocks, flags, clock, arrived, ask)
}

/// Keeps the agent's gate until nothing is absent, and returns what came of it. `arrived`: what has come since it was
/// called last; `ask` asks for pages of a block.
fn serve_gate(
    socket: &Path,
    regions: &[Region],
    blocks: Vec<AbsentBlock>,
    flags: &Flags,
    clock: &mut GuestClock<'_>,
    mut arrived: impl FnMut() -> Vec<Arrived>,
    mut ask: impl FnMut(&str, u64, u64),
) -> Result<Option<GateCounts>, String> {
    let began = Instant::now();
    let mut session = [0; 8];
    getrandom::fill(&mut session).map_err(|error| error.to_string())?;
    // The agent can be asleep: its VM may not run yet.
    let opening = guest::open(socket, u64::from_ne_bytes(session), TIMEOUT)?;
    let map = Map::new(regions, &blocks);
    let mut told = Told::new(&map, Absent { blocks });
    let frames = main_memory_end(regions, PAGE_SIZE as u64);
    opening
        .gate(frames, &told.absent.runs(&map))
        .map_err(unusable)?;
    let (mut agent, _) = opening.agreed(Vec::new(), TIMEOUT)?;
    agent.set_tick(TICK).map_err(unusable)?;
    agent.gate_opened(TIMEOUT)?;
    clock.begin(&mut agent);
    flags.is_open.store(true, Ordering::Relaxed);
    let after_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    tracing::info!(
        pages = told.left,
        after_ms,
        "the agent knows what is absent"
    );
    let mut all = None;
    for times in 1.. {
        let over = told.follow(&mut agent, flags, clock, &mut arrived, &mut ask);
        // It may have been set while the gate was closed.
        clock.took(agent.take_clock_set());
        let over = over.map_err(unusable)?;
        all = sum(all, over);
        let expired = over.is_some_and(|over| over.expired);
        if !expired || times == MAX_OPENED || told.left == 0 || flags.stops() {
            break;
        }
        tracing::info!(
            pages = told.left,
            "the agent stood still for too long: it is told again"
        );
        let opened = agent.gate(frames, &told.absent.runs(&map));
        let opened = opened.map_err(unusable);
        let opened = opened.and_then(|()| agent.gate_opened(TIMEOUT));
        clock.took(agent.take_clock_set());
        if let Err(reason) = opened {
            tracing::info!(reason, "its processes do not sleep any more");
            break;
        }
    }
    Ok(all)
}

/// What came of a gate and of the next one.
fn sum(all: Option<GateCounts>, next: Option<GateCounts>) -> Option<GateCounts> {
    let (Some(all), Some(next)) = (all, next) else {
        return all.or(next);
    };
    Some(GateCounts {
        expired: next.expired,
        gated: all.gated.saturating_add(next.gated),
        waits: all.waits.saturating_add(next.waits),
        interrupted: all.interrupted.saturating_add(next.interrupted),
        passed: all.passed.saturating_add(next.passed),
        waited_us: all.waited_us.saturating_add(next.waited_us),
        longest_us: all.longest_us.max(next.longest_us),
        absent: all.absent.max(next.absent),
        cpu_us: all.cpu_us.saturating_add(next.cpu_us),
    })
}

/// What the agent was told, and what is to be told.
struct Told<'a> {
    map: &'a Map,
    absent: Absent,
    /// Frames that are absent.
    left: u64,
    held: Held,
}

impl<'a> Told<'a> {
    fn new(map: &'a Map, absent: Absent) -> Self {
        let left = absent.count(map);
        Self {
            map,
            absent,
            left,
            held: Held::default(),
        }
    }

    /// Tells what arrives, and asks for what is waited for, until nothing is absent, or the gate is over by itself.
    /// Returns what came of it.
    fn follow(
        &mut self,
        agent: &mut Agent,
        flags: &Flags,
        clock: &mut GuestClock<'_>,
        mut arrived: impl FnMut() -> Vec<Arrived>,
        mut ask: impl FnMut(&str, u64, u64),
    ) -> io::Result<Option<GateCounts>> {
        let Self {
            map,
            absent,
            left,
            held,
        } = self;
        let mut last = Instant::now();
        while *left > 0 && !flags.stops() {
            for one in arrived() {
                let (frames, was_wanted) = absent.take(map, one);
                *left -= frames.min(*left);
                held.is_urgent |= was_wanted;
                map.frames(one, |run| held.add(run));
            }
            if held.is_due(last.elapsed()) {
                let there = |from, to| absent.is_there(map, from, to);
                agent.name_arrived(&held.take(there))?;
                last = Instant::now();
            } else if last.elapsed() > ALIVE {
                agent.stay()?;
                last = Instant::now();
            }
            let news = agent.gate_news()?;
            clock.took(agent.take_clock_set());
            if news.over.is_some() {
                return Ok(news.over);
            }
            for run in news.wanted {
                map.pages(run, |wanted| {
                    let asked = absent.ask(wanted);
                    // It is there, and was only not told yet.
                    held.is_urgent |= asked.is_none() && !held.is_empty();
                    if let Some((key, count)) = asked {
                        let name = &absent.blocks[usize::from(key.block)].name;
                        ask(name, key.page, count);
                    }
                });
            }
        }
        agent.close_gate(LAST_WORD)
    }
}

/// Nothing is noted for nobody.
struct Watch<'a>(&'a Output);

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        self.0.unwatch();
    }
}

#[cfg(test)]
mod tests;
