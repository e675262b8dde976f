//! What a migration counts while it runs.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use transhume_api::{Choice, Mode};
use transhume_protocol::link;

use transhume_api::migration::{
    Classes, Expected, Forecast, Phase, Phases, Snapshot, Stalls, Traffic,
};

/// What the destination tells of it, as it is shown.
pub(crate) fn stalls(told: link::Stalls) -> Stalls {
    let waits = told.processes.unwrap_or_default();
    let ms = |us: u64| Duration::from_micros(us).as_secs_f64() * 1e3;
    Stalls {
        all_cpus_ms: told.all_cpus_ms,
        cpu_ms: told.cpus_ms.into_iter().max().unwrap_or_default(),
        waits: waits.waits,
        waited_ms: ms(waits.waited_us),
        longest_ms: ms(waits.longest_us),
        gated_pages: waits.pages,
        absent_pages: waits.absent,
        gate_cpu_ms: ms(waits.cpu_us),
    }
}

/// The counters of a running migration: written by the relay, read by whoever shows them.
#[derive(Debug)]
pub struct Progress {
    started: Instant,
    phase: Mutex<(Phase, Phases, Instant)>,
    counters: [AtomicU64; COUNTERS],
    forecast: Mutex<Option<Forecast>>,
    expected: Mutex<Option<Expected>>,
    choice: Mutex<Option<Choice>>,
    waits_for: Mutex<Option<String>>,
    classes: Mutex<Option<Classes>>,
}

/// The counters in [`Progress`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "they are the fields of Traffic and Snapshot")]
pub enum Counter {
    ZeroPages,
    DiskPages,
    DataPages,
    ResentPages,
    UnchangedPages,
    MismatchedPages,
    LatePages,
    WireBytes,
    PageBytes,
    DiskBytes,
    StreamBytes,
    /// Stored plus one, so that 0 means "not known".
    RemainingBytes,
    TotalBytes,
    HintedPages,
    LinkAwayMs,
    RequestedPages,
    /// Pages that come in post-copy.
    PostCopyPages,
    /// The kernel's pages that come right before it.
    KernelPages,
    OrderedPages,
}

const COUNTERS: usize = Counter::OrderedPages as usize + 1;

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

impl Progress {
    /// Starts the clock, in phase [`Phase::Negotiate`].
    pub fn new() -> Self {
        let started = Instant::now();
        Self {
            started,
            phase: Mutex::new((Phase::Negotiate, Phases::default(), started)),
            counters: [const { AtomicU64::new(0) }; COUNTERS],
            forecast: Mutex::default(),
            expected: Mutex::default(),
            choice: Mutex::default(),
            waits_for: Mutex::default(),
            classes: Mutex::default(),
        }
    }

    /// That of a migration which began so long ago, in an earlier process, and which that had noted so.
    pub fn restored(noted: &Snapshot, ago: Duration) -> Self {
        let mut progress = Self::new();
        progress.started = Instant::now().checked_sub(ago).unwrap_or(progress.started);
        progress.enter(noted.phase);
        let traffic = noted.traffic;
        for (counter, value) in [
            (Counter::ZeroPages, traffic.zero_pages),
            (Counter::DiskPages, traffic.disk_pages),
            (Counter::DataPages, traffic.data_pages),
            (Counter::ResentPages, traffic.resent_pages),
            (Counter::UnchangedPages, traffic.unchanged_pages),
            (Counter::MismatchedPages, traffic.mismatched_pages),
            (Counter::LatePages, traffic.late_pages),
            (Counter::WireBytes, traffic.wire_bytes),
            (Counter::PageBytes, traffic.page_bytes),
            (Counter::DiskBytes, traffic.disk_bytes),
            (Counter::StreamBytes, traffic.stream_bytes),
            (Counter::TotalBytes, noted.total_bytes),
            (Counter::HintedPages, noted.hinted_pages),
            (Counter::RequestedPages, noted.requested_pages),
            (Counter::OrderedPages, noted.ordered_pages),
        ] {
            progress.set(counter, value);
        }
        progress
    }

    /// Enters a phase.
    pub fn enter(&self, phase: Phase) {
        let mut state = self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        let (before, phases, since) = &mut *state;
        let took = since.elapsed().as_secs_f64() * 1e3;
        match before {
            Phase::Negotiate => phases.negotiate_ms += took,
            Phase::Prepare => phases.prepare_ms += took,
            Phase::PreCopy => phases.pre_copy_ms += took,
            _ => {}
        }
        *since = Instant::now();
        *before = phase;
    }

    /// How long the phases took that were left.
    pub fn phases(&self) -> Phases {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner).1
    }

    /// The phase.
    pub fn phase(&self) -> Phase {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner).0
    }

    /// Since the start.
    pub fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Says what is expected from now on.
    pub fn expect(&self, forecast: Option<Forecast>) {
        *self.forecast.lock().unwrap_or_else(PoisonError::into_inner) = forecast;
    }

    /// What is expected.
    pub fn forecast(&self) -> Option<Forecast> {
        let forecast = self.forecast.lock();
        forecast.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Keeps a prediction for the end.
    pub fn predict(&self, expected: Expected) {
        *self.expected.lock().unwrap_or_else(PoisonError::into_inner) = Some(expected);
    }

    /// The last one.
    pub fn predicted(&self) -> Option<Expected> {
        *self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says how memory moves.
    pub fn choose(&self, choice: Choice) {
        *self.choice.lock().unwrap_or_else(PoisonError::into_inner) = Some(choice);
    }

    /// How memory moves.
    pub fn choice(&self) -> Option<Choice> {
        let choice = self.choice.lock();
        choice.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether memory moves by post-copy, or will as soon as it was scanned once.
    pub fn is_post_copy(&self) -> bool {
        let choice = self.choice.lock();
        let choice = choice.unwrap_or_else(PoisonError::into_inner);
        choice
            .as_ref()
            .is_some_and(|choice| choice.mode == Mode::Post)
    }

    /// Says what it waits for, or that it goes on.
    pub fn wait_for(&self, what: Option<String>) {
        *self
            .waits_for
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = what;
    }

    /// What it waits for.
    pub fn waits_for(&self) -> Option<String> {
        let waits_for = self.waits_for.lock();
        waits_for.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes what the guest named.
    pub fn set_classes(&self, classes: Classes) {
        *self.classes.lock().unwrap_or_else(PoisonError::into_inner) = Some(classes);
    }

    /// What the guest named.
    pub fn classes(&self) -> Option<Classes> {
        *self.classes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds to a counter.
    pub fn add(&self, counter: Counter, amount: u64) {
        self.counters[counter as usize].fetch_add(amount, Ordering::Relaxed);
    }

    /// Sets a counter.
    pub fn set(&self, counter: Counter, value: u64) {
        self.counters[counter as usize].store(value, Ordering::Relaxed);
    }

    /// Reads a counter.
    pub fn get(&self, counter: Counter) -> u64 {
        self.counters[counter as usize].load(Ordering::Relaxed)
    }

    /// What moved so far.
    pub fn traffic(&self) -> Traffic {
        Traffic {
            zero_pages: self.get(Counter::ZeroPages),
            disk_pages: self.get(Counter::DiskPages),
            data_pages: self.get(Counter::DataPages),
            resent_pages: self.get(Counter::ResentPages),
            unchanged_pages: self.get(Counter::UnchangedPages),
            mismatched_pages: self.get(Counter::MismatchedPages),
            late_pages: self.get(Counter::LatePages),
            wire_bytes: self.get(Counter::WireBytes),
            page_bytes: self.get(Counter::PageBytes),
            disk_bytes: self.get(Counter::DiskBytes),
            stream_bytes: self.get(Counter::StreamBytes),
        }
    }

    /// The moment, for showing.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            phase: self.phase(),
            elapsed_ms: u64::try_from(self.elapsed().as_millis()).unwrap_or(u64::MAX),
            traffic: self.traffic(),
            remaining_bytes: self.get(Counter::RemainingBytes).checked_sub(1),
            total_bytes: self.get(Counter::TotalBytes),
            hinted_pages: self.get(Counter::HintedPages),
            link_away_ms: self.get(Counter::LinkAwayMs),
            requested_pages: self.get(Counter::RequestedPages),
            ordered_pages: self.get(Counter::OrderedPages),
            waits_for: self.waits_for(),
            choice: self.choice(),
            forecast: self.forecast(),
        }
    }
}
