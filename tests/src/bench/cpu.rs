//! What processes cost: CPU time by the kernel's count, all threads, in user and kernel mode.

use nix::unistd::{SysconfVar, sysconf};
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// How often processes are looked at that may end on their own.
const EVERY: Duration = Duration::from_millis(20);

/// The CPU time that a process has taken so far, its children's left out, in seconds.
pub(super) fn seconds(process: i32) -> Option<f64> {
    let ticks = ticks(&fs::read_to_string(format!("/proc/{process}/stat")).ok()?)?;
    let a_second = sysconf(SysconfVar::CLK_TCK).ok()??;
    #[expect(clippy::cast_precision_loss, reason = "counts far below 2^52")]
    Some(ticks as f64 / a_second as f64)
}

/// User and system time (fields 14 and 15 of `proc_pid_stat(5)`); the name may hold anything.
fn ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

/// Whether a process is the QEMU of a guest.
pub(super) fn is_guest(process: i32) -> bool {
    let line = fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
    line.split(|byte| *byte == 0).any(|word| word == b"-name")
}

/// Looks at processes again and again, so that the cost of one that ends is known to its end.
pub(super) struct Watch {
    spent: Arc<Mutex<Vec<(i32, f64)>>>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Counts from now on what these take, and from its first moment on what a guest's QEMU takes that
    /// `others` names later.
    pub(super) fn start(known: &[i32], others: impl Fn() -> Vec<i32> + Send + 'static) -> Self {
        let before: Vec<(i32, f64)> = known
            .iter()
            .map(|&process| (process, seconds(process).unwrap_or(0.0)))
            .collect();
        let spent = Arc::new(Mutex::new(
            known
                .iter()
                .map(|&process| (process, 0.0))
                .collect::<Vec<_>>(),
        ));
        let over = Arc::new(AtomicBool::new(false));
        let (sink, flag) = (Arc::clone(&spent), Arc::clone(&over));
        let thread = std::thread::spawn(move || {
            let mut found = None;
            loop {
                let last = flag.load(Ordering::Relaxed);
                found = found.or_else(|| others().into_iter().find(|&process| is_guest(process)));
                let mut spent = sink.lock().unwrap_or_else(PoisonError::into_inner).clone();
                if let Some(found) = found
                    && !spent.iter().any(|(process, _)| *process == found)
                {
                    spent.push((found, 0.0));
                }
                for (process, sum) in &mut spent {
                    let zero = before.iter().find(|(known, _)| known == process);
                    if let Some(now) = seconds(*process) {
                        // Of one that is being reaped the kernel says 0.
                        *sum = f64::max(*sum, now - zero.map_or(0.0, |(_, before)| *before));
                    }
                }
                *sink.lock().unwrap_or_else(PoisonError::into_inner) = spent;
                if last {
                    return;
                }
                std::thread::sleep(EVERY);
            }
        });
        Self {
            spent,
            over,
            thread: Some(thread),
        }
    }

    /// What each took, in seconds: the known ones in their order, then the other.
    pub(super) fn end(mut self) -> Vec<f64> {
        self.stop();
        let spent = self.spent.lock().unwrap_or_else(PoisonError::into_inner);
        spent.iter().map(|(_, seconds)| *seconds).collect()
    }

    fn stop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // Nothing depends on how it ended.
            let _ = thread.join();
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_counted_behind_the_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 10 11 12 13 250 50 14 15 20 0 3 0 99 4096";
        assert_eq!(ticks(stat), Some(300));
        assert_eq!(ticks("nothing"), None);
    }

    #[test]
    fn what_this_process_takes_grows() {
        let own = std::process::id().cast_signed();
        let watch = Watch::start(&[own], Vec::new);
        let begun = seconds(own).unwrap();
        while seconds(own).unwrap() < begun + 0.05 {}
        let spent = watch.end();
        assert!(spent.len() == 1 && spent[0] >= 0.05, "{spent:?}");
    }
}
