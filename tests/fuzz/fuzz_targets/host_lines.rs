//! Lines of QMP and of the control socket: however they come, each is whole, and none is longer than its limit.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};
use transhume_base::lines::Lines;
use transhume_fuzz::{first, expand};

/// What is ready at once.
fn now<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(done) => done,
        Poll::Pending => panic!("bytes are always ready"),
    }
}

fuzz_target!(|data: &[u8]| {
    let (limit, rest) = first(data);
    let (limit, bytes) = (usize::from(limit) * 64, expand(rest));
    let mut lines = Lines::new(&bytes[..], limit);
    let mut wanted = bytes.split(|byte| *byte == b'\n');
    while let Ok(Some(line)) = now(lines.next()) {
        assert!(line.len() <= limit);
        assert_eq!(Some(&line[..]), wanted.next());
    }
});
