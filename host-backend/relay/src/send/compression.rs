//! Whether compression is faster than the link.
//!
//! While the kernel has much to send, the link limits and its rate shows. Compression is worth it as long
//! as it takes bytes in faster than the link would carry them. When nothing waits for a while, the next
//! batches go plain: either they show that the link limits still, or that it does not.
//!
//! Where CPUs are short a compressor is slower than its CPU time tells, and the link idles meanwhile. Fewer bytes
//! are worth that in pre-copy. In post-copy, where a guest waits, they are not: a batch is compressed only while
//! the kernel has enough to send.

use std::time::{Duration, Instant};

/// With more bytes than this waiting in the kernel, the link is slower than the stream.
const BACKLOG: usize = 256 * 1024;
/// With at least so many at both ends of a span, the link was busy throughout.
const BUSY: usize = 32 * 1024;
/// How long a link that limited is taken to do so still.
const LIMITS: Duration = Duration::from_secs(3);
/// What a link should have to send while a batch is compressed, by what it carries in that time: both vary.
const MARGIN: f64 = 1.5;
/// After batches that did not get smaller, so many are sent without a try, at most.
const SKIPPED: u32 = 64;
/// What remains of earlier measurements with each new one.
const FADE: f64 = 0.95;

/// Bytes a second, over a fading past.
#[derive(Debug, Clone, Copy, Default)]
struct Rate {
    bytes: f64,
    seconds: f64,
}

impl Rate {
    fn note(&mut self, bytes: u64, took: Duration) {
        self.bytes = self.bytes * FADE + bytes as f64;
        self.seconds = self.seconds * FADE + took.as_secs_f64();
    }

    fn get(self) -> Option<f64> {
        (self.seconds > 1e-3).then(|| self.bytes / self.seconds)
    }
}

/// What was seen of link and compressor.
#[derive(Debug, Default)]
pub(crate) struct Compression {
    link: Rate,
    /// By the time of its CPU.
    compressor: Rate,
    /// By the clock.
    passing: Rate,
    limited: Option<Instant>,
    /// When the link was last seen busy, and what it had carried by then.
    busy: Option<(Instant, u64)>,
    /// Batches to be sent without a try, now and after the next one that does not get smaller.
    skip: u32,
    skip_next: u32,
}

impl Compression {
    /// Whether the next batch should be compressed. `sent`: bytes handed to the kernel so far, of which
    /// `backlog` wait there.
    pub(crate) fn is_worth_it(&mut self, now: Instant, sent: u64, backlog: usize) -> bool {
        let carried = sent.saturating_sub(backlog as u64);
        let busy = (backlog >= BUSY).then_some((now, carried));
        if let (Some((now, carried)), Some((then, before))) = (busy, self.busy) {
            self.link.note(
                carried.saturating_sub(before),
                now.saturating_duration_since(then),
            );
        }
        self.busy = busy;
        if backlog >= BACKLOG {
            self.limited = Some(now);
        }
        let limits = self
            .limited
            .is_some_and(|then| now.saturating_duration_since(then) < LIMITS);
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        limits
            && match (self.compressor.get(), self.link.get()) {
                (Some(compressor), Some(link)) => compressor > link,
                (None, Some(_)) => true,
                // Plain batches show it soonest.
                (_, None) => false,
            }
    }

    /// Whether a link that has so much to send would run out of it while so many bytes are compressed.
    pub(crate) fn idles(&self, bytes: usize, unsent: usize) -> bool {
        match (self.passing.get(), self.link.get()) {
            (Some(passing), Some(link)) => {
                let meanwhile = bytes as f64 / passing * link;
                (unsent as f64) < MARGIN * meanwhile
            }
            // The first one shows it.
            _ => false,
        }
    }

    /// So many bytes were compressed, in so much time of a CPU, and by the clock. `smaller`: worth the destination's
    /// time.
    pub(crate) fn took(&mut self, bytes: usize, cpu: Duration, clock: Duration, smaller: bool) {
        self.compressor.note(bytes as u64, cpu);
        self.passing.note(bytes as u64, clock);
        self.skip_next = if smaller {
            0
        } else {
            (2 * self.skip_next).clamp(1, SKIPPED)
        };
        self.skip = self.skip_next;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends batches of 256 KiB over a link of so many bytes a second, compressed in half at
    /// `compressor` bytes a second; returns how many of them were compressed.
    fn run(link: f64, compressor: f64, batches: u32) -> u32 {
        const BATCH: u64 = 256 * 1024;
        const PLAIN: f64 = 2e9;
        let mut compression = Compression::default();
        let mut now = Instant::now();
        let (mut sent, mut carried, mut compressed) = (0_u64, 0.0_f64, 0);
        for _ in 0..batches {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "never more than was sent"
            )]
            let backlog = (sent as f64 - carried) as usize;
            let worth = compression.is_worth_it(now, sent, backlog);
            let seconds = BATCH as f64 / if worth { compressor } else { PLAIN };
            let length = if worth { BATCH / 2 } else { BATCH };
            if worth {
                compressed += 1;
                let took = Duration::from_secs_f64(seconds);
                compression.took(262_144, took, took, true);
            }
            sent += length;
            // The kernel takes no more than 2 MiB: then it makes the sender wait.
            let wait = ((sent as f64 - carried - 2e6) / link - seconds).max(0.0);
            carried = (carried + link * (seconds + wait)).min(sent as f64);
            now += Duration::from_secs_f64(seconds + wait);
        }
        compressed
    }

    #[test]
    fn a_slow_link_gets_compressed_batches() {
        assert!(run(100e6, 400e6, 1000) > 950);
        assert!(run(10e6, 400e6, 1000) > 950);
    }

    #[test]
    fn what_does_not_get_smaller_is_tried_less_and_less() {
        let mut compression = Compression::default();
        let mut now = Instant::now();
        let (mut sent, mut tries) = (0, 0);
        for _ in 0..1000 {
            sent += 1_000_000;
            now += Duration::from_millis(10);
            if compression.is_worth_it(now, sent, 2 * BACKLOG) {
                tries += 1;
                let took = Duration::from_millis(2);
                compression.took(1_000_000, took, took, false);
            }
        }
        assert!((5..30).contains(&tries), "{tries}");
        assert!(!compression.is_worth_it(now, sent, 2 * BACKLOG));
    }

    #[test]
    fn a_link_idles_while_a_slow_compressor_works() {
        let mut compression = Compression::default();
        assert!(!compression.idles(128 << 10, 0), "nothing is known yet");
        let mut now = Instant::now();
        // 100 MB/s.
        for batch in 1..=10 {
            compression.is_worth_it(now, batch * 1_000_000 + 300_000, 300_000);
            now += Duration::from_millis(10);
        }
        // 400 MB/s of a CPU, of which it gets a quarter: a batch takes as long as the link for as many bytes.
        let cpu = Duration::from_micros(2500);
        compression.took(1_000_000, cpu, 4 * cpu, true);
        assert!(compression.idles(100_000, 0));
        assert!(compression.idles(100_000, 100_000));
        assert!(!compression.idles(100_000, 200_000));
    }

    #[test]
    fn a_link_faster_than_the_compressor_gets_plain_ones() {
        assert!(run(1000e6, 400e6, 1000) < 50);
        assert!(run(5000e6, 400e6, 1000) < 50);
    }
}
