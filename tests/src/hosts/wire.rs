//! What the link carries, by the interface's own counters.

use crate::{Error, Result};
use nix::sched::{CloneFlags, setns};
use std::fs::{self, File};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

/// How often the counters are read.
const EVERY: Duration = Duration::from_millis(50);

/// What had gone over the link at a moment, both ways, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    /// When.
    pub at: SystemTime,
    /// How much, since the namespace was made.
    pub bytes: u64,
}

/// Reads a host's interface counters until it is dropped.
#[derive(Debug)]
pub struct Wire {
    samples: Arc<Mutex<Vec<Sample>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Wire {
    /// Starts a thread that lives in the namespace.
    pub(super) fn watch(namespace: &Path) -> Result<Self> {
        let file = File::open(namespace).map_err(Error::file("open", namespace))?;
        let samples = Arc::new(Mutex::new(Vec::new()));
        let stop = Arc::new(AtomicBool::new(false));
        let (sink, flag) = (Arc::clone(&samples), Arc::clone(&stop));
        let thread = std::thread::Builder::new()
            .name("wire".into())
            .spawn(move || {
                if setns(file, CloneFlags::CLONE_NEWNET).is_err() {
                    return;
                }
                while !flag.load(Ordering::Relaxed) {
                    if let Some(bytes) = read_counters() {
                        let sample = Sample {
                            at: SystemTime::now(),
                            bytes,
                        };
                        sink.lock()
                            .unwrap_or_else(PoisonError::into_inner)
                            .push(sample);
                    }
                    std::thread::sleep(EVERY);
                }
            })
            .map_err(Error::system("start a thread"))?;
        Ok(Self {
            samples,
            stop,
            thread: Some(thread),
        })
    }

    /// All samples so far.
    pub fn samples(&self) -> Vec<Sample> {
        self.samples
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// The bytes carried between two moments.
    pub fn bytes_between(&self, from: SystemTime, to: SystemTime) -> u64 {
        let samples = self.samples();
        let at = |when: SystemTime, after: bool| {
            let place = samples.partition_point(|sample| sample.at <= when);
            let place = if after {
                place.min(samples.len().saturating_sub(1))
            } else {
                place.saturating_sub(1)
            };
            samples.get(place).map_or(0, |sample| sample.bytes)
        };
        at(to, true).saturating_sub(at(from, false))
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Received and sent by this thread's `eth0`.
fn read_counters() -> Option<u64> {
    parse(&fs::read_to_string("/proc/thread-self/net/dev").ok()?)
}

fn parse(text: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.trim_start().strip_prefix("eth0:"))?;
    let fields: Vec<u64> = line
        .split_whitespace()
        .map_while(|word| word.parse().ok())
        .collect();
    Some(fields.first()? + fields.get(8)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read() {
        let text = "Inter-| Receive | Transmit\n face |bytes packets\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n\
                    \x20 eth0: 1000 9 0 0 0 0 0 0 234 2 0 0 0 0 0 0\n";
        assert_eq!(parse(text), Some(1234));
        assert_eq!(parse("nothing"), None);
    }
}
