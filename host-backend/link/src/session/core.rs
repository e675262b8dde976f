//! What the threads of a session share.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use transhume_protocol::link::{FrameKind, LinkError, Numbering, SESSION_WINDOW};

use super::Closer;
use super::inbox::{self, Inbox};
use super::outbox::{Carrier, Outbox, Prepared, Room, Task};
use super::sync::{Condvar, Instant, Mutex, MutexGuard, PoisonError};
use super::window::Window;
use crate::{ALIVE_INTERVAL, Error, Frame};

/// What may wait to be told to the peer as worked off, as a part of its window.
const UNTOLD: u64 = SESSION_WINDOW / 8;

/// What a connection's sender does next.
pub(super) enum Job<R> {
    /// Prepare a frame, tell [`Core::prepared`], and send it.
    Fresh(Numbering, R),
    /// Send a frame.
    Again(Numbering, Arc<Prepared>),
    /// Show that this side is there.
    Alive(Numbering),
    /// Say good-bye: the session is over.
    Bye(Numbering),
    /// This connection is over.
    Gone,
}

struct Live {
    carrier: Carrier,
    closer: Closer,
}

struct State<R> {
    outbox: Outbox<R>,
    inbox: Inbox,
    /// Room of frames that were worked off since the peer was last told so.
    untold: u64,
    connections: BTreeMap<u8, Live>,
    carriers: Carrier,
    away: Option<Instant>,
    patience: Duration,
    breaks: u32,
    /// Why the last connection broke.
    cause: Option<Error>,
    over: bool,
    failure: Option<Arc<Error>>,
}

/// See the module.
pub(super) struct Core<R> {
    state: Mutex<State<R>>,
    window: Window,
    /// Something to send, or the end.
    work: Condvar,
    /// A frame came, or the end.
    arrived: Condvar,
    /// A frame was taken to be sent, the peer has worked some off, or the end.
    room: Condvar,
    pub(super) bytes: AtomicU64,
}

impl<R> Core<R> {
    pub(super) fn new(patience: Duration) -> Self {
        Self {
            state: Mutex::new(State {
                outbox: Outbox::new(),
                inbox: Inbox::new(),
                untold: 0,
                connections: BTreeMap::new(),
                carriers: 0,
                away: Some(Instant::now()),
                patience,
                breaks: 0,
                cause: None,
                over: false,
                failure: None,
            }),
            window: Window::new(SESSION_WINDOW),
            work: Condvar::new(),
            arrived: Condvar::new(),
            room: Condvar::new(),
            bytes: AtomicU64::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<R>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn count(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn is_over(&self) -> bool {
        self.lock().over
    }

    pub(super) fn breaks(&self) -> u32 {
        self.lock().breaks
    }

    /// For how long there has been no connection.
    pub(super) fn away(&self) -> Option<Duration> {
        self.lock().away.map(|since| since.elapsed())
    }

    /// All frames up to this number have come.
    pub(super) fn received(&self) -> u64 {
        self.lock().inbox.received()
    }

    /// Why the session is over.
    fn why(state: &State<R>) -> Error {
        match &state.failure {
            Some(failure) => Error::Session(Arc::clone(failure)),
            None => Error::Closed,
        }
    }

    /// Puts a frame behind all others, and waits for room before. `length`: of its payload, at most; `held`:
    /// what it keeps until it is prepared, both in bytes.
    pub(super) fn push(&self, frame: R, length: usize, held: usize) -> Result<(), Error> {
        let room = Room::new(length, held);
        if self.window.acquire(room.raw).is_err() {
            return Err(Self::why(&self.lock()));
        }
        let mut state = self.lock();
        // What waits here could still be overtaken by something urgent.
        while !state.over && state.outbox.waiting() > state.connections.len() {
            state = self
                .room
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if state.over {
            return Err(Self::why(&state));
        }
        state.outbox.push(frame, room);
        drop(state);
        self.work.notify_all();
        Ok(())
    }

    /// Waits until the peer has worked everything off, so long at most.
    pub(super) fn drain(&self, patience: Duration) {
        let deadline = Instant::now() + patience;
        let mut state = self.lock();
        while !state.over && !state.outbox.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let waited = self.room.wait_timeout(state, left);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// From now on there may be no connection for so long.
    pub(super) fn set_patience(&self, patience: Duration) {
        self.lock().patience = patience;
        self.arrived.notify_all();
    }

    /// The next frame in order; waits for it as long as the session goes on. What came before its end is
    /// still handed out.
    pub(super) fn receive(&self) -> Result<Frame, Error> {
        let mut state = self.lock();
        loop {
            if let Some(frame) = state.inbox.pop() {
                state.untold += inbox::room(&frame);
                if state.untold >= UNTOLD {
                    self.work.notify_all();
                }
                return Ok(frame);
            }
            if state.over {
                return Err(Self::why(&state));
            }
            let patience = match state.away {
                Some(since) => state.patience.saturating_sub(since.elapsed()),
                None => state.patience,
            };
            if patience.is_zero() {
                let cause = state.cause.take().map(|cause| cause.to_string());
                let error = Error::Away {
                    seconds: state.patience.as_secs(),
                    cause: cause.unwrap_or_else(|| "no connection was made".to_owned()),
                };
                drop(state);
                self.fail(error);
                state = self.lock();
                continue;
            }
            let waited = self.arrived.wait_timeout(state, patience);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A connection takes part from now on, in the place of an earlier one of that index.
    pub(super) fn attach(&self, index: u8, closer: Closer) -> Option<Carrier> {
        let mut state = self.lock();
        if state.over {
            return None;
        }
        state.carriers += 1;
        let carrier = state.carriers;
        if let Some(earlier) = state.connections.insert(index, Live { carrier, closer }) {
            earlier.closer.close();
            state.outbox.broken(earlier.carrier);
        }
        if let Some(since) = state.away.take()
            && state.breaks > 0
        {
            tracing::info!(after_ms = since.elapsed().as_millis(), "the link is back");
        }
        drop(state);
        self.work.notify_all();
        self.room.notify_all();
        Some(carrier)
    }

    /// Ends an earlier connection of that index, so that what it brings no longer counts.
    pub(super) fn displace(&self, index: u8) {
        let mut state = self.lock();
        if let Some(earlier) = state.connections.remove(&index) {
            earlier.closer.close();
            state.outbox.broken(earlier.carrier);
            state.breaks += 1;
            if state.connections.is_empty() {
                state.away = Some(Instant::now());
            }
        }
        drop(state);
        self.work.notify_all();
        self.arrived.notify_all();
    }

    /// A connection broke.
    pub(super) fn broken(&self, carrier: Carrier, error: Error) {
        let mut state = self.lock();
        state.outbox.broken(carrier);
        let index = state
            .connections
            .iter()
            .find(|(_, live)| live.carrier == carrier)
            .map(|(index, _)| *index);
        if let Some(live) = index.and_then(|index| state.connections.remove(&index)) {
            live.closer.close();
            if !state.over {
                tracing::warn!(%error, "a connection of the link broke");
                state.breaks += 1;
                state.cause = Some(error);
                if state.connections.is_empty() {
                    state.away = Some(Instant::now());
                }
            }
        }
        drop(state);
        self.work.notify_all();
        // Whoever waits for a frame now waits no longer than for the link.
        self.arrived.notify_all();
    }

    /// A connection of a session that is over has ended.
    pub(super) fn forget(&self, carrier: Carrier) {
        let mut state = self.lock();
        state.connections.retain(|_, live| live.carrier != carrier);
        drop(state);
        self.work.notify_all();
    }

    /// Waits until no connection is left, so long at most.
    pub(super) fn wait_for_end(&self, patience: Duration) {
        let deadline = Instant::now() + patience;
        let mut state = self.lock();
        while !state.connections.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let waited = self.work.wait_timeout(state, left);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The peer has received all frames up to this number.
    pub(super) fn peer_received(&self, number: u64) -> Result<(), LinkError> {
        self.lock().outbox.received(number)
    }

    /// What a connection should send next; waits for it, no longer than a sign of life is due.
    pub(super) fn next(&self, carrier: Carrier) -> Job<R> {
        let deadline = Instant::now() + ALIVE_INTERVAL;
        let mut state = self.lock();
        loop {
            let taken = state.inbox.taken();
            let numbering = |number| Numbering { number, taken };
            if state.over {
                return Job::Bye(numbering(0));
            }
            if !state
                .connections
                .values()
                .any(|live| live.carrier == carrier)
            {
                return Job::Gone;
            }
            if let Some(task) = state.outbox.next(carrier) {
                state.untold = 0;
                drop(state);
                self.room.notify_all();
                return match task {
                    Task::Fresh(number, frame) => Job::Fresh(numbering(number), frame),
                    Task::Again(number, frame) => Job::Again(numbering(number), frame),
                };
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.untold >= UNTOLD || left.is_zero() {
                state.untold = 0;
                return Job::Alive(numbering(0));
            }
            let waited = self.work.wait_timeout(state, left);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A frame was prepared.
    pub(super) fn prepared(&self, number: u64, frame: Arc<Prepared>) {
        let surplus = self.lock().outbox.prepared(number, frame);
        if surplus > 0
            && let Err(error) = self.window.release(surplus)
        {
            // It was taken for the frame.
            tracing::error!(%error, "the session's window");
        }
        // Its connection may have broken meanwhile: then another one sends it.
        self.work.notify_all();
    }

    /// A frame came over a connection.
    pub(super) fn arrive(&self, frame: Frame, numbering: Numbering) -> Result<(), Error> {
        let mut state = self.lock();
        if state.over {
            // What comes now must change nothing any more: its end may have been answered for.
            return Ok(());
        }
        let freed = state.outbox.acknowledge(numbering.taken)?;
        match (frame.kind, numbering.number) {
            (FrameKind::Alive, 0) => {}
            (FrameKind::Bye, 0) => {
                drop(state);
                self.fail(Error::Closed);
                return Ok(());
            }
            (FrameKind::Alive | FrameKind::Bye, _) | (_, 0) => {
                return Err(LinkError::OutOfBounds("number of a frame").into());
            }
            (_, number) => state.inbox.insert(number, frame)?,
        }
        drop(state);
        self.arrived.notify_all();
        if freed > 0 {
            self.window
                .release(freed)
                .map_err(|_| LinkError::OutOfBounds("count of bytes"))?;
            self.room.notify_all();
        }
        Ok(())
    }

    /// Waits so long, or until the session is over.
    pub(super) fn pause(&self, pause: Duration) {
        let deadline = Instant::now() + pause;
        let mut state = self.lock();
        while !state.over {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let waited = self.work.wait_timeout(state, left);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Ends the session for that reason.
    pub(super) fn fail(&self, error: Error) {
        let mut state = self.lock();
        if !state.over {
            state.failure = Some(Arc::new(error));
        }
        drop(state);
        self.close();
    }

    /// Ends the session. Its connections say so to the peer.
    pub(super) fn close(&self) {
        self.lock().over = true;
        self.window.close();
        self.work.notify_all();
        self.arrived.notify_all();
        self.room.notify_all();
    }
}
