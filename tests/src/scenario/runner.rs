//! Runs scenarios in sequence.

use super::{Bed, Scenario};
use crate::progress::say;
use crate::{Error, cleanup};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Instant;

/// How stock QEMU's translator ends of itself, in one boot of some hundreds: a vCPU that writes to a device
/// while another moves a BAR finds its entry of the TLB in the new memory map, thus at another device's registers
/// (`iotlb_to_section` against `tcg_commit`; hw/pci/msix.c then asserts). KVM has no such path.
const TRANSLATOR_ENDED: &str = "msix_table_mmio_write: Assertion";

/// How many passed and failed.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// Tests that passed.
    pub passed: usize,
    /// Tests that failed.
    pub failed: usize,
}

/// Runs scenarios; every one is run, whatever the others do.
pub fn run_all(bed: &Bed, scenarios: &[Scenario]) -> Outcome {
    let mut outcome = Outcome::default();
    for scenario in scenarios {
        println!("test {}: {}", scenario.name, scenario.about);
        let start = Instant::now();
        let mut result = run_one(bed, scenario);
        if let Err(error) = &result
            && error.to_string().contains(TRANSLATOR_ENDED)
        {
            println!(
                "  stock QEMU ended by an assertion of its own, nothing of ours: once more ({error})"
            );
            result = run_one(bed, scenario);
        }
        match result {
            Ok(()) => {
                outcome.passed += 1;
                println!(
                    "test {} ... ok ({:.0} s)",
                    scenario.name,
                    start.elapsed().as_secs_f64()
                );
            }
            Err(error) => {
                outcome.failed += 1;
                println!("test {} ... FAILED: {error}", scenario.name);
            }
        }
    }
    outcome
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
