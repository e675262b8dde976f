//! How scenarios share the machine, and which of them take turns.

use Lane::{Alone, Waits};

/// Beside what a scenario may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// It uses the machine's CPUs: beside one that waits, or a short one at the end.
    Computes,
    /// It mostly waits, for a slow link or until something is given up: beside any other.
    Waits,
    /// Beside nothing.
    Alone,
}

/// What a scenario is, unless it computes: by its name, or by how that begins.
const LANES: &[(&str, Lane)] = &[
    // A whole host under the translator; when it is slow, its guest's agent is silent for too long.
    ("nested-", Alone),
    // What it chooses goes by how much the guest writes, which is less on a machine that has other work.
    ("choice", Alone),
    ("converge", Waits),
    ("die-at-random", Waits),
    ("die-any-moment-", Waits),
    ("die-at-hand-over-", Waits),
    ("die-in-doubt", Waits),
    ("die-link", Waits),
    ("die-source-", Waits),
    ("guest-ends-", Waits),
    ("die-destination-", Waits),
    ("post-copy-cancel", Waits),
    ("post-copy-daemon-dies", Waits),
    ("post-copy-link-", Waits),
    ("post-copy-lost", Waits),
    ("refused-by-no-daemon", Waits),
    ("refused-strangers", Waits),
];

/// Scenarios that are the same on another kernel or another QEMU, and take long. At a commit one of each group runs: which
/// one, goes by the commit. With `--twins` and `--all` they all do.
pub(crate) const TWINS: &[Group] = &[
    Group::of_kernels(&[
        "guest-6.1-reports-its-page-cache",
        "guest-6.12-reports-its-page-cache",
    ]),
    Group::of_kernels(&["gate-stress-6.1", "gate-stress-6.12"]),
    Group::of_kernels(&["gate-cost-6.1", "gate-cost-6.12"]),
    Group::of_kernels(&["gate-forged-6.1", "gate-forged-6.12"]),
    Group::of_kernels(&["gate-beside-livepatch-6.1", "gate-beside-livepatch-6.12"]),
    Group::of_kernels(&["post-copy-stress-6.1", "post-copy-stress-6.12"]),
    Group::of_qemus(&["post-copy-daemon-dies", "post-copy-daemon-dies-7.2"]),
    Group::of_qemus(&["die-at-random-7.2-to-10.0", "die-at-random-10.0-to-11.1"]),
];

/// Twins.
#[derive(Debug)]
pub(crate) struct Group {
    /// Their names.
    pub(crate) names: &'static [&'static str],
    /// The folder that they are about: all of them run when it has just changed.
    pub(crate) about: Option<&'static str>,
}

impl Group {
    const fn of_kernels(names: &'static [&'static str]) -> Self {
        Self {
            names,
            about: Some("kernel-module"),
        }
    }

    const fn of_qemus(names: &'static [&'static str]) -> Self {
        Self { names, about: None }
    }
}

/// Where a scenario runs.
pub(crate) fn lane(name: &str) -> Lane {
    let found = LANES.iter().find(|(begin, _)| name.starts_with(begin));
    found.map_or(Lane::Computes, |(_, lane)| *lane)
}

#[cfg(test)]
mod tests {
    use super::super::{all, long};
    use super::*;

    #[test]
    fn the_tables_name_scenarios() {
        let names: Vec<&str> = all().iter().chain(&long()).map(|one| one.name).collect();
        for (begin, _) in LANES {
            let any = names.iter().any(|name| name.starts_with(begin));
            assert!(any, "no scenario's name begins with {begin}");
        }
        for name in TWINS.iter().flat_map(|group| group.names) {
            assert!(names.contains(name), "no scenario is called {name}");
        }
    }

    #[test]
    fn no_scenario_has_two_names_or_two_groups() {
        let mut names: Vec<&str> = all().iter().chain(&long()).map(|one| one.name).collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all);
        let mut twins: Vec<&str> = TWINS
            .iter()
            .flat_map(|group| group.names)
            .copied()
            .collect();
        let all = twins.len();
        twins.sort_unstable();
        twins.dedup();
        assert_eq!(twins.len(), all);
    }
}
