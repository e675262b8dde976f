//! What the destination has to know of the guest's clock to set it right: the guest stands still while it moves, and its
//! clock with it.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use transhume_protocol::link::{Control, GuestClock};

use crate::guest::{Best, Lead, monotonic_ns};
use crate::link::{self, Connection};

/// Questions to the destination: an idle link's ways there and back are equally long in some.
const QUESTIONS: u32 = 5;
const PATIENCE: Duration = Duration::from_secs(5);

/// How far the clocks of destination and guest are ahead of this host's.
#[derive(Default)]
pub(super) struct Clocks {
    destination: Mutex<Best>,
    guest: Mutex<Option<Lead>>,
}

impl Clocks {
    /// Asks the destination for its clock, over a link that is used for nothing else. Blocks.
    pub(super) fn ask(&self, connection: &mut Connection) -> Result<(), link::Error> {
        for _ in 0..QUESTIONS {
            let asked_ns = monotonic_ns();
            connection.send(&Control::ClockWanted)?;
            let Control::Clock {
                monotonic_ns: theirs,
            } = connection.receive(PATIENCE)?
            else {
                return Err(link::Error::Unexpected("no answer about its clock"));
            };
            let now_ns = monotonic_ns();
            let mut best = self
                .destination
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            best.take(Lead::read(theirs, asked_ns, now_ns), now_ns);
        }
        Ok(())
    }

    /// Takes what is known of the guest's clock.
    pub(super) fn set_guest(&self, lead: Lead) {
        *self.guest.lock().unwrap_or_else(PoisonError::into_inner) = Some(lead);
    }

    /// The guest's clock beside this host's.
    pub(super) fn guest(&self) -> Option<Lead> {
        *self.guest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What to tell the destination, if all of it is known.
    pub(super) fn message(&self) -> Option<Control> {
        let destination = self
            .destination
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .at(monotonic_ns())?;
        let Lead {
            ahead_ns,
            within_ns,
        } = self.guest()?.beyond(destination);
        Some(Control::GuestClock(GuestClock {
            ahead_ns,
            within_ns,
        }))
    }
}
