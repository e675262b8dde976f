//! What the destination has to know of the guest's clock to set it right: the guest stands still while it moves, and its
//! clock with it.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use transhume_protocol::link::{Control, GuestClock};

use transhume_guest::{Known, Lead, Reading, monotonic_ns};
use transhume_link::{self as link, Connection};

/// Questions to the destination: an idle link's ways there and back are equally long in some.
const QUESTIONS: u32 = 5;
const TIMEOUT: Duration = Duration::from_secs(5);
/// The session loses no answer.
const NEVER_NS: u64 = u64::MAX;
/// How often it is asked while memory moves: queues make each answer worse, and time makes the first ones worse.
const INTERVAL_NS: u64 = 2_000_000_000;
/// An agent that has said nothing for so long tells nothing of its clock any more.
const FRESH_NS: u64 = 60_000_000_000;

#[derive(Default)]
struct State {
    destination: Reading,
    guest: Known,
    /// When the guest's clock was told last.
    guest_ns: u64,
    /// What it should be, where it still lacks what an earlier move took.
    owed: Option<Known>,
}

/// How far the clocks of destination and guest are ahead of this host's.
pub(crate) struct Clocks(Mutex<State>);

impl Clocks {
    /// `owed`: what is noted of a guest's clock that was not set right yet.
    pub(crate) fn new(owed: Option<Known>) -> Self {
        let state = State {
            owed,
            ..State::default()
        };
        Self(Mutex::new(state))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the destination for its clock, over a link that is used for nothing else. Blocks.
    pub(crate) fn ask(&self, connection: &mut Connection) -> Result<(), link::Error> {
        // It may have been started anew since it was asked last.
        self.lock().destination = Reading::default();
        for _ in 0..QUESTIONS {
            self.lock().destination.ask(monotonic_ns());
            connection.send(&Control::ClockWanted)?;
            let Control::Clock { monotonic_ns } = connection.receive(TIMEOUT)? else {
                return Err(link::Error::Unexpected("no answer about its clock"));
            };
            self.answered(monotonic_ns);
        }
        Ok(())
    }

    /// Whether to ask it now, in the session. One question is under way at a time.
    pub(crate) fn asks(&self) -> bool {
        let now_ns = monotonic_ns();
        let destination = &mut self.lock().destination;
        let asks = destination.is_due(now_ns, INTERVAL_NS, NEVER_NS);
        if asks {
            destination.ask(now_ns);
        }
        asks
    }

    /// The destination has answered.
    pub(crate) fn answered(&self, theirs_ns: u64) {
        let now_ns = monotonic_ns();
        self.lock().destination.answer(theirs_ns, now_ns);
    }

    /// Takes what is known of the guest's clock.
    pub(crate) fn set_guest(&self, known: Known) {
        let mut state = self.lock();
        (state.guest, state.guest_ns) = (known, monotonic_ns());
    }

    /// The guest's clock beside this host's, as it should be, if it was told lately.
    pub(crate) fn guest(&self) -> Option<Known> {
        let state = self.lock();
        if state.owed.is_some() {
            return state.owed;
        }
        let is_fresh = monotonic_ns().saturating_sub(state.guest_ns) <= FRESH_NS;
        (is_fresh && state.guest != Known::default()).then_some(state.guest)
    }

    /// What to tell the destination, if all of it is known.
    pub(crate) fn message(&self) -> Option<Control> {
        let guest = self.guest()?;
        let now_ns = monotonic_ns();
        let destination = self.lock().destination.known().at(now_ns)?;
        let Lead {
            ahead_ns,
            within_ns,
        } = guest.at(now_ns)?.beyond(destination);
        Some(Control::GuestClock(GuestClock {
            ahead_ns,
            within_ns,
        }))
    }
}
