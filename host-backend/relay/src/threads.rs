//! Starts the threads of a relay.

use crate::error::RelayError;
use transhume_base::task;

/// What a thread that can wait is nicer by than the guests' CPUs (`nice(2)`): where CPUs are short, it gets
/// a third of what a guest's CPU does.
const NICE: i32 = 5;

/// Starts a thread, and hands its error to `failed`.
pub(crate) fn spawn(
    name: &str,
    run: impl FnOnce() -> Result<(), RelayError> + Send + 'static,
    failed: impl FnOnce(RelayError) + Send + 'static,
) -> Result<(), RelayError> {
    let run = || {
        if let Err(error) = run() {
            failed(error);
        }
    };
    task::thread(name, run)
        .map(drop)
        .map_err(RelayError::Socket)
}

/// Puts the calling thread behind the guests. It is for work that takes much of a CPU, as compression does: on
/// the disks' readers it made migrations longer by an eighth, since pages that they are late with cross the
/// link.
pub(crate) fn yield_to_guests() {
    // SAFETY: the call takes numbers alone; 0 is the calling thread, whose nice value is its own on Linux.
    // It can fail for no reason but a lower value, and would change nothing then.
    unsafe { nix::libc::setpriority(nix::libc::PRIO_PROCESS, 0, NICE) };
}
