//! Tasks and threads that log as their starter does: with its VM and its job. `clippy.toml` refuses others.
#![allow(clippy::disallowed_methods)]

use std::future::Future;
use std::io;
use std::thread;

use tokio::task::JoinHandle;
use tracing::{Instrument, Span};

/// Starts a task.
///
/// # Panics
/// Outside of a runtime, as `tokio::spawn` does.
pub fn spawn<F>(future: F) -> JoinHandle<F::Output>
where
    F: Future<Output: Send> + Send + 'static,
{
    tokio::spawn(future.in_current_span())
}

/// Starts work that blocks, on one of the runtime's threads for that.
///
/// # Panics
/// Outside of a runtime, as `tokio::task::spawn_blocking` does.
pub fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    let span = Span::current();
    tokio::task::spawn_blocking(move || span.in_scope(work))
}

/// Starts a thread of that name, of which the kernel shows 15 bytes.
///
/// # Errors
/// The system has no room for one more.
pub fn thread<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<thread::JoinHandle<T>> {
    let span = Span::current();
    let named = thread::Builder::new().name(name.to_owned());
    named.spawn(move || span.in_scope(work))
}
