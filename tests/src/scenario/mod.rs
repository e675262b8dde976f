//! The integration tests: scenarios with real QEMUs, each by a name, in a process of its own and with a bound on its
//! time. Which may run beside which, and which take turns, is in `schedule`.

mod any_moment;
mod apart;
mod bed;
mod broken_start;
mod channels;
mod choice;
mod clock;
mod confined;
mod converge;
mod copies;
mod die;
mod fake_host;
mod false_source;
mod flood;
mod gate;
mod guest;
mod guest_ends;
mod hand_over;
mod lie;
pub(crate) mod micro;
mod migrate;
mod missed_pages;
mod nested;
mod order;
mod pair;
mod peers;
mod postcopy;
mod random_failures;
mod refused;
pub mod runner;
pub mod schedule;
mod storage;
mod strangers;
mod stress;
mod transhume;

pub use bed::{Bed, Draw};
pub use nested::inside as inside_nested_host;
pub use runner::{Finished, Outcome};
pub use schedule::Lane;

use crate::Result;
use std::time::Duration;

/// One test.
pub struct Scenario {
    /// For `--only`.
    pub name: &'static str,
    /// What must hold.
    pub about: &'static str,
    /// When it is given up.
    pub limit: Duration,
    /// The test itself.
    pub run: fn(&Bed) -> Result<()>,
}

/// Those of every test, in the order in which they run.
pub fn all() -> Vec<Scenario> {
    [
        apart::scenarios(),
        guest::scenarios(),
        missed_pages::scenarios(),
        migrate::scenarios(),
        channels::scenarios(),
        converge::scenarios(),
        choice::scenarios(),
        postcopy::scenarios(),
        stress::scenarios(),
        clock::scenarios(),
        gate::scenarios(),
        hand_over::scenarios(),
        order::scenarios(),
        lie::scenarios(),
        die::scenarios(),
        guest_ends::scenarios(),
        broken_start::scenarios(),
        any_moment::scenarios(),
        random_failures::scenarios(),
        confined::scenarios(),
        refused::scenarios(),
        storage::scenarios(),
        peers::scenarios(),
        strangers::scenarios(),
        false_source::scenarios(),
        flood::scenarios(),
        nested::scenarios(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Those that `cargo testbed test --all` runs besides.
pub fn long() -> Vec<Scenario> {
    [
        migrate::long_scenarios(),
        postcopy::long_scenarios(),
        random_failures::long_scenarios(),
        nested::long_scenarios(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
