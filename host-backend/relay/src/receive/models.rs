//! The interleavings of the destination's threads at what goes into QEMU, and at what is to be read, tried
//! by loom.

use loom::sync::Arc;
use loom::thread::{self, JoinHandle};
use transhume_protocol::link::{HintRun, SectionKind};
use transhume_protocol::memory::Block;

use super::{read_plan, replies, resume_state};
use transhume_pages::hint_table::Place;
use transhume_pages::{PAGE_SIZE, PageKey};
use transhume_testing::model_sync::{self as sync, model};

#[path = "output.rs"]
#[allow(dead_code, reason = "not all of it waits")]
#[expect(clippy::duplicate_mod, reason = "once with each kind of primitives")]
mod output;
#[path = "placement.rs"]
#[allow(dead_code, reason = "not all of it waits")]
#[expect(clippy::duplicate_mod, reason = "once with each kind of primitives")]
mod placement;

use self::output::{Output, Piece};
use self::placement::Placement;

const DIGEST: [u8; 16] = [7; 16];

fn spawn<S: 'static, T: 'static>(
    shared: &Arc<S>,
    run: impl FnOnce(&S) -> T + 'static,
) -> JoinHandle<T> {
    let shared = shared.clone();
    thread::spawn(move || run(&shared))
}

/// What fills the queue.
fn much() -> Piece {
    Piece::Raw(vec![0; 24 << 20])
}

#[test]
fn a_full_queue_has_room_when_the_writer_has_taken() {
    model(|| {
        let output = Arc::new(Output::new());
        let writer = spawn(&output, |output| {
            for _ in 0..2 {
                assert!(matches!(output.take(), Ok(Piece::Raw(_))));
            }
        });
        for _ in 0..2 {
            output.wait_for_room().unwrap();
            output.push(much());
        }
        writer.join().unwrap();
    });
}

#[test]
fn the_end_ends_the_waits_for_room_and_for_pieces() {
    model(|| {
        let output = Arc::new(Output::new());
        output.push(much());
        let intake = spawn(&output, |output| {
            // Whether there was room, or the end.
            let _ = output.wait_for_room();
        });
        let writer = spawn(&output, |output| while output.take().is_ok() {});
        output.stop();
        intake.join().unwrap();
        writer.join().unwrap();
    });
}

/// Two pages of memory, without reports yet.
fn placement() -> Arc<Placement> {
    let replies = std::sync::Arc::new(replies::Replies::default());
    // Nobody listens to what is sent.
    replies.end();
    let output = std::sync::Arc::new(Output::new());
    let placement = Placement::new(output, replies, 1, None, false, None).with_ahead(1);
    let blocks = vec![Block {
        name: "pc.ram".to_owned(),
        length: 2 * PAGE_SIZE as u64,
    }];
    placement.set_blocks(2, blocks).unwrap();
    Arc::new(placement)
}

fn key(page: u64) -> PageKey {
    PageKey { block: 0, page }
}

/// A page that is far from all others on its disk.
fn place(page: u64) -> Place {
    Place {
        disk: 0,
        sector: page << 16,
    }
}

fn report(page: u64) -> HintRun {
    HintRun {
        block: 0,
        page,
        pages: 1,
        disk: 0,
        sector: place(page).sector,
    }
}

fn read_and_find(placement: &Placement) -> u64 {
    let read = placement.next_read().unwrap();
    let contents = std::sync::Arc::new(vec![0; read.pages * PAGE_SIZE]);
    placement
        .found(&read, Some((contents, vec![DIGEST; read.targets.len()])))
        .unwrap();
    read.targets[0].0.page
}

#[test]
fn a_reader_hears_of_a_report() {
    model(|| {
        let placement = placement();
        let reader = spawn(&placement, read_and_find);
        placement.hint(&[report(1)]);
        assert_eq!(reader.join().unwrap(), 1);
    });
}

#[test]
fn a_reader_hears_of_a_reference() {
    model(|| {
        let placement = placement();
        placement.open(SectionKind::Part).unwrap();
        let reader = spawn(&placement, read_and_find);
        let mut needed = Vec::new();
        placement
            .references(0, &mut 0, key(1), place(1), &[DIGEST], &mut needed)
            .unwrap();
        placement.demand(&mut needed);
        assert_eq!(reader.join().unwrap(), 1);
        placement.close().unwrap();
        placement.open(SectionKind::End).unwrap();
        placement.close().unwrap();
    });
}

#[test]
fn a_reader_goes_on_when_there_is_room_ahead() {
    model(|| {
        let placement = placement();
        placement.hint(&[report(0), report(1)]);
        assert_eq!(read_and_find(&placement), 0);
        placement.open(SectionKind::Part).unwrap();
        let reader = spawn(&placement, read_and_find);
        // The one page that was read ahead is settled.
        let mut needed = Vec::new();
        placement
            .references(0, &mut 0, key(0), place(0), &[DIGEST], &mut needed)
            .unwrap();
        placement.demand(&mut needed);
        assert_eq!(reader.join().unwrap(), 1);
    });
}

#[test]
fn the_end_ends_the_readers_waits() {
    model(|| {
        let placement = placement();
        let readers = [0, 1].map(|_| {
            spawn(&placement, |placement| {
                assert!(placement.next_read().is_err());
            })
        });
        placement.stop();
        for reader in readers {
            reader.join().unwrap();
        }
    });
}
