//! KVM's own asynchronous page faults, as a host's kernel tells of them.

use crate::error::check;
use crate::{Error, Result};
use std::fs;
use std::path::Path;

const TRACING: &str = "/sys/kernel/tracing";
/// Of each CPU; an event is some 40 bytes.
const BUFFER_KIB: &str = "8192";
/// KVM takes a page in behind a virtual CPU's back (`virt/kvm/async_pf.c`). A guest that does not take part is halted
/// until then.
const TAKEN_IN: &str = "kvm_async_pf_completed";
/// KVM raises an exception in the guest. With nested paging it handles none of the guest's own page faults, so
/// one that it raises says that a page is not there yet.
const RAISED: &str = "kvm_inj_exception";
const PAGE_FAULT: &str = "#PF";
/// The same one again, as the guest had not come to take it.
const AGAIN: &str = "[reinjected]";

/// Asynchronous page faults of all guests since a moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct AsyncFaults {
    /// Pages that were taken in while the virtual CPU did something else, or was halted.
    pub(super) taken_in: usize,
    /// Of those, what the guest was told of: the process sleeps, and the CPU does something else.
    pub(super) told: usize,
}

fn write(name: &str, text: &str) -> Result<()> {
    let path = Path::new(TRACING).join(name);
    fs::write(&path, text).map_err(Error::file("write", &path))
}

/// Begins to count, from nothing.
pub(super) fn begin() -> Result<()> {
    write("buffer_size_kb", BUFFER_KIB)?;
    for event in [TAKEN_IN, RAISED] {
        write(&format!("events/kvm/{event}/enable"), "1")?;
    }
    // Whatever is written to it empties it.
    write("trace", "\n")
}

/// What was counted since.
pub(super) fn count() -> Result<AsyncFaults> {
    let path = Path::new(TRACING).join("trace");
    let text = fs::read_to_string(&path).map_err(Error::file("read", &path))?;
    check(is_whole(&text), || {
        format!("{} does not hold all events", path.display())
    })?;
    Ok(counted(&text))
}

/// `# entries-in-buffer/entries-written: 12/12   #P:2`
fn is_whole(text: &str) -> bool {
    let line = text.lines().find_map(|line| {
        let (_, rest) = line.split_once("entries-written:")?;
        rest.split_whitespace().next()?.split_once('/')
    });
    line.is_some_and(|(held, written)| held == written)
}

fn counted(text: &str) -> AsyncFaults {
    let events = |name: &str, words: &str| {
        let named = format!(" {name}: {words}");
        text.lines()
            .filter(|line| line.contains(&named) && !line.contains(AGAIN))
            .count()
    };
    AsyncFaults {
        taken_in: events(TAKEN_IN, ""),
        told: events(RAISED, PAGE_FAULT),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "# tracer: nop\n#\n# entries-in-buffer/entries-written: 4/4   #P:2\n#\n\
        CPU 0/KVM-91  [001] ..... 7.1: kvm_inj_exception: #PF (0x4)\n\
        CPU 0/KVM-91  [001] ..... 7.1: kvm_inj_exception: #PF (0x4) [reinjected]\n\
        CPU 0/KVM-91  [001] ..... 7.2: kvm_inj_exception: #GP (0x0)\n\
        kworker/1:2-30  [001] ..... 7.3: kvm_async_pf_completed: gva 0x7f0 address 0x1\n";

    #[test]
    fn events_are_counted_by_what_they_are() {
        let found = counted(TRACE);
        assert_eq!((found.taken_in, found.told), (1, 1));
        assert!(is_whole(TRACE));
    }

    #[test]
    fn a_buffer_that_lost_events_is_refused() {
        assert!(!is_whole(&TRACE.replace("4/4", "4/9")));
        assert!(!is_whole(""));
    }
}
