//! The integration tests: scenarios with real QEMUs, each by a name, in a process of its own and with a bound on its
//! time. Which may run beside which, and which take turns, is in `schedule`.

mod failures;
pub(crate) mod fixture;
mod guest;
mod nested;
mod other_hosts;
mod post_copy;
mod pre_copy;
mod refusals;
pub mod runner;
pub mod schedule;
mod test_bed;

pub use fixture::bed::{Bed, Draw};
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
        test_bed::apart::scenarios(),
        guest::linux::scenarios(),
        test_bed::missed_pages::scenarios(),
        pre_copy::migrate::scenarios(),
        pre_copy::channels::scenarios(),
        pre_copy::converge::scenarios(),
        pre_copy::choice::scenarios(),
        post_copy::moves::scenarios(),
        post_copy::stress::scenarios(),
        guest::clock::scenarios(),
        post_copy::gate::scenarios(),
        post_copy::hand_over::scenarios(),
        post_copy::order::scenarios(),
        guest::lies::scenarios(),
        failures::die::scenarios(),
        guest::ends::scenarios(),
        failures::broken_start::scenarios(),
        failures::any_moment::scenarios(),
        failures::random::scenarios(),
        other_hosts::confined::scenarios(),
        refusals::hosts::scenarios(),
        refusals::storage::scenarios(),
        other_hosts::peers::scenarios(),
        other_hosts::strangers::scenarios(),
        other_hosts::false_source::scenarios(),
        other_hosts::flood::scenarios(),
        nested::scenarios(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Those that `cargo testbed test --all` runs besides.
pub fn long() -> Vec<Scenario> {
    [
        pre_copy::migrate::long_scenarios(),
        post_copy::moves::long_scenarios(),
        failures::random::long_scenarios(),
        nested::long_scenarios(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
