//! Doubts about storage while memory moves. When the destination's disks have something else than the guest named for
//! many pages, both hosts read the same places again, past all caches: only what they read tells whether the guest is
//! wrong, which costs time, or the storage is not the same, which ends the migration before the VM is handed over.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use transhume_protocol::link::{Compared, Comparison, Control, encode_control};

use super::hints::Hints;
use super::queue::SendQueue;
use crate::error::RelayError;
use crate::storage::agreed::{Agreed, READ_TIMEOUT};
use transhume_pages::PageKey;
use transhume_volume::same;

/// So many pages must differ, and such a part of those that were read (one of so many). Sound disks of guests that
/// write their page cache all the time show a twentieth; below that nothing is lost by not looking.
const MINIMUM: u64 = 256;
const PART: u64 = 8;
/// Looked again when so many times as many differ, and so often at most.
const RETRY_INTERVAL: u64 = 4;
const LIMIT: u32 = 4;
/// Pages whose places are compared, at most.
const PAGES: usize = 512;
/// How long a hand-over waits for an answer that is due.
const HAND_OVER: Duration = Duration::from_secs(5);

struct State {
    read: u64,
    differing: u64,
    /// Some of the latter, since the last look.
    pages: Vec<PageKey>,
    /// So many must differ for the next look.
    due: u64,
    looks: u32,
    /// A look is under way.
    looking: bool,
    answer: Option<Compared>,
    stopped: bool,
}

/// See the module.
pub(crate) struct Doubt {
    agreed: Agreed,
    state: Mutex<State>,
    changed: Condvar,
}

impl State {
    fn is_due(&self) -> bool {
        self.looks < LIMIT
            && self.differing >= self.due
            && self.differing.saturating_mul(PART) >= self.read
    }
}

/// The destination does not answer, or not what was asked: other threads say why.
struct Unanswered;

impl From<same::Error> for Unanswered {
    fn from(error: same::Error) -> Self {
        tracing::warn!(%error, "comparing the disks again failed");
        Self
    }
}

impl Doubt {
    pub(crate) fn new(agreed: Agreed) -> Self {
        Self {
            agreed,
            state: Mutex::new(State {
                read: 0,
                differing: 0,
                pages: Vec::new(),
                due: MINIMUM,
                looks: 0,
                looking: false,
                answer: None,
                stopped: false,
            }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what a verdict says: so many pages were as the guest named them, and these were not.
    pub(crate) fn judge(&self, settled: u64, differing: u64, pages: &[PageKey]) {
        let mut state = self.lock();
        state.read += settled + differing;
        state.differing += differing;
        let room = PAGES - state.pages.len().min(PAGES);
        state.pages.extend(pages.iter().take(room));
        if state.is_due() {
            self.changed.notify_all();
        }
    }

    /// Takes the destination's answer.
    pub(crate) fn answer(&self, compared: Compared) {
        self.lock().answer = Some(compared);
        self.changed.notify_all();
    }

    pub(crate) fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_all();
    }

    /// Waits until there is no doubt that was not looked into. Blocks.
    pub(crate) fn settle(&self) {
        let deadline = Instant::now() + HAND_OVER;
        let mut state = self.lock();
        while !state.stopped && (state.looking || state.is_due()) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                tracing::warn!("the other host does not read its disks: handing over all the same");
                return;
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Looks when it is due, until it is stopped.
    pub(crate) fn run(&self, hints: &Hints, flow: &SendQueue) -> Result<(), RelayError> {
        while let Some(pages) = self.due() {
            let table = hints.current().0;
            let places: Vec<_> = pages
                .iter()
                .filter_map(|&key| table.look_up(key, &mut 0))
                .collect();
            let found = self
                .agreed
                .compare_again(&places, |comparison| self.ask(flow, comparison));
            match found {
                Ok(differences) if !differences.is_empty() => {
                    self.stop();
                    return Err(RelayError::OtherStorage(differences.join("; ")));
                }
                Ok(_) => tracing::info!(
                    "disks differ from what the guest named, and are the same on both hosts"
                ),
                Err(Unanswered) => {}
            }
            self.lock().looking = false;
            self.changed.notify_all();
        }
        Ok(())
    }

    /// Waits until it is due. Returns some pages that differed.
    fn due(&self) -> Option<Vec<PageKey>> {
        let mut state = self.lock();
        while !state.stopped && !state.is_due() {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if state.stopped {
            return None;
        }
        state.looking = true;
        state.looks += 1;
        state.due = state.differing.saturating_mul(RETRY_INTERVAL);
        Some(std::mem::take(&mut state.pages))
    }

    fn ask(&self, flow: &SendQueue, comparison: Comparison) -> Result<Compared, Unanswered> {
        let number = comparison.number;
        let asked = encode_control(&Control::Compare(comparison)).map_err(|_| Unanswered)?;
        self.lock().answer = None;
        flow.push_control(asked);
        let deadline = Instant::now() + READ_TIMEOUT;
        let mut state = self.lock();
        loop {
            match state.answer.take() {
                Some(answer) if answer.number == number => return Ok(answer),
                _ => {}
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.stopped || left.is_zero() {
                return Err(Unanswered);
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}
