//! What the test bed says while it works: one line when a long step starts, one when it ends.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// How often a long step says that it is still at it.
const REMINDER: Duration = Duration::from_secs(15);

/// Prints a line for the person at the terminal. Results go to standard output, these lines do not.
pub fn say(line: impl AsRef<str>) {
    eprintln!("testbed: {}", line.as_ref());
}

/// Runs a step that may take more than a second, and says so.
pub fn step<T>(what: &str, work: impl FnOnce() -> T) -> T {
    say(format!("{what} …"));
    let start = Instant::now();
    let (done, waiting) = channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            while waiting.recv_timeout(REMINDER) == Err(RecvTimeoutError::Timeout) {
                say(format!("  … {} s so far", start.elapsed().as_secs()));
            }
        });
        let result = work();
        drop(done);
        if start.elapsed() > Duration::from_secs(1) {
            say(format!("  {:.1} s", start.elapsed().as_secs_f64()));
        }
        result
    })
}
