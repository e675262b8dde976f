//! The interleavings of the source's threads at what waits for the link, tried by loom.

use std::sync::Arc as Held;
use std::time::Duration;

use loom::sync::Arc;
use loom::thread::{self, JoinHandle};
use transhume_protocol::link::{BATCH_HEADER_LEN, BatchEncoding, BatchHeader, Verdict};

use super::{buffers, scan_steering};
use crate::error::RelayError;
use transhume_pages::PageKey;
use transhume_testing::model_sync::{self as sync, model};

#[path = "../../../link/src/window.rs"]
#[allow(dead_code, reason = "not all of it is tried here")]
#[expect(unreachable_pub, reason = "the same file is a public module elsewhere")]
mod window;

#[path = "queue.rs"]
#[allow(dead_code, reason = "not all of it waits")]
#[expect(clippy::duplicate_mod, reason = "once with each kind of primitives")]
mod queue;

use self::queue::{Content, Next, Outgoing, SendQueue};

impl From<window::WindowError> for RelayError {
    fn from(_: window::WindowError) -> Self {
        Self::Misplaced("bytes in the model's window")
    }
}

/// Longer than the models' clock goes.
const LONG: Duration = Duration::from_secs(3600);
/// As many batches wait at most, and as many are referred to.
const BATCHES: u64 = 64;

fn spawn(flow: &Arc<SendQueue>, run: impl FnOnce(&SendQueue) + 'static) -> JoinHandle<()> {
    let flow = flow.clone();
    thread::spawn(move || run(&flow))
}

fn batch(number: u64, data: usize) -> Outgoing {
    Outgoing {
        header: BatchHeader {
            number,
            encoding: BatchEncoding::Plain,
            records_len: 0,
            data_len: data,
        },
        records: Vec::new(),
        buffer: None,
        data: Vec::new(),
    }
}

/// Batches with one reference each.
fn refer(flow: &SendQueue, batches: u64) {
    let pool = Held::new(buffers::Pool::default());
    let buffer = Held::new(pool.take());
    for number in 0..batches {
        let page = Content {
            key: PageKey {
                block: 0,
                page: number,
            },
            offset: 0,
        };
        let outgoing = Outgoing {
            buffer: Some(Held::clone(&buffer)),
            ..batch(number, 0)
        };
        flow.push(outgoing, vec![page]).unwrap();
    }
}

fn numbers(flow: &SendQueue, expected: &[u64]) {
    for number in expected {
        match flow.next(LONG) {
            Ok(Next::Batch(outgoing)) => assert_eq!(outgoing.header.number, *number),
            other => panic!("{other:?} instead of batch {number}"),
        }
    }
}

#[test]
fn a_full_queue_has_room_when_a_batch_was_taken() {
    model(|| {
        let flow = Arc::new(SendQueue::new());
        let link = spawn(&flow, |flow| numbers(flow, &[1, 2]));
        // Each of them fills it.
        for number in [1, 2] {
            flow.push(batch(number, 4 << 20), Vec::new()).unwrap();
        }
        flow.drain().unwrap();
        link.join().unwrap();
    });
}

#[test]
fn a_full_window_opens_when_the_peer_has_worked_off() {
    const LARGE: usize = 32 << 20;
    model(|| {
        let flow = Arc::new(SendQueue::new());
        flow.push(batch(1, LARGE), Vec::new()).unwrap();
        let link = spawn(&flow, |flow| numbers(flow, &[1, 2]));
        let answers = spawn(&flow, |flow| {
            flow.push(batch(2, LARGE), Vec::new()).unwrap();
            // It takes so much in the window once it was sent, which it was if the queue had room.
            flow.acknowledge((LARGE + BATCH_HEADER_LEN) as u64).unwrap();
        });
        answers.join().unwrap();
        link.join().unwrap();
    });
}

#[test]
fn what_is_urgent_is_sent_first_and_waited_for() {
    model(|| {
        let flow = Arc::new(SendQueue::new());
        let link = spawn(&flow, |flow| {
            assert!(matches!(flow.next(LONG), Ok(Next::Control(_))));
            numbers(flow, &[1]);
        });
        flow.push_control(Vec::new());
        flow.push(batch(1, 1), Vec::new()).unwrap();
        flow.drain().unwrap();
        link.join().unwrap();
    });
}

#[test]
fn the_peer_is_waited_for_until_a_verdict() {
    model(|| {
        let flow = Arc::new(SendQueue::new());
        refer(&flow, 1);
        numbers(&flow, &[0]);
        let answers = spawn(&flow, |flow| {
            let verdict = Verdict {
                batch: 0,
                settled: 1,
                wanted: Vec::new(),
            };
            assert_eq!(flow.judge(&verdict).unwrap(), (1, Vec::new()));
            flow.acknowledge(BATCH_HEADER_LEN as u64).unwrap();
        });
        flow.wait_for_peer(0).unwrap();
        answers.join().unwrap();
    });
}

#[test]
fn the_peer_is_waited_for_until_an_idle_link_took_the_pages() {
    model(|| {
        let flow = Arc::new(SendQueue::new());
        refer(&flow, 1);
        numbers(&flow, &[0]);
        flow.acknowledge(BATCH_HEADER_LEN as u64).unwrap();
        let link = spawn(&flow, |flow| {
            assert!(matches!(flow.next(LONG), Ok(Next::Fill { batch: 0, .. })));
        });
        flow.wait_for_peer(0).unwrap();
        link.join().unwrap();
    });
}

#[test]
fn references_have_room_when_others_are_filled() {
    model(|| {
        let flow = Arc::new(SendQueue::new());
        refer(&flow, BATCHES);
        let answers = spawn(&flow, |flow| {
            flow.fill_all();
            assert_eq!(flow.late(), BATCHES);
        });
        assert!(flow.reference_room().unwrap() > 0);
        answers.join().unwrap();
    });
}

#[test]
fn the_end_ends_every_wait() {
    model(|| {
        let flow = Arc::new(SendQueue::new());
        flow.push(batch(1, 4 << 20), Vec::new()).unwrap();
        let reader = spawn(&flow, |flow| {
            assert!(flow.push(batch(2, 1), Vec::new()).is_err());
        });
        let driver = spawn(&flow, |flow| assert!(flow.wait_for_peer(0).is_err()));
        flow.stop();
        assert!(flow.next(LONG).is_err());
        reader.join().unwrap();
        driver.join().unwrap();
    });
}
