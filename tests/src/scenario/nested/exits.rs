//! What a virtual CPU that does not answer is at, as a host's KVM tells of it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

const EVENTS: &str = "/sys/kernel/tracing/events/kvm/enable";
const TRACE: &str = "/sys/kernel/tracing/trace";
/// How long it is watched.
const WATCHED: Duration = Duration::from_secs(1);
/// How many of the last events are shown.
const SHOWN: usize = 40;

/// All events of KVM within a second: how many of which kind, and the last ones.
pub(super) fn words() -> String {
    let turn = |on: &str| fs::write(Path::new(EVENTS), on);
    // Whatever is written to it empties it.
    if fs::write(TRACE, "\n").and_then(|()| turn("1")).is_err() {
        return "KVM's events cannot be had.".into();
    }
    std::thread::sleep(WATCHED);
    // What is left of it when this fails does no harm: the host is about to end.
    drop(turn("0"));
    summed(&fs::read_to_string(TRACE).unwrap_or_default())
}

fn summed(trace: &str) -> String {
    let events: Vec<&str> = trace
        .lines()
        .filter(|line| !line.starts_with('#'))
        .collect();
    let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
    for event in &events {
        let Some((_, event)) = event.split_once(": ") else {
            continue;
        };
        let words = if event.starts_with("kvm_exit") { 4 } else { 1 };
        let kind: Vec<&str> = event.split_whitespace().take(words).collect();
        *kinds.entry(kind.join(" ")).or_default() += 1;
    }
    let last = events[events.len().saturating_sub(SHOWN)..].join("\n");
    format!("KVM's events within a second: {kinds:?}. The last ones:\n{last}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exits_are_told_by_their_reason() {
        let trace = "# tracer: nop\n\
            CPU 0/KVM-91  [001] ..... 7.1: kvm_exit: vcpu 0 reason hlt rip 0x1\n\
            CPU 0/KVM-91  [001] ..... 7.2: kvm_exit: vcpu 0 reason hlt rip 0x2\n\
            CPU 0/KVM-91  [001] ..... 7.3: kvm_entry: vcpu 0, rip 0x1\n";
        let text = summed(trace);
        assert!(text.contains("\"kvm_entry:\": 1"), "{text}");
        assert!(text.contains(": 2"), "{text}");
    }
}
