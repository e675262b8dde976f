//! Who speaks with an agent. QEMU serves its channel to one client, and lets others connect and wait unheard: so a session
//! that begins waits until the one before it has ended.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// The channels that this process uses.
static TAKEN: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());
static LEFT: Condvar = Condvar::new();

/// A channel that nobody else of this process uses until this is dropped.
#[derive(Debug)]
pub(super) struct Turn(PathBuf);

impl Turn {
    /// Waits for it, for `patience` at most.
    pub(super) fn take(socket: &Path, patience: Duration) -> Option<Self> {
        let taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        let is_taken = |taken: &mut BTreeSet<PathBuf>| taken.contains(socket);
        let waited = LEFT.wait_timeout_while(taken, patience, is_taken);
        let (mut taken, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() && taken.contains(socket) {
            return None;
        }
        taken.insert(socket.to_owned());
        Some(Self(socket.to_owned()))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        TAKEN
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&self.0);
        LEFT.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_channel_is_used_by_one_after_the_other() {
        let (one, other) = (Path::new("/turn/one"), Path::new("/turn/other"));
        let first = Turn::take(one, Duration::ZERO).expect("nobody has it");
        assert!(Turn::take(one, Duration::ZERO).is_none());
        let _other = Turn::take(other, Duration::ZERO).expect("another channel");
        let second = std::thread::spawn(move || Turn::take(one, Duration::from_secs(60)).is_some());
        drop(first);
        assert!(second.join().expect("no panic"));
        assert!(Turn::take(one, Duration::ZERO).is_some());
    }
}
