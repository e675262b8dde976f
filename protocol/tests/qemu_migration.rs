//! Real migrations through the decoder and the encoder, between two processes of an unmodified QEMU.
//!
//! `TRANSHUME_TEST_QEMU` lists the QEMUs to use, separated by colons; without it the installed one is
//! used, and where there is none nothing is tested.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "clippy does not see that helpers belong to tests"
)]

mod common;

use common::relay::{Plan, Record};
use common::{Vm, qemus};
use transhume_protocol::qemu::{CommandKind, Error};

/// Migrates a VM through a relay and compares its memory afterwards.
fn migrate(machine: &str, plan: Plan, capabilities: &[&str]) {
    for qemu in qemus() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = |name: &str| directory.path().join(name);
        let mut source = Vm::start(&qemu, machine, &path("source.ram"), &[]);
        if !capabilities.iter().all(|name| source.has_capability(name)) {
            eprintln!("skipped: {qemu} lacks one of {capabilities:?}");
            continue;
        }
        source.fill_memory();
        let mut destination = Vm::start(
            &qemu,
            machine,
            &path("destination.ram"),
            &["-S", "-incoming", "defer"],
        );
        for vm in [&mut source, &mut destination] {
            vm.set_capabilities(&[&["return-path"], capabilities].concat());
        }
        destination.listen(&path("destination.sock"));
        let relay = common::relay::start(&path("source.sock"), &path("destination.sock"), plan);
        source.migrate(&path("source.sock"));
        if capabilities.contains(&"postcopy-ram") {
            source.execute("migrate-start-postcopy", &serde_json::json!({}));
        }
        let record = relay.join().expect("the relay failed");
        source.await_migration("completed");
        destination.await_migration("completed");
        check(&record, plan, machine);
        if capabilities.contains(&"postcopy-ram") {
            check_post_copy(&record);
        }
        if capabilities.contains(&"switchover-ack") {
            assert!(record.messages.contains(&"SwitchoverAck".to_owned()));
        }
        assert!(source.memory() == destination.memory(), "{qemu}: {machine}");
    }
}

/// What every record of a migration has.
fn check(record: &Record, plan: Plan, machine: &str) {
    assert!(record.machine.starts_with(machine), "{}", record.machine);
    assert!(
        record
            .blocks
            .iter()
            .any(|block| block.length == common::MEMORY)
    );
    assert!(record.pages >= common::FILLED_PAGES, "{}", record.pages);
    assert!(record.zero_pages > 0);
    assert!(record.commands.contains(&CommandKind::OpenReturnPath));
    assert!(record.memory_is_whole);
    assert!(record.messages.contains(&"Pong { number: 1 }".to_owned()));
    assert_eq!(record.messages.last().unwrap(), "Shut { error: 0 }");
    if plan == Plan::HoldBack {
        assert!(record.held_back >= common::FILLED_PAGES / 4);
    }
}

fn check_post_copy(record: &Record) {
    for kind in [
        CommandKind::PostcopyAdvise,
        CommandKind::PostcopyRamDiscard,
        CommandKind::Packaged,
    ] {
        assert!(record.commands.contains(&kind), "{kind:?}");
    }
    assert!(record.packages > 0);
    assert!(record.end_of_stream);
}

#[test]
fn pc_as_it_is() {
    migrate("pc-i440fx", Plan::AsItIs, &[]);
}

#[test]
fn q35_as_it_is() {
    migrate("pc-q35", Plan::AsItIs, &[]);
}

#[test]
fn q35_with_pages_put_in_at_the_end() {
    migrate("pc-q35", Plan::HoldBack, &[]);
}

#[test]
fn post_copy() {
    migrate("pc-q35", Plan::AsItIs, &["postcopy-ram"]);
}

#[test]
fn switchover_ack() {
    migrate("pc-q35", Plan::AsItIs, &["switchover-ack"]);
}

/// The decoder refuses a stream with this capability, and the VM runs on at the source. QEMUs without the
/// capability `only_with` are passed over.
fn refused(capability: &'static str, only_with: &str) {
    for qemu in qemus() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = |name: &str| directory.path().join(name);
        let mut source = Vm::start(&qemu, "pc-q35", &path("source.ram"), &[]);
        if !source.has_capability(only_with) {
            continue;
        }
        source.set_capabilities(&[capability]);
        let relay = common::relay::start_alone(&path("source.sock"));
        source.migrate(&path("source.sock"));
        assert_eq!(relay.join().unwrap(), Error::Capability(capability.into()));
        source.await_migration("failed");
        assert_eq!(source.status(), "running");
    }
}

#[test]
fn shared_memory_left_out_is_refused() {
    refused("x-ignore-shared", "x-ignore-shared");
}

/// QEMU 7.2 gives no sign of it in the stream; versions that know switchover-ack do.
#[test]
fn multifd_is_refused() {
    refused("multifd", "switchover-ack");
}
