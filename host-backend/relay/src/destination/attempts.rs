//! Offers that are being dealt with. A source whose connection breaks before the session offers its VM
//! anew, on a new one: what was begun for the earlier offer ends before the new one is looked at.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use transhume_protocol::link::Offer;

/// How long what was begun for an earlier offer may take to end, a QEMU that starts included; less than the
/// source waits for its answer.
const ENDING_TIMEOUT: Duration = Duration::from_secs(20);
const ENDING_POLL_INTERVAL: Duration = Duration::from_millis(20);

/// How to end what is done for an offer.
type End = Box<dyn Fn() + Send>;

struct Attempt {
    entry: u64,
    job: u64,
    first: u64,
    attempt: u16,
    from: String,
    /// It is to end: what it begins next ends at once.
    over: bool,
    end: End,
}

#[derive(Default)]
struct State {
    /// The last number that was given.
    entries: u64,
    attempts: Vec<Attempt>,
}

/// See the module.
#[derive(Clone, Default)]
pub(crate) struct Attempts(Arc<Mutex<State>>);

/// An offer that is being dealt with, until this is dropped.
pub(crate) struct Entry {
    attempts: Attempts,
    entry: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut state = self.attempts.lock();
        state.attempts.retain(|one| one.entry != self.entry);
    }
}

impl Entry {
    /// From now on it is ended in that way; at once if it is to end already.
    pub(crate) fn ends_by(&self, end: impl Fn() + Send + 'static) {
        let mut state = self.attempts.lock();
        let own = state
            .attempts
            .iter_mut()
            .find(|one| one.entry == self.entry);
        if let Some(own) = own {
            own.end = Box::new(end);
            if own.over {
                (own.end)();
            }
        }
    }
}

impl Attempt {
    fn is_same_migration(&self, offer: &Offer) -> bool {
        self.first == offer.first && self.from == offer.from
    }
}

impl Attempts {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters an offer whose source is proven, and waits until what was begun for its earlier ones has ended.
    ///
    /// # Errors
    /// Why it cannot be dealt with, for people.
    pub(crate) async fn enter(
        &self,
        offer: &Offer,
        end: impl Fn() + Send + 'static,
    ) -> Result<Entry, String> {
        let entry = self.add(offer, Box::new(end))?;
        let deadline = Instant::now() + ENDING_TIMEOUT;
        while self.earlier(offer) {
            if Instant::now() > deadline {
                return Err(
                    "what was begun for this migration before the link broke does not end"
                        .to_owned(),
                );
            }
            tokio::time::sleep(ENDING_POLL_INTERVAL).await;
        }
        Ok(entry)
    }

    /// Adds an offer, and ends its earlier ones.
    fn add(&self, offer: &Offer, end: End) -> Result<Entry, String> {
        let mut state = self.lock();
        if state.attempts.iter().any(|one| one.job == offer.job) {
            return Err("an offer of this number is being dealt with".to_owned());
        }
        let of_it = state
            .attempts
            .iter_mut()
            .filter(|one| one.is_same_migration(offer));
        for one in of_it {
            if one.attempt >= offer.attempt {
                // It was long on its way.
                return Err("a later offer of this migration has come".to_owned());
            }
            tracing::info!(
                offer = one.job,
                "its source offers the VM anew: what was begun ends"
            );
            one.over = true;
            (one.end)();
        }
        state.entries += 1;
        let entry = state.entries;
        state.attempts.push(Attempt {
            entry,
            job: offer.job,
            first: offer.first,
            attempt: offer.attempt,
            from: offer.from.clone(),
            over: false,
            end,
        });
        Ok(Entry {
            attempts: self.clone(),
            entry,
        })
    }

    /// Whether something of earlier offers of that migration is still there.
    fn earlier(&self, offer: &Offer) -> bool {
        let state = self.lock();
        let mut of_it = state
            .attempts
            .iter()
            .filter(|one| one.is_same_migration(offer));
        of_it.any(|one| one.attempt < offer.attempt)
    }

    /// Ends what is done for an offer, whose source has given it up. What came before counts.
    pub(crate) fn end(&self, job: u64) {
        let mut state = self.lock();
        for one in state.attempts.iter_mut().filter(|one| one.job == job) {
            one.over = true;
            (one.end)();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};
    use transhume_testing::some_offer;

    fn offer(job: u64, attempt: u16) -> Offer {
        Offer {
            job,
            attempt,
            ..some_offer()
        }
    }

    /// How often something was ended.
    fn counter() -> (Arc<AtomicU32>, impl Fn() + Send + 'static) {
        let ended = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&ended);
        (ended, move || {
            count.fetch_add(1, Ordering::SeqCst);
        })
    }

    #[tokio::test]
    async fn a_later_offer_waits_for_the_end_of_the_earlier_one() {
        let attempts = Attempts::default();
        let (ended, end) = counter();
        let first = attempts.enter(&offer(1, 0), end).await.unwrap();
        let (attempts_too, later) = (attempts.clone(), offer(2, 1));
        let second = tokio::spawn(async move { attempts_too.enter(&later, || {}).await });
        while ended.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        assert!(!second.is_finished());
        // It had just begun something else.
        let (session, end) = counter();
        first.ends_by(end);
        assert_eq!(session.load(Ordering::SeqCst), 1);
        assert!(!second.is_finished());
        drop(first);
        let second = second.await.unwrap().unwrap();
        assert_eq!(ended.load(Ordering::SeqCst), 1);

        // What comes late changes nothing.
        assert!(attempts.enter(&offer(1, 0), || {}).await.is_err());
        assert!(attempts.enter(&offer(3, 1), || {}).await.is_err());
        drop(second);
        assert!(attempts.enter(&offer(3, 1), || {}).await.is_ok());
    }

    #[tokio::test]
    async fn other_migrations_go_on() {
        let attempts = Attempts::default();
        let (ended, end) = counter();
        let _first = attempts.enter(&offer(1, 0), end).await.unwrap();
        let other_host = Offer {
            from: "hostc".to_owned(),
            ..offer(2, 1)
        };
        let _other = attempts.enter(&other_host, || {}).await.unwrap();
        let other_migration = Offer {
            first: 3,
            ..offer(3, 1)
        };
        let _another = attempts.enter(&other_migration, || {}).await.unwrap();
        assert!(attempts.enter(&offer(1, 1), || {}).await.is_err());
        attempts.end(4);
        assert_eq!(ended.load(Ordering::SeqCst), 0);
        attempts.end(1);
        assert_eq!(ended.load(Ordering::SeqCst), 1);
    }
}
