//! Runs one scenario.

use super::{Bed, Scenario};
use crate::progress::say;
use crate::{Error, cleanup};
use serde::{Deserialize, Serialize};
use std::fs;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Instant;

/// How stock QEMU's translator ends of itself, in one boot of some hundreds: a vCPU that writes to a device
/// while another moves a BAR finds its entry of the TLB in the new memory map, thus at another device's registers
/// (`iotlb_to_section` against `tcg_commit`; hw/pci/msix.c then asserts). KVM has no such path.
const TRANSLATOR_ENDED: &str = "msix_table_mmio_write: Assertion";

/// What came of a part of the suite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// All held.
    Passed,
    /// Something of ours did not.
    Failed,
    /// The machine, a download or somebody else's program stood in the way: nothing is known of ours.
    Machinery,
}

/// A part of the suite that has ended.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Finished {
    /// What came of it.
    pub outcome: Outcome,
    /// How long it took, in seconds.
    pub seconds: f64,
    /// Why it did not pass.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub why: String,
}

impl Finished {
    /// From how something ended that began then.
    pub fn new(result: Result<(), Error>, begun: Instant) -> Self {
        let (outcome, why) = match result {
            Ok(()) => (Outcome::Passed, String::new()),
            Err(error) if error.is_machinery() => (Outcome::Machinery, error.to_string()),
            Err(error) => (Outcome::Failed, error.to_string()),
        };
        Self {
            outcome,
            seconds: (begun.elapsed().as_secs_f64() * 10.0).round() / 10.0,
            why,
        }
    }
}

/// Runs a scenario. When the translator dies of itself, once more.
pub fn run(bed: &Bed, scenario: &Scenario) -> Finished {
    let begun = Instant::now();
    let killed = killed_for_memory();
    let mut result = run_one(bed, scenario);
    if let Err(error) = &result
        && error.to_string().contains(TRANSLATOR_ENDED)
    {
        println!(
            "  stock QEMU ended by an assertion of its own, nothing of ours: once more ({error})"
        );
        result = run_one(bed, scenario);
    }
    let result = result.map_err(|error| {
        if error.to_string().contains(TRANSLATOR_ENDED) {
            return Error::machine(
                format!("Stock QEMU ended by an assertion of its own, twice: {error}"),
                "Run it again",
            );
        }
        if killed_for_memory() > killed {
            return Error::machine(
                format!("The kernel ended processes, as there was no memory left: {error}"),
                "Give the machine more memory, or run less beside the tests",
            );
        }
        error
    });
    Finished::new(result, begun)
}

/// How many processes this machine's kernel has ended, for want of memory, since it started.
fn killed_for_memory() -> u64 {
    let text = fs::read_to_string("/proc/vmstat").unwrap_or_default();
    let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
    count.and_then(|count| count.parse().ok()).unwrap_or(0)
}

/// When its time is up, what it started is killed, so that it fails by itself.
fn run_one(bed: &Bed, scenario: &Scenario) -> Result<(), Error> {
    let (done, waiting) = channel::<()>();
    let limit = scenario.limit;
    let result = std::thread::scope(|scope| {
        let watchdog = scope.spawn(move || {
            let late = waiting.recv_timeout(limit) == Err(RecvTimeoutError::Timeout);
            if late {
                say(format!("more than {} s: giving up", limit.as_secs()));
                cleanup::expire();
            }
            late
        });
        let result = (scenario.run)(bed);
        drop(done);
        if watchdog.join().unwrap_or(false) {
            return Err(Error::Late {
                what: scenario.name.to_owned(),
                seconds: limit.as_secs(),
                hint: result
                    .err()
                    .map_or(String::new(), |error| format!("It was at: {error}")),
            });
        }
        result
    });
    cleanup::renew();
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[test]
    fn a_failure_of_the_machine_is_not_one_of_ours() {
        let end = |error| Finished::new(Err(error), Instant::now()).outcome;
        assert_eq!(end(Error::Check("two run".into())), Outcome::Failed);
        assert_eq!(end(Error::machine("No mirror", "…")), Outcome::Machinery);
        let full = io::Error::from_raw_os_error(nix::libc::ENOSPC);
        assert_eq!(end(Error::file("write", "/x")(full)), Outcome::Machinery);
        let missing = io::Error::from_raw_os_error(nix::libc::ENOENT);
        assert_eq!(end(Error::file("read", "/x")(missing)), Outcome::Failed);
    }
}
