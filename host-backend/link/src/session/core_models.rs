//! The interleavings of a session's threads at what they share, tried by loom.

use std::time::Duration;

use loom::sync::Arc;
use loom::thread::{self, JoinHandle};
use transhume_protocol::link::{FrameKind, Numbering, SESSION_WINDOW};

use super::outbox::Prepared;
use super::{inbox, outbox};
use crate::window_models::window;
use crate::{Error, Frame};
use transhume_testing::model_sync::{self as sync, model};

#[path = "core.rs"]
#[allow(dead_code, reason = "not all of it waits")]
#[expect(clippy::duplicate_mod, reason = "once with each kind of primitives")]
mod core;

use self::core::{Core, Job};

/// Longer than the models' clock goes.
const LONG: Duration = Duration::from_secs(3600);
/// A frame that leaves no room for another one.
#[expect(clippy::cast_possible_truncation, reason = "16 MiB")]
const FULL: usize = SESSION_WINDOW as usize;

/// What ends a connection; there is none.
struct Closer;

impl Closer {
    #[expect(clippy::unused_self, reason = "as the one of a connection")]
    fn close(&self) {}
}

type Shared = Arc<Core<u64>>;

fn session() -> Shared {
    Arc::new(Core::new(LONG))
}

fn spawn<T: 'static>(core: &Shared, run: impl FnOnce(&Core<u64>) -> T + 'static) -> JoinHandle<T> {
    let core = core.clone();
    thread::spawn(move || run(&core))
}

/// The next frame that a connection sends: its number, and what was pushed.
fn send(core: &Core<u64>, carrier: u64) -> Option<(u64, u64)> {
    loop {
        match core.next(carrier) {
            Job::Fresh(numbering, value) => {
                let payload = value.to_le_bytes().to_vec();
                let frame = Prepared::new(FrameKind::Batch, payload);
                core.prepared(numbering.number, std::sync::Arc::new(frame));
                return Some((numbering.number, value));
            }
            Job::Again(numbering, frame) => {
                let payload = frame.slices().concat();
                let value = u64::from_le_bytes(payload.try_into().unwrap());
                return Some((numbering.number, value));
            }
            Job::Alive(_) => {}
            Job::Bye(_) | Job::Gone => return None,
        }
    }
}

/// The peer says that it has worked off all frames up to this one.
fn worked_off(core: &Core<u64>, taken: u64) {
    let alive = Frame {
        kind: FrameKind::Alive,
        payload: Vec::new().into(),
    };
    core.arrive(alive, Numbering { number: 0, taken }).unwrap();
}

fn arrive(core: &Core<u64>, number: u64, length: usize) {
    let frame = Frame {
        kind: FrameKind::Batch,
        payload: vec![u8::try_from(number).unwrap(); length].into(),
    };
    core.arrive(frame, Numbering { number, taken: 0 }).unwrap();
}

#[test]
fn a_full_window_opens_when_the_peer_has_worked_off() {
    model(|| {
        let core = session();
        let carrier = core.attach(0, Closer).unwrap();
        let producer = spawn(&core, |core| {
            core.push(7, FULL, 0).unwrap();
            core.push(8, FULL, 0).unwrap();
        });
        assert_eq!(send(&core, carrier), Some((1, 7)));
        worked_off(&core, 1);
        assert_eq!(send(&core, carrier), Some((2, 8)));
        producer.join().unwrap();
    });
}

#[test]
fn what_a_frame_does_not_keep_any_more_is_room_for_the_next() {
    model(|| {
        let core = session();
        let carrier = core.attach(0, Closer).unwrap();
        // Both keep much until they are prepared.
        let producer = spawn(&core, |core| {
            core.push(7, 8, FULL).unwrap();
            core.push(8, 8, FULL / 2).unwrap();
        });
        assert_eq!(send(&core, carrier), Some((1, 7)));
        assert_eq!(send(&core, carrier), Some((2, 8)));
        producer.join().unwrap();
    });
}

#[test]
fn frames_wait_for_a_connection() {
    model(|| {
        let core = session();
        let connection = spawn(&core, |core| {
            let carrier = core.attach(0, Closer).unwrap();
            for value in [7, 8, 9] {
                assert_eq!(send(core, carrier).unwrap().1, value);
            }
        });
        for value in [7, 8, 9] {
            core.push(value, 1, 0).unwrap();
        }
        connection.join().unwrap();
    });
}

#[test]
fn what_a_broken_connection_took_goes_over_another() {
    model(|| {
        let core = session();
        let [first, second] = [0, 1].map(|index| core.attach(index, Closer).unwrap());
        core.push(7, 1, 0).unwrap();
        core.push(8, 1, 0).unwrap();
        let sender = spawn(&core, move |core| while send(core, first).is_some() {});
        let reader = spawn(&core, move |core| core.broken(first, Error::Closed));
        let mut sent = [send(&core, second), send(&core, second)];
        sent.sort_unstable();
        assert_eq!(sent, [Some((1, 7)), Some((2, 8))]);
        sender.join().unwrap();
        reader.join().unwrap();
    });
}

#[test]
fn what_a_displaced_connection_took_goes_over_its_successor() {
    model(|| {
        let core = session();
        let first = core.attach(0, Closer).unwrap();
        core.push(7, 1, 0).unwrap();
        let sender = spawn(&core, move |core| while send(core, first).is_some() {});
        core.displace(0);
        core.peer_received(0).unwrap();
        let second = core.attach(0, Closer).unwrap();
        assert_eq!(send(&core, second), Some((1, 7)));
        sender.join().unwrap();
    });
}

#[test]
fn frames_are_handed_out_once_and_in_order() {
    model(|| {
        let core = session();
        let connections = [&[2, 1][..], &[1, 3][..]].map(|numbers| {
            spawn(&core, move |core| {
                for number in numbers {
                    arrive(core, *number, 1);
                }
            })
        });
        for number in 1..=3 {
            assert_eq!(*core.receive().unwrap().payload, [number]);
        }
        for connection in connections {
            connection.join().unwrap();
        }
        // What came before the end is handed out after it.
        arrive(&core, 4, 1);
        core.close();
        arrive(&core, 5, 1);
        assert_eq!(*core.receive().unwrap().payload, [4]);
        assert!(core.receive().is_err());
    });
}

#[test]
fn the_peer_hears_what_was_worked_off() {
    model(|| {
        let core = session();
        let carrier = core.attach(0, Closer).unwrap();
        // An eighth of the window.
        arrive(&core, 1, FULL / 8);
        let receiver = spawn(&core, |core| drop(core.receive().unwrap()));
        match core.next(carrier) {
            Job::Alive(numbering) => assert_eq!(numbering.taken, 1),
            _ => panic!("nothing else is to be said"),
        }
        receiver.join().unwrap();
    });
}

#[test]
fn a_drain_ends_with_the_last_frame() {
    model(|| {
        let core = session();
        let carrier = core.attach(0, Closer).unwrap();
        core.push(7, 1, 0).unwrap();
        let connection = spawn(&core, move |core| {
            send(core, carrier).unwrap();
            worked_off(core, 1);
        });
        core.drain(LONG);
        connection.join().unwrap();
    });
}

#[test]
fn the_end_ends_every_wait() {
    model(|| {
        let core = session();
        let carrier = core.attach(0, Closer).unwrap();
        core.push(7, FULL, 0).unwrap();
        let producer = spawn(&core, |core| assert!(core.push(8, FULL, 0).is_err()));
        let receiver = spawn(&core, |core| assert!(core.receive().is_err()));
        core.fail(Error::Silent);
        assert!(matches!(core.next(carrier), Job::Bye(_)));
        producer.join().unwrap();
        receiver.join().unwrap();
    });
}

#[test]
fn a_good_bye_of_the_peer_ends_every_wait() {
    model(|| {
        let core = session();
        let carrier = core.attach(0, Closer).unwrap();
        let sender = spawn(&core, move |core| {
            while send(core, carrier).is_some() {}
            core.forget(carrier);
        });
        let bye = Frame {
            kind: FrameKind::Bye,
            payload: Vec::new().into(),
        };
        let numbering = Numbering {
            number: 0,
            taken: 0,
        };
        core.arrive(bye, numbering).unwrap();
        core.wait_for_end(LONG);
        core.pause(LONG);
        core.drain(LONG);
        sender.join().unwrap();
    });
}
