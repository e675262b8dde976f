//! What a migration tells of itself while it runs, and its summary.

use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::mode::{Choice, Mode};

/// Where a migration stands. The contract of each phase says who runs the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The daemons agree on versions, machine and disks. The source runs the VM; nothing was touched.
    Negotiate,
    /// The destination starts its QEMU, which waits for the stream. The source runs the VM.
    Prepare,
    /// Memory is copied while the source runs the VM.
    PreCopy,
    /// The VM is paused at the source; the rest of its memory and its devices' state move.
    Switchover,
    /// The whole state is at the destination; the source gives the VM up. From here on it belongs to
    /// the destination.
    Commit,
    /// Post-copy: the VM is handed over and runs at the destination, while part of its memory is still at
    /// the source, whose QEMU is needed until all of it has moved. From here on it belongs to the destination.
    PostCopy,
    /// The destination runs the VM.
    Completed,
    /// The migration failed before the hand-over; the source runs the VM.
    Failed,
    /// The operator ended the migration; the source runs the VM.
    Cancelled,
    /// The VM's guest ended by itself meanwhile: nobody runs it any more.
    Ended,
    /// The VM's QEMU ended, and not by its guest's doing: nobody runs it any more, or part of its memory is lost.
    Lost,
    /// The peer fell silent after the commit was sent: an operator must look who has the VM.
    Unresolved,
}

impl Phase {
    /// Whether the migration has ended.
    pub fn is_final(self) -> bool {
        matches!(
            self,
            Self::Completed
                | Self::Failed
                | Self::Cancelled
                | Self::Ended
                | Self::Lost
                | Self::Unresolved
        )
    }
}

/// Pages and bytes by where they came from. Pages are of 4 KiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Traffic {
    /// Pages that hold one repeated byte (all but always zero).
    pub zero_pages: u64,
    /// Pages that the destination read from a disk, verified by digest.
    pub disk_pages: u64,
    /// Pages sent over the link, the first time.
    pub data_pages: u64,
    /// Pages sent over the link because the guest wrote them again.
    pub resent_pages: u64,
    /// Pages that QEMU sent again though the destination had them as they are: not sent over the link.
    #[serde(default)]
    pub unchanged_pages: u64,
    /// Pages sent over the link because what the disk held did not match, or could not be read.
    pub mismatched_pages: u64,
    /// Pages that were to come from a disk, and were sent over the link as the destination had not read them yet.
    #[serde(default)]
    pub late_pages: u64,
    /// Bytes that the link carried, both ways, framing included.
    pub wire_bytes: u64,
    /// Bytes of page content on the link after compression.
    pub page_bytes: u64,
    /// Bytes that the destination read from disks.
    pub disk_bytes: u64,
    /// Bytes read from QEMU's stream at the source.
    pub stream_bytes: u64,
}

/// What is expected.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Forecast {
    /// Until the VM runs at the destination, in milliseconds; absent when that will not be.
    pub left_ms: Option<f64>,
    /// How long nobody would run the VM if it were paused now, in milliseconds.
    pub downtime_ms: f64,
    /// How long nobody will run it then, in milliseconds; absent when that will not be.
    #[serde(default)]
    pub pause_ms: Option<f64>,
    /// Why the goal will not be met, and what would meet it.
    pub advice: Option<String>,
}

/// What was expected, to be compared with what came.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Expected {
    /// When that was said, in milliseconds since the command.
    pub made_ms: f64,
    /// From the command to the end, in milliseconds.
    pub total_ms: f64,
    /// How long nobody would run the VM, in milliseconds.
    pub downtime_ms: f64,
}

/// A moment of a running migration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Snapshot {
    /// Where it stands.
    pub phase: Phase,
    /// Since the command, in milliseconds.
    pub elapsed_ms: u64,
    /// What moved so far.
    pub traffic: Traffic,
    /// What the hypervisor believes is left, in bytes; absent before the first answer.
    pub remaining_bytes: Option<u64>,
    /// The guest's memory, in bytes.
    pub total_bytes: u64,
    /// Page frames that the guest's agent names as clean page cache.
    pub hinted_pages: u64,
    /// For how long there has been no connection to the destination, in milliseconds; 0 while there is one.
    #[serde(default)]
    pub link_away_ms: u64,
    /// Pages that the guest asked for before they had come, in post-copy.
    #[serde(default)]
    pub requested_pages: u64,
    /// Pages that came when they did because the guest had named them as wanted first, in post-copy.
    #[serde(default)]
    pub ordered_pages: u64,
    /// What it waits for and why, if it does not go on: a host whose post-copy was cut off.
    #[serde(default)]
    pub waits_for: Option<String>,
    /// How memory moves as it looks now, and why.
    #[serde(default)]
    pub choice: Option<Choice>,
    /// What is expected, once that can be said.
    #[serde(default)]
    pub forecast: Option<Forecast>,
}

/// Downtime in its parts, in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Downtime {
    /// From the source's pause to the last page of memory on the link.
    pub memory_ms: f64,
    /// From there to the destination having loaded all devices.
    pub devices_ms: f64,
    /// From there to the VM running: the commit, its way over the link, and the disks taken over. Half the shortest
    /// round trip is taken off for the word's way back.
    pub handover_ms: f64,
    /// All of it.
    pub total_ms: f64,
}

/// How long the phases before the pause took, in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Phases {
    /// Versions, machine and disks agreed.
    pub negotiate_ms: f64,
    /// The destination's QEMU started, the guest's first report taken.
    pub prepare_ms: f64,
    /// Memory copied while the VM ran.
    pub pre_copy_ms: f64,
}

/// What came after the VM ran at its destination.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct PostCopy {
    /// From the VM running there to all of its memory being there, in milliseconds.
    pub total_ms: f64,
    /// Pages that came in this time.
    pub pages: u64,
    /// Pages that the guest asked for before they had come.
    pub requested_pages: u64,
    /// What it cost the guest; absent when that is not known, as after a break.
    #[serde(default)]
    pub stalls: Option<Stalls>,
    /// The kernel's pages, and pages among them, that were sent again right before the switch.
    #[serde(default)]
    pub kernel_pages: u64,
    /// Pages that came when they did because the guest had named them as wanted first.
    #[serde(default)]
    pub ordered_pages: u64,
    /// What the guest named; absent when its agent named nothing.
    #[serde(default)]
    pub classes: Option<Classes>,
}

/// What post-copy cost the guest after it ran at its destination.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Stalls {
    /// How long all virtual CPUs stood still at once, in milliseconds.
    pub all_cpus_ms: u32,
    /// How long the one did that stood still for longest, in milliseconds.
    pub cpu_ms: u32,
    /// Times that a process slept for a page instead of stopping a CPU.
    pub waits: u64,
    /// How long processes slept in all, in milliseconds.
    pub waited_ms: f64,
    /// How long one slept at most, in milliseconds.
    pub longest_ms: f64,
    /// Pages of processes that were absent and watched; 0 where the guest has no gate.
    pub gated_pages: u64,
    /// Page frames that were absent when its agent was told of them.
    #[serde(default)]
    pub absent_pages: u64,
    /// CPU time of the guest for its gate, in milliseconds.
    #[serde(default)]
    pub gate_cpu_ms: f64,
}

impl From<transhume_protocol::link::Stalls> for Stalls {
    fn from(told: transhume_protocol::link::Stalls) -> Self {
        let waits = told.processes.unwrap_or_default();
        let ms = |us: u64| Duration::from_micros(us).as_secs_f64() * 1e3;
        Self {
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
}

/// Page frames by class, as the guest tells.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Classes {
    /// The kernel's that are nothing of the following.
    pub kernel: u64,
    /// The kernel's small objects.
    pub slab: u64,
    /// Page tables.
    pub page_tables: u64,
    /// Of processes alone.
    pub anonymous: u64,
    /// Page cache that is as on disk.
    pub clean_file: u64,
    /// Page cache that is not, or has no disk.
    pub dirty_file: u64,
    /// Holds nothing.
    pub free: u64,
    /// What cannot be told.
    pub other: u64,
    /// What processes touched in the last moment before the switch, of whichever class.
    pub working_sets: u64,
}

/// How a migration ended well.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Summary {
    /// The VM.
    pub vm: String,
    /// The host that it left.
    pub from: String,
    /// The host that runs it now.
    pub to: String,
    /// From the command to the VM running there, in milliseconds.
    pub total_ms: f64,
    /// How long it took until then, by phase.
    pub phases: Phases,
    /// How long nobody ran it.
    pub downtime: Downtime,
    /// What came afterwards, in post-copy; `total_ms` includes it.
    #[serde(default)]
    pub post_copy: Option<Box<PostCopy>>,
    /// How memory moved, and why.
    #[serde(default)]
    pub choice: Option<Choice>,
    /// What was expected: by the first forecast after one pass over memory, or when post-copy began.
    #[serde(default)]
    pub expected: Option<Expected>,
    /// What moved.
    pub traffic: Traffic,
    /// Page frames that the guest's agent named as clean page cache, in its last report.
    pub hinted_pages: u64,
    /// What was less than it could have been, for people: no agent, no module, hints given up.
    pub remarks: Vec<String>,
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
