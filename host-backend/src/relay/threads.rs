//! Starts the threads of a relay.

use std::thread;

use super::error::RelayError;

/// Starts a thread that logs as its starter does, and hands its error to `failed`.
pub(super) fn spawn(
    name: &str,
    run: impl FnOnce() -> Result<(), RelayError> + Send + 'static,
    failed: impl FnOnce(RelayError) + Send + 'static,
) -> Result<(), RelayError> {
    let span = tracing::Span::current();
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            let _entered = span.entered();
            if let Err(error) = run() {
                failed(error);
            }
        })
        .map(drop)
        .map_err(RelayError::Socket)
}
