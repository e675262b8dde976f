//! Removes what a run that was killed left behind.

use super::{HOST_A, HOST_B, PREFIX, RUN, network};
use crate::progress::say;
use nix::mount::{MntFlags, umount2};
use std::fs;
use std::path::Path;

/// Whether a name was given by a run that has ended.
fn is_dead(name: &str) -> bool {
    let Some(rest) = name.strip_prefix(PREFIX) else {
        return false;
    };
    let Some(Ok(process)) = rest.split('-').next().map(str::parse::<u32>) else {
        return false;
    };
    // The id may have been given to another program since.
    fs::read_to_string(format!("/proc/{process}/comm"))
        .map_or(true, |comm| comm.trim() != "testbed")
}

fn dead_names(folder: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| is_dead(name))
        .collect()
}

/// Removes namespaces and folders of runs that have ended, and the QEMUs that their daemons started: those
/// outlive whoever started them.
pub(super) fn dead_runs() {
    for name in dead_names("/run/netns") {
        say(format!("removing {name}, left by a run that was killed"));
        network::delete(&name);
    }
    for name in dead_names(RUN) {
        let folder = Path::new(RUN).join(name);
        for host in [HOST_A, HOST_B] {
            let _ = umount2(&folder.join(host).join("state"), MntFlags::MNT_DETACH);
        }
        let _ = fs::remove_dir_all(folder);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_ended_runs_are_swept() {
        assert!(!is_dead("transhume-testbed-x-0-hosta"));
        assert!(!is_dead("other-999999999"));
        assert!(is_dead("transhume-testbed-4294967295-0-hosta"));
        // Process 1 lives, but is no test bed.
        assert!(is_dead("transhume-testbed-1-0"));
    }
}
