//! What the destination has to know of the guest's clock to set it right: the guest stands still while it moves, and its
//! clock with it.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use transhume_protocol::link::{Control, GuestClock};

use crate::guest::{Known, Lead, monotonic_ns};
use crate::link::{self, Connection};

/// Questions to the destination: an idle link's ways there and back are equally long in some.
const QUESTIONS: u32 = 5;
const PATIENCE: Duration = Duration::from_secs(5);
/// How often it is asked while memory moves: queues make each answer worse, and time makes the first ones worse.
const INTERVAL_NS: u64 = 2_000_000_000;
/// An agent that has said nothing for so long tells nothing of its clock any more.
const FRESH_NS: u64 = 60_000_000_000;

#[derive(Default)]
struct State {
    destination: Known,
    guest: Known,
    /// When the guest's clock was told last.
    guest_ns: u64,
    /// When the destination was asked, until it answers.
    asked_ns: Option<u64>,
    /// When it answered last.
    answered_ns: u64,
}

/// How far the clocks of destination and guest are ahead of this host's.
#[derive(Default)]
pub(super) struct Clocks(Mutex<State>);

impl Clocks {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the destination for its clock, over a link that is used for nothing else. Blocks.
    pub(super) fn ask(&self, connection: &mut Connection) -> Result<(), link::Error> {
        // It may have been started anew since it was asked last.
        self.lock().destination = Known::default();
        for _ in 0..QUESTIONS {
            self.lock().asked_ns = Some(monotonic_ns());
            connection.send(&Control::ClockWanted)?;
            let Control::Clock { monotonic_ns } = connection.receive(PATIENCE)? else {
                return Err(link::Error::Unexpected("no answer about its clock"));
            };
            self.answered(monotonic_ns);
        }
        Ok(())
    }

    /// Whether to ask it now, in the session. One question is under way at a time.
    pub(super) fn asks(&self) -> bool {
        let now_ns = monotonic_ns();
        let mut state = self.lock();
        let is_due = now_ns.saturating_sub(state.answered_ns) >= INTERVAL_NS;
        let asks = is_due && state.asked_ns.is_none();
        if asks {
            state.asked_ns = Some(now_ns);
        }
        asks
    }

    /// The destination has answered.
    pub(super) fn answered(&self, theirs_ns: u64) {
        let now_ns = monotonic_ns();
        let mut state = self.lock();
        if let Some(asked_ns) = state.asked_ns.take() {
            state
                .destination
                .take(Lead::read(theirs_ns, asked_ns, now_ns), now_ns);
            state.answered_ns = now_ns;
        }
    }

    /// Takes what is known of the guest's clock.
    pub(super) fn set_guest(&self, known: Known) {
        let mut state = self.lock();
        (state.guest, state.guest_ns) = (known, monotonic_ns());
    }

    /// The guest's clock beside this host's, if it was told lately.
    pub(super) fn guest(&self) -> Option<Known> {
        let state = self.lock();
        let is_fresh = monotonic_ns().saturating_sub(state.guest_ns) <= FRESH_NS;
        (is_fresh && state.guest != Known::default()).then_some(state.guest)
    }

    /// What to tell the destination, if all of it is known.
    pub(super) fn message(&self) -> Option<Control> {
        let guest = self.guest()?;
        let now_ns = monotonic_ns();
        let destination = self.lock().destination.at(now_ns)?;
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
