//! Every interleaving of a few readers at a [`multifd_barrier::MultifdBarrier`], tried by loom. A wait that nobody ends
//! is a deadlock, which loom reports.

use loom::sync::Arc;
use loom::thread;

/// What `multifd_barrier.rs` finds in the place of std's.
mod sync {
    pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard};
    pub(crate) use std::sync::PoisonError;
}

#[path = "multifd_barrier.rs"]
#[expect(clippy::duplicate_mod, reason = "once with each kind of primitives")]
mod multifd_barrier;

use multifd_barrier::{Missed, MultifdBarrier};

/// What was passed on, by the round of each. Not loom's lock: no thread is moved aside while it holds it, and what is
/// tried is the rendezvous alone.
type Passed = Arc<std::sync::Mutex<Vec<u32>>>;

fn channel(rendezvous: &MultifdBarrier, passed: &Passed) -> Result<(), Missed> {
    // The set-up's point, and one more.
    rendezvous.arrive()?;
    rendezvous.begin_pages()?;
    passed.lock().unwrap().push(1);
    rendezvous.arrive()
}

fn stream(rendezvous: &MultifdBarrier, passed: &Passed) -> Result<(), Missed> {
    passed.lock().unwrap().push(0);
    rendezvous.gather()?;
    passed.lock().unwrap().push(0);
    rendezvous.release();
    passed.lock().unwrap().push(1);
    rendezvous.gather()?;
    rendezvous.release();
    rendezvous.end()?;
    passed.lock().unwrap().push(2);
    Ok(())
}

#[test]
fn nothing_overtakes_a_point() {
    let mut model = loom::model::Builder::new();
    // All interleavings of three threads would take hours.
    model.preemption_bound = Some(2);
    model.check(|| {
        let rendezvous = Arc::new(MultifdBarrier::new(2));
        let passed = Passed::default();
        let channels = [0, 1].map(|_| {
            let (rendezvous, passed) = (rendezvous.clone(), passed.clone());
            thread::spawn(move || channel(&rendezvous, &passed).unwrap())
        });
        stream(&rendezvous, &passed).unwrap();
        for channel in channels {
            channel.join().unwrap();
        }
        assert_eq!(*passed.lock().unwrap(), [0, 0, 1, 1, 1, 2]);
        assert!(rendezvous.has_ended());
        assert_eq!(rendezvous.begin_pages(), Err(Missed::OutOfPlace));
    });
}

#[test]
fn pages_behind_the_last_point_are_found_on_one_side_or_the_other() {
    loom::model(|| {
        let rendezvous = Arc::new(MultifdBarrier::new(1));
        let late = {
            let rendezvous = rendezvous.clone();
            thread::spawn(move || {
                rendezvous.arrive().unwrap();
                rendezvous.begin_pages()
            })
        };
        rendezvous.gather().unwrap();
        rendezvous.release();
        let ended = rendezvous.end();
        assert_ne!(ended.is_ok(), late.join().unwrap().is_ok());
    });
}

#[test]
fn nobody_waits_for_one_who_failed() {
    loom::model(|| {
        let rendezvous = Arc::new(MultifdBarrier::new(2));
        let waits = {
            let rendezvous = rendezvous.clone();
            thread::spawn(move || rendezvous.arrive())
        };
        let fails = {
            let rendezvous = rendezvous.clone();
            thread::spawn(move || rendezvous.close())
        };
        assert_eq!(rendezvous.gather(), Err(Missed::Closed));
        assert_eq!(waits.join().unwrap(), Err(Missed::Closed));
        fails.join().unwrap();
    });
}
