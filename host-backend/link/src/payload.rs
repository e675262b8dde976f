//! Memory of received pages, used again: fresh memory costs the kernel's clearing and a page fault for
//! every 4 KiB.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

/// Length of memory that is kept, in bytes: a full batch of the source, and what else its frame holds.
const LENGTH: usize = 640 * 1024;
/// Shorter payloads get memory of their own: a queue is bounded by what payloads hold, not by what they keep.
const MINIMUM: usize = LENGTH / 2;
/// Free memory that is kept, in pieces.
const KEPT: usize = 48;

/// Free memory.
#[derive(Debug, Default)]
pub struct Pool {
    free: Mutex<Vec<Vec<u8>>>,
}

/// Bytes that go back to their pool.
#[derive(Debug)]
pub struct Payload {
    bytes: Vec<u8>,
    length: usize,
    pool: Option<Arc<Pool>>,
}

impl Pool {
    /// So many bytes, whatever they hold.
    pub fn take(self: &Arc<Self>, length: usize) -> Payload {
        if !(MINIMUM..=LENGTH).contains(&length) {
            return vec![0; length].into();
        }
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = free.pop();
        drop(free);
        Payload {
            bytes: bytes.unwrap_or_else(|| vec![0; LENGTH]),
            length,
            pool: Some(Arc::clone(self)),
        }
    }
}

impl From<Vec<u8>> for Payload {
    fn from(bytes: Vec<u8>) -> Self {
        Self {
            length: bytes.len(),
            bytes,
            pool: None,
        }
    }
}

impl Deref for Payload {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl DerefMut for Payload {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.length]
    }
}

impl AsRef<[u8]> for Payload {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Drop for Payload {
    fn drop(&mut self) {
        if let Some(pool) = &self.pool {
            let mut free = pool.free.lock().unwrap_or_else(PoisonError::into_inner);
            if free.len() < KEPT {
                free.push(std::mem::take(&mut self.bytes));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_comes_back() {
        let pool = Arc::new(Pool::default());
        let mut payload = pool.take(MINIMUM);
        payload[0] = 7;
        let at = payload.as_ptr();
        drop(payload);
        let payload = pool.take(LENGTH);
        assert_eq!((payload.as_ptr(), payload[0]), (at, 7));
        assert_eq!(payload.len(), LENGTH);
        assert_ne!(pool.take(MINIMUM).as_ptr(), at);
    }

    #[test]
    fn short_and_long_payloads_are_not_kept() {
        let pool = Arc::new(Pool::default());
        for length in [0, MINIMUM - 1, LENGTH + 1] {
            assert_eq!(*pool.take(length), vec![0; length]);
        }
        assert!(pool.free.lock().expect("whole").is_empty());
        let payloads: Vec<Payload> = (0..2 * KEPT).map(|_| pool.take(LENGTH)).collect();
        drop(payloads);
        assert_eq!(pool.free.lock().expect("whole").len(), KEPT);
    }
}
