//! What a window grants, without threads.

use super::window::{Window, WindowError};
use proptest::prelude::*;

#[test]
fn more_than_is_out_cannot_come_back() {
    let window = Window::new(10);
    window.acquire(4).unwrap();
    let excess = WindowError::Excess { bytes: 5, out: 4 };
    assert_eq!(window.release(5), Err(excess));
    assert_eq!(window.out(), 4);
}

#[test]
fn a_lower_limit_holds_for_what_comes_next() {
    let window = Window::new(10);
    window.acquire(8).unwrap();
    window.set_limit(4);
    window.release(4).unwrap();
    assert_eq!(window.try_acquire(1), Ok(false));
    window.release(1).unwrap();
    assert_eq!(window.try_acquire(1), Ok(true));
}

#[test]
fn sizes_near_the_largest_number_do_not_wrap() {
    let window = Window::new(u64::MAX);
    window.acquire(u64::MAX).unwrap();
    assert_eq!(window.try_acquire(1), Ok(false));
    assert_eq!(window.try_acquire(u64::MAX), Ok(false));
}

proptest! {
    #[test]
    fn the_limit_holds_whatever_is_asked(
        limit in 0_u64..50,
        asked in prop::collection::vec((any::<bool>(), 0_u64..60), 0..100),
    ) {
        let window = Window::new(limit);
        let mut out = Vec::new();
        for (give_back, bytes) in asked {
            if give_back {
                if let Some(bytes) = out.pop() {
                    prop_assert_eq!(window.release(bytes), Ok(()));
                }
            } else if window.try_acquire(bytes) == Ok(true) {
                out.push(bytes);
            }
            let total: u64 = out.iter().sum();
            prop_assert_eq!(window.out(), total);
            let nonzero = out.iter().filter(|&&bytes| bytes > 0).count();
            prop_assert!(total <= limit || nonzero <= 1);
        }
    }
}
