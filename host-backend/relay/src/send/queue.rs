//! What the source's threads share: what waits for the link, and the pages that the destination was
//! referred to a disk for, kept until it has them.
//!
//! The balance between disk and link is made here, by two bounds. A page that a disk should hold is
//! referred to while fewer than [`SendQueue::reference_room`] such pages are unsettled; else it goes over
//! the link like any other. So a slow disk leaves its pages to the link, and a slow link holds up
//! nothing but the pages that need it. Only when both are full does the reader wait, and with it
//! QEMU, and then for whichever frees room first.
//!
//! The guest's report goes ahead of the data, for it says what to read ahead; but a guest may report without an end, so it
//! has a fixed start and a tenth of what went out beside it, and a new report takes the place of one that waits.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use transhume_protocol::link::{BATCH_HEADER_LEN, BatchHeader, PAGE_LEN, Verdict, encode_hint};

use super::buffers::{BUFFER_LEN, Buffer};
use super::scan_steering::LinkDemand;
use super::sync::{Condvar, Instant, Mutex, MutexGuard, PoisonError};
use super::window::Window;
use crate::error::RelayError;
use transhume_pages::PageKey;
use transhume_pages::hint_table::{HintTable, MAX_RUNS};

/// Bytes of page data that wait to be sent, at most.
const QUEUE_LIMIT: usize = 4 << 20;
/// Batches whose way is timed at once, at most.
const TIMED: usize = 64;
/// With so many of them the link is busy for some milliseconds.
const QUEUE_ENOUGH: usize = 512 << 10;
/// Batches that wait, at most: each keeps a whole buffer, however little of it is to be sent.
const QUEUE_BATCHES: usize = 32;
/// The same of those without page data, as of zero pages, or of pages that a disk should hold.
const MAX_QUEUE_BATCHES: usize = 128;
/// Bytes of the guest's report that go out whatever else does, and what share of the rest it has: one part in so many.
const HINTS_START: u64 = 1 << 20;
const HINTS_SHARE: u64 = 10;
/// Runs of it in one frame.
const RUNS_A_FRAME: usize = 2048;
/// Bytes of batches on their way: sent, but not yet worked off by the destination.
const WINDOW: u64 = 32 << 20;
/// Bytes of buffers kept for unsettled references, at most and at least.
const MAX_RETAINED: usize = 64 << 20;
const MIN_RETAINED: usize = 4 << 20;
/// References should be settled within this time: the bound on what is retained follows the rate at
/// which they are.
const SETTLE_TIME: Duration = Duration::from_millis(200);
/// How often that bound is looked at.
const SETTLE_INTERVAL: Duration = Duration::from_millis(100);
/// A link that is idle for so long while references are unsettled carries their pages.
const IDLE: Duration = Duration::from_millis(15);

/// Where a page's content lies in a buffer of the stream.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Content {
    pub(crate) key: PageKey,
    /// Offset in the buffer, in bytes.
    pub(crate) offset: u32,
}

/// A batch, ready to be sent.
#[derive(Debug)]
pub(crate) struct Outgoing {
    pub(crate) header: BatchHeader,
    pub(crate) records: Vec<u8>,
    pub(crate) buffer: Option<Arc<Buffer>>,
    /// Offsets of the data pages in the buffer.
    pub(crate) data: Vec<u32>,
}

impl Outgoing {
    /// Bytes that it takes in the window: its frame's payload before compression.
    fn payload_len(&self) -> u64 {
        (BATCH_HEADER_LEN + self.records.len() + self.header.data_len) as u64
    }
}

/// Something to send.
#[derive(Debug)]
pub(crate) enum Next {
    Control(Vec<u8>),
    Hints(Vec<u8>),
    Fill {
        batch: u64,
        buffer: Arc<Buffer>,
        pages: Vec<Content>,
    },
    Batch(Outgoing),
    Alive,
}

#[derive(Debug)]
struct Retained {
    buffer: Arc<Buffer>,
    references: Vec<Content>,
    unsettled: u32,
}

/// The guest's report on its way to the destination.
#[derive(Debug, Default)]
struct Report {
    /// Its parts, and how many runs of the first one went out.
    parts: VecDeque<Arc<HintTable>>,
    at: usize,
    /// Bytes of reports that went out, and of all else.
    sent: u64,
    beside: u64,
    /// Nobody reads ahead any more.
    is_over: bool,
}

impl Report {
    fn add(&mut self, part: Arc<HintTable>, replaces: bool) {
        if replaces {
            self.parts.clear();
            self.at = 0;
        }
        let waiting: usize = self.parts.iter().map(|part| part.runs().len()).sum();
        if !self.is_over && waiting + part.runs().len() <= MAX_RUNS {
            self.parts.push_back(part);
        }
    }

    /// What may go out of it now.
    fn next(&mut self) -> Option<Vec<u8>> {
        loop {
            let part = self.parts.front()?;
            if self.at < part.runs().len() {
                break;
            }
            self.parts.pop_front();
            self.at = 0;
        }
        if self.sent >= HINTS_START + self.beside / HINTS_SHARE {
            return None;
        }
        let runs = self.parts.front()?.runs().get(self.at..)?;
        let runs = runs.get(..RUNS_A_FRAME).unwrap_or(runs);
        let mut payload = Vec::new();
        for run in runs {
            encode_hint(&mut payload, run);
        }
        self.at += runs.len();
        self.sent += payload.len() as u64;
        Some(payload)
    }
}

#[derive(Debug)]
struct State {
    stopped: bool,
    /// Our own control messages, which are few, and fills: of batches that were sent, so no more than is retained.
    urgent: VecDeque<Next>,
    report: Report,
    queue: VecDeque<Outgoing>,
    queued_data: usize,
    /// Payload bytes of batches that the destination has worked off since the start.
    acknowledged: u64,
    /// Those of batches that were sent.
    sent: u64,
    /// Batches on their way: what `sent` was behind each, and when.
    on_their_way: VecDeque<(u64, Instant)>,
    /// The shortest time from a batch to its acknowledgement so far.
    round_trip: Option<Duration>,
    retained: HashMap<u64, Retained>,
    /// See [`SendQueue::late`].
    late: u64,
    limit: usize,
    /// Buffers' bytes settled since the bound was looked at, and whether the bound was met.
    settled: usize,
    limited: bool,
    looked: Instant,
    last_sent: Instant,
}

/// The shared state; see the module.
#[derive(Debug)]
pub(crate) struct SendQueue {
    state: Mutex<State>,
    window: Window,
    changed: Condvar,
}

impl State {
    fn retained_bytes(&self) -> usize {
        self.retained.len() * BUFFER_LEN
    }

    /// Bytes of pages that were not sent, or only referred to.
    fn owed(&self) -> u64 {
        let unsettled = self
            .retained
            .values()
            .map(|batch| u64::from(batch.unsettled));
        unsettled.sum::<u64>() * PAGE_LEN as u64 + self.queued_data as u64
    }

    fn queue_is_full(&self) -> bool {
        self.queued_data >= QUEUE_LIMIT || self.queue.len() >= QUEUE_BATCHES
    }

    /// Whether a batch with so many bytes of page data must wait.
    fn is_full_for(&self, data: usize) -> bool {
        (data > 0 && self.queue_is_full()) || self.queue.len() >= MAX_QUEUE_BATCHES
    }

    fn adapt(&mut self) {
        let elapsed = self.looked.elapsed();
        if elapsed < SETTLE_INTERVAL {
            return;
        }
        if self.limited {
            // Twice what was settled in the time, so that a disk that could do more shows it.
            let rate = self.settled as f64 / elapsed.as_secs_f64();
            let limit = 2.0 * rate * SETTLE_TIME.as_secs_f64();
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "clamped"
            )]
            let limit = limit.clamp(MIN_RETAINED as f64, MAX_RETAINED as f64) as usize;
            self.limit = limit;
        }
        self.settled = 0;
        self.limited = false;
        self.looked = Instant::now();
    }
}

impl SendQueue {
    pub(crate) fn new() -> Self {
        Self {
            state: Mutex::new(State {
                stopped: false,
                urgent: VecDeque::new(),
                report: Report::default(),
                queue: VecDeque::new(),
                queued_data: 0,
                acknowledged: 0,
                sent: 0,
                on_their_way: VecDeque::new(),
                round_trip: None,
                retained: HashMap::new(),
                late: 0,
                limit: MAX_RETAINED / 2,
                settled: 0,
                limited: false,
                looked: Instant::now(),
                last_sent: Instant::now(),
            }),
            window: Window::new(WINDOW),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends everyone's waiting with an error.
    pub(crate) fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }

    /// How many pages of the next batch may be references. Waits when neither a reference nor a page
    /// on the link has room.
    pub(crate) fn reference_room(&self) -> Result<usize, RelayError> {
        let mut state = self.lock();
        loop {
            if state.stopped {
                return Err(RelayError::Stopped);
            }
            state.adapt();
            if state.retained_bytes() + BUFFER_LEN <= state.limit {
                return Ok(BUFFER_LEN / PAGE_LEN);
            }
            state.limited = true;
            // As long as the link has enough to do, waiting for a disk costs nothing.
            if state.queued_data < QUEUE_ENOUGH && !state.queue_is_full() {
                return Ok(0);
            }
            state = self.wait(state);
        }
    }

    /// What the link needs, and whether there is room for references.
    pub(crate) fn demand(&self) -> (LinkDemand, bool) {
        let state = self.lock();
        let demand = if state.queued_data == 0 {
            LinkDemand::Starved
        } else if state.queued_data > QUEUE_LIMIT / 4 * 3 {
            LinkDemand::Saturated
        } else {
            LinkDemand::Balanced
        };
        (demand, state.retained_bytes() + BUFFER_LEN <= state.limit)
    }

    /// Puts a batch into the queue; waits for room, of which one with page data needs more. `references` are kept until
    /// they are settled.
    pub(crate) fn push(
        &self,
        outgoing: Outgoing,
        references: Vec<Content>,
    ) -> Result<(), RelayError> {
        let data = outgoing.header.data_len;
        let mut state = self.lock();
        while !state.stopped && state.is_full_for(data) {
            state = self.wait(state);
        }
        if state.stopped {
            return Err(RelayError::Stopped);
        }
        if let (Some(buffer), Ok(unsettled @ 1..)) =
            (&outgoing.buffer, u32::try_from(references.len()))
        {
            let buffer = Arc::clone(buffer);
            state.retained.insert(
                outgoing.header.number,
                Retained {
                    buffer,
                    references,
                    unsettled,
                },
            );
        }
        state.queued_data += data;
        state.queue.push_back(outgoing);
        self.changed.notify_all();
        Ok(())
    }

    /// Puts a control message ahead of all else.
    pub(crate) fn push_control(&self, payload: Vec<u8>) {
        self.lock().urgent.push_back(Next::Control(payload));
        self.changed.notify_all();
    }

    /// Takes a part of the guest's report, or with `replaces` a report that is to go out in the place of all that waits of
    /// others.
    pub(crate) fn report(&self, part: Arc<HintTable>, replaces: bool) {
        self.lock().report.add(part, replaces);
        self.changed.notify_all();
    }

    /// Nobody reads ahead from here on: no report goes out any more.
    pub(crate) fn end_reports(&self) {
        let mut state = self.lock();
        state.report.is_over = true;
        state.report.parts.clear();
    }

    /// Sends the pages of every unsettled reference over the link, ahead of what follows in the stream, and those of
    /// others in the same batches, of which it is not known which they are.
    pub(crate) fn fill_all(&self) {
        let mut state = self.lock();
        let retained = std::mem::take(&mut state.retained);
        for (
            batch,
            Retained {
                buffer,
                references,
                unsettled,
            },
        ) in retained
        {
            state.late += u64::from(unsettled);
            // Behind the batches that hold the references: the destination must know them first.
            state.urgent.push_back(Next::Fill {
                batch,
                buffer,
                pages: references,
            });
        }
        self.changed.notify_all();
    }

    /// References that went over the link as the destination had not read them yet.
    pub(crate) fn late(&self) -> u64 {
        self.lock().late
    }

    /// Waits until every batch and urgent frame before was handed to the link.
    pub(crate) fn drain(&self) -> Result<(), RelayError> {
        let mut state = self.lock();
        while !state.stopped && !(state.queue.is_empty() && state.urgent.is_empty()) {
            state = self.wait(state);
        }
        if state.stopped {
            Err(RelayError::Stopped)
        } else {
            Ok(())
        }
    }

    /// What is to be sent next; waits for it, at most `alive` long.
    pub(crate) fn next(&self, alive: Duration) -> Result<Next, RelayError> {
        let mut state = self.lock();
        let deadline = Instant::now() + alive;
        loop {
            if state.stopped {
                return Err(RelayError::Stopped);
            }
            if let Some(next) = state.urgent.pop_front() {
                if let Next::Fill { pages, .. } = &next {
                    state.report.beside += (pages.len() * PAGE_LEN) as u64;
                }
                state.last_sent = Instant::now();
                self.changed.notify_all();
                return Ok(next);
            }
            if let Some(payload) = state.report.next() {
                state.last_sent = Instant::now();
                return Ok(Next::Hints(payload));
            }
            let room = match state.queue.front() {
                Some(outgoing) => self.window.try_acquire(outgoing.payload_len())?,
                None => false,
            };
            if room && let Some(outgoing) = state.queue.pop_front() {
                state.queued_data -= outgoing.header.data_len;
                state.last_sent = Instant::now();
                state.sent += outgoing.payload_len();
                state.report.beside += outgoing.payload_len();
                if state.on_their_way.len() < TIMED {
                    let behind = (state.sent, state.last_sent);
                    state.on_their_way.push_back(behind);
                }
                self.changed.notify_all();
                return Ok(Next::Batch(outgoing));
            }
            // The disk works on the oldest references: the idle link takes the newest.
            if state.queue.is_empty()
                && state.last_sent.elapsed() >= IDLE
                && let Some(&batch) = state.retained.keys().max()
                && let Some(Retained {
                    buffer,
                    references,
                    unsettled,
                }) = state.retained.remove(&batch)
            {
                state.late += u64::from(unsettled);
                state.last_sent = Instant::now();
                state.report.beside += (references.len() * PAGE_LEN) as u64;
                self.changed.notify_all();
                return Ok(Next::Fill {
                    batch,
                    buffer,
                    pages: references,
                });
            }
            let now = Instant::now();
            if now >= deadline {
                return Ok(Next::Alive);
            }
            let pause = if state.retained.is_empty() {
                deadline - now
            } else {
                IDLE
            };
            let (guard, _) = self
                .changed
                .wait_timeout(state, pause.min(deadline - now))
                .unwrap_or_else(PoisonError::into_inner);
            state = guard;
        }
    }

    /// The destination has worked off so many bytes since the start.
    pub(crate) fn acknowledge(&self, bytes: u64) -> Result<(), RelayError> {
        let mut state = self.lock();
        let fresh = bytes
            .checked_sub(state.acknowledged)
            .ok_or(RelayError::Misplaced("acknowledgement that goes back"))?;
        self.window.release(fresh)?;
        state.acknowledged = bytes;
        while let Some(&(behind, at)) = state.on_their_way.front()
            && behind <= bytes
        {
            let took = at.elapsed();
            state.round_trip = Some(state.round_trip.map_or(took, |least| least.min(took)));
            state.on_their_way.pop_front();
        }
        self.changed.notify_all();
        Ok(())
    }

    /// Takes a verdict: forgets what is settled and sends what is wanted. Returns the number of pages
    /// settled, and those to be sent.
    pub(crate) fn judge(&self, verdict: &Verdict) -> Result<(u64, Vec<PageKey>), RelayError> {
        let mut state = self.lock();
        let number = verdict.batch;
        if state
            .queue
            .iter()
            .any(|batch| batch.header.number == number)
        {
            return Err(RelayError::Misplaced("verdict on a batch to come"));
        }
        let Some(retained) = state.retained.get_mut(&number) else {
            // Its pages were sent meanwhile.
            return Ok((0, Vec::new()));
        };
        let wanted: Option<Vec<Content>> = verdict
            .wanted
            .iter()
            .map(|&index| retained.references.get(index as usize).copied())
            .collect();
        let wanted = wanted.ok_or(RelayError::Misplaced("verdict on a reference that is none"))?;
        let judged = u32::try_from(wanted.len())
            .ok()
            .and_then(|wanted| wanted.checked_add(verdict.settled))
            .ok_or(RelayError::Misplaced("verdict on too many references"))?;
        retained.unsettled = retained
            .unsettled
            .checked_sub(judged)
            .ok_or(RelayError::Misplaced("verdict on too many references"))?;
        let keys = wanted.iter().map(|content| content.key).collect();
        let buffer = Arc::clone(&retained.buffer);
        if retained.unsettled == 0 {
            state.retained.remove(&verdict.batch);
        }
        state.settled += judged as usize * PAGE_LEN;
        state.adapt();
        if !wanted.is_empty() {
            state.urgent.push_back(Next::Fill {
                batch: verdict.batch,
                buffer,
                pages: wanted,
            });
        }
        self.changed.notify_all();
        Ok((u64::from(verdict.settled), keys))
    }

    /// The shortest time that the destination took to acknowledge a batch.
    pub(crate) fn round_trip(&self) -> Duration {
        self.lock().round_trip.unwrap_or_default()
    }

    /// How far the destination is behind, in bytes of pages.
    pub(crate) fn behind(&self) -> u64 {
        self.lock().owed() + self.window.out()
    }

    /// Waits until the destination is no further behind than so many bytes of pages. QEMU can pause the VM
    /// only once it could write the rest, so what is owed then is bounded by this.
    pub(crate) fn wait_for_peer(&self, most: u64) -> Result<(), RelayError> {
        let mut state = self.lock();
        while !state.stopped && state.owed() + self.window.out() > most {
            state = self.wait(state);
        }
        if state.stopped {
            Err(RelayError::Stopped)
        } else {
            Ok(())
        }
    }

    /// Whether the destination has nearly everything that QEMU sent so far: a switch-over now would
    /// wait for little.
    pub(crate) fn owes_little(&self) -> bool {
        let state = self.lock();
        state.retained.is_empty()
            && state.queued_data < QUEUE_LIMIT / 4
            && self.window.out() < WINDOW / 16
    }
}
