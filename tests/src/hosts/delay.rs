//! A length of wire between the hosts: every packet takes a set time, each way.
//!
//! What netem does where a kernel has it. Here two threads stand between two devices of a namespace of their own.
//! Nothing is changed but the time: addresses, sizes and order stay.

use super::network;
use super::packet::{Device, LONGEST};
use crate::{Error, Result};
use nix::libc;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;
use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What one direction holds at most, in bytes: 1 Gbit/s for 250 ms. What comes beyond is lost.
const MOST: usize = 32 << 20;
/// How often a thread looks whether it is to end.
const GLANCE: Duration = Duration::from_millis(100);

/// The wire, until it is dropped.
#[derive(Debug)]
pub(super) struct Delay {
    over: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Delay {
    /// Between two devices of a namespace.
    pub(super) fn between(namespace: &str, devices: [&str; 2], delay: Duration) -> Result<Self> {
        // The sockets stay in the namespace.
        let opened = network::inside(namespace, || {
            let open = |name| Device::open(name).map(Arc::new);
            Ok([open(devices[0])?, open(devices[1])?])
        })?;
        let [a, b] = opened?;
        let mut wire = Self {
            over: Arc::default(),
            threads: Vec::new(),
        };
        for (from, to) in [(&a, &b), (&b, &a)] {
            let (from, to) = (Arc::clone(from), Arc::clone(to));
            let over = Arc::clone(&wire.over);
            let thread = std::thread::Builder::new()
                .name("wire".into())
                .spawn(move || {
                    come_first();
                    carry(&from, &to, delay, &over);
                })
                .map_err(Error::system("start a thread"))?;
            wire.threads.push(thread);
        }
        Ok(wire)
    }
}

impl Drop for Delay {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // Nothing depends on how it ended.
            let _ = thread.join();
        }
    }
}

/// Before all that computes on this machine: a wire is not slower for it.
fn come_first() {
    let priority = libc::sched_param { sched_priority: 10 };
    // SAFETY: the call reads the structure, which outlives it; 0 is the calling thread. Without the right to it the
    // wire is only less exact.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const priority) };
}

/// Packets on their way, in their order.
#[derive(Debug, Default)]
struct Way {
    packets: VecDeque<(Instant, Vec<u8>)>,
    bytes: usize,
}

impl Way {
    /// Takes a packet that arrives at a moment; says whether there was room.
    fn enter(&mut self, arrives: Instant, packet: &[u8]) -> bool {
        if self.bytes + packet.len() > MOST {
            return false;
        }
        self.bytes += packet.len();
        self.packets.push_back((arrives, packet.to_vec()));
        true
    }

    /// The next packet that has arrived by now.
    fn leave(&mut self, now: Instant) -> Option<Vec<u8>> {
        self.packets
            .front()
            .filter(|(arrives, _)| *arrives <= now)?;
        let (_, packet) = self.packets.pop_front()?;
        self.bytes -= packet.len();
        Some(packet)
    }

    /// How long until the next arrives.
    fn rest(&self, now: Instant) -> Option<Duration> {
        let (arrives, _) = self.packets.front()?;
        Some(arrives.saturating_duration_since(now))
    }
}

fn carry(from: &Device, to: &Device, delay: Duration, over: &AtomicBool) {
    let mut way = Way::default();
    let mut buffer = vec![0; LONGEST];
    while !over.load(Ordering::Relaxed) {
        let rest = way
            .rest(Instant::now())
            .map_or(GLANCE, |rest| rest.min(GLANCE));
        let mut polled = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
        // A signal that interrupts it does no harm.
        let _ = ppoll(&mut polled, Some(TimeSpec::from_duration(rest)), None);
        let mut full = false;
        while let Ok(Some(length)) = from.read(&mut buffer) {
            full |= !way.enter(Instant::now() + delay, &buffer[..length]);
            if full {
                break;
            }
        }
        while let Some(packet) = way.leave(Instant::now()) {
            to.send(&packet);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_leave_in_order_and_not_before_their_time() {
        let now = Instant::now();
        let later = now + Duration::from_millis(10);
        let mut way = Way::default();
        assert!(way.enter(later, b"first") && way.enter(later, b"second"));
        assert_eq!(way.rest(now), Some(Duration::from_millis(10)));
        assert_eq!(way.leave(now), None);
        assert_eq!(way.leave(later).as_deref(), Some(&b"first"[..]));
        assert_eq!(way.leave(later).as_deref(), Some(&b"second"[..]));
        assert_eq!((way.bytes, way.rest(later)), (0, None));
    }

    #[test]
    fn a_full_way_takes_no_more() {
        let now = Instant::now();
        let mut way = Way::default();
        let packet = vec![0; LONGEST];
        let taken = (0..=MOST / LONGEST)
            .filter(|_| way.enter(now, &packet))
            .count();
        assert_eq!(taken, MOST / LONGEST);
        assert!(way.leave(now).is_some() && way.enter(now, &packet));
    }
}
