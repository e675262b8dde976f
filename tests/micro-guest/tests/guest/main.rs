//! The micro-guest under stock QEMU: what the other tests rely on.
//!
//! `QEMU` names another QEMU than the one in the path.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests are tests"
)]

mod agent;
mod machine;

use machine::{LONG, Setting};
use micro_guest::control::Checked;
use std::thread::sleep;
use std::time::Duration;

fn boots(machine: &'static str) {
    let setting = Setting::new(machine, "262152K", "seed=3 cache=48M data=32M zero=rest");
    let mut guest = setting.start(false);
    let checked = guest.control.check(LONG).unwrap();
    assert!(
        matches!(checked, Checked::Right { pages } if pages > 200 << 20 >> 12),
        "{checked:?}"
    );
    for page in [0, 777, 31_111] {
        let pfn = guest.control.corrupt(page, LONG).unwrap();
        let checked = guest.control.check(LONG).unwrap();
        assert!(
            matches!(checked, Checked::Wrong { count: 1, first, .. } if first == pfn),
            "page {pfn} was corrupted: {checked:?}"
        );
        // Flips the bit back.
        guest.control.corrupt(page, LONG).unwrap();
        assert!(matches!(
            guest.control.check(LONG).unwrap(),
            Checked::Right { .. }
        ));
    }
}

#[test]
fn boots_on_pc_and_finds_corrupt_pages() {
    boots("pc");
}

#[test]
fn boots_on_q35_and_finds_corrupt_pages() {
    boots("q35");
}

#[test]
fn pages_change_and_stay_right() {
    let setting = Setting::new("q35", "128M", "cache=32M data=16M disk-offset=63");
    let mut guest = setting.start(false);
    guest.control.dirty(8 << 20, LONG).unwrap();
    guest.control.dirty_cache(4 << 20, LONG).unwrap();
    guest.control.churn(2 << 20, LONG).unwrap();
    let status = machine::retry(|| {
        let status = guest.control.status(LONG).unwrap();
        (status.dirtied > 1000 && status.cache_dirtied > 500 && status.churned > 100)
            .then_some(status)
    });
    assert_eq!(status.read_errors, 0);
    assert!(matches!(
        guest.control.check(LONG).unwrap(),
        Checked::Right { .. }
    ));
    guest.control.stop(LONG).unwrap();
    let stopped = guest.control.status(LONG).unwrap();
    sleep(Duration::from_millis(100));
    assert_eq!(guest.control.status(LONG).unwrap().dirtied, stopped.dirtied);
}

/// Moves a guest that writes 20 MB/s by stock QEMU, and checks it there.
fn migrates(machine: &'static str, memory: &'static str) {
    let setting = Setting::new(
        machine,
        memory,
        "cache=48M data=32M rate=20M cache-rate=1M churn=512K",
    );
    let mut source = setting.start(false);
    let mut destination = setting.start(true);
    source.control.heartbeat(true, LONG).unwrap();
    let pong = source.control.ping(LONG).unwrap();
    let before = source.control.status(LONG).unwrap();
    source.migrate_to(&destination, 64 << 20);
    assert_eq!(
        destination.control.ping(LONG).unwrap(),
        pong + 1,
        "the guest itself came over"
    );
    let last = source
        .control
        .heartbeats(Duration::from_millis(100))
        .unwrap()
        .pop()
        .unwrap()
        .number;
    let after = destination.control.status(LONG).unwrap();
    assert!(after.dirtied > before.dirtied);
    let checked = destination.control.check(LONG).unwrap();
    assert!(matches!(checked, Checked::Right { .. }), "{checked:?}");
    let beats = destination
        .control
        .heartbeats(Duration::from_millis(200))
        .unwrap();
    let numbers: Vec<u64> = beats.iter().map(|beat| beat.number).collect();
    assert!(
        numbers.first() > Some(&last) && numbers.is_sorted_by(|a, b| a < b),
        "{last} at the source, then {numbers:?}"
    );
    assert!(
        source.control.ping(Duration::from_millis(300)).is_err(),
        "the source still runs"
    );
}

#[test]
fn migrates_on_pc() {
    migrates("pc", "262152K");
}

#[test]
fn migrates_on_q35() {
    migrates("q35", "262152K");
}

#[test]
fn migrates_above_4_gib_on_pc() {
    migrates("pc", "5242888K");
}

#[test]
fn migrates_above_4_gib_on_q35() {
    migrates("q35", "5242888K");
}
