//! Every interleaving of a few threads at a [`window::Window`], tried by loom. A wait that nobody ends
//! is a deadlock, which loom reports.

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;

use transhume_testing::model_sync as sync;

#[path = "window.rs"]
#[expect(clippy::duplicate_mod, reason = "once with each kind of primitives")]
#[expect(unreachable_pub, reason = "the same file is a public module elsewhere")]
pub(crate) mod window;

use window::{Window, WindowError};

#[test]
fn never_more_than_the_limit_is_out() {
    loom::model(|| {
        let window = Arc::new(Window::new(2));
        let out = Arc::new(AtomicU64::new(0));
        let workers: Vec<_> = [1, 2]
            .into_iter()
            .map(|bytes| {
                let (window, out) = (window.clone(), out.clone());
                thread::spawn(move || {
                    window.acquire(bytes).unwrap();
                    let before = out.fetch_add(bytes, Ordering::SeqCst);
                    assert!(before + bytes <= 2, "{before} and {bytes} are out");
                    out.fetch_sub(bytes, Ordering::SeqCst);
                    window.release(bytes).unwrap();
                })
            })
            .collect();
        for worker in workers {
            worker.join().unwrap();
        }
        assert_eq!(window.out(), 0);
    });
}

#[test]
fn a_producer_never_misses_what_came_back() {
    loom::model(|| {
        let window = Arc::new(Window::new(1));
        window.acquire(1).unwrap();
        let consumer = {
            let window = window.clone();
            thread::spawn(move || window.release(1).unwrap())
        };
        window.acquire(1).unwrap();
        consumer.join().unwrap();
        assert_eq!(window.out(), 1);
    });
}

#[test]
fn a_small_request_is_not_held_up_by_a_larger_one() {
    loom::model(|| {
        let window = Arc::new(Window::new(2));
        window.acquire(2).unwrap();
        let waiters = [2, 1].map(|bytes| {
            let window = window.clone();
            thread::spawn(move || {
                window.acquire(bytes).unwrap();
                window.release(bytes).unwrap();
            })
        });
        // Enough for the smaller one alone: if the larger one is woken in its place, nobody goes on.
        window.release(1).unwrap();
        let [large, small] = waiters;
        small.join().unwrap();
        window.release(1).unwrap();
        large.join().unwrap();
    });
}

#[test]
fn a_request_longer_than_the_limit_goes_alone() {
    loom::model(|| {
        let window = Arc::new(Window::new(1));
        let large = {
            let window = window.clone();
            thread::spawn(move || {
                window.acquire(5).unwrap();
                assert_eq!(window.try_acquire(1), Ok(false));
                window.release(5).unwrap();
            })
        };
        window.acquire(1).unwrap();
        assert_eq!(window.out(), 1);
        window.release(1).unwrap();
        large.join().unwrap();
    });
}

#[test]
fn a_higher_limit_lets_a_waiting_producer_go_on() {
    loom::model(|| {
        let window = Arc::new(Window::new(1));
        window.acquire(1).unwrap();
        let raiser = {
            let window = window.clone();
            thread::spawn(move || window.set_limit(2))
        };
        window.acquire(1).unwrap();
        raiser.join().unwrap();
    });
}

#[test]
fn closing_ends_every_wait() {
    loom::model(|| {
        let window = Arc::new(Window::new(1));
        window.acquire(1).unwrap();
        let waiters: Vec<_> = (0..2)
            .map(|_| {
                let window = window.clone();
                thread::spawn(move || {
                    assert_eq!(window.acquire(1), Err(WindowError::Closed));
                })
            })
            .collect();
        window.close();
        for waiter in waiters {
            waiter.join().unwrap();
        }
        assert_eq!(window.release(1), Ok(()));
        assert_eq!(window.acquire(1), Err(WindowError::Closed));
    });
}
