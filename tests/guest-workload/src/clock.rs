//! Plays a time daemon: tells the kernel that it keeps the clock.

use nix::errno::Errno;
use nix::libc;

/// Says so once, which counts for hours.
pub(super) fn keep() -> Result<(), String> {
    // SAFETY: the structure holds numbers alone, of which zero is one.
    let mut call: libc::timex = unsafe { std::mem::zeroed() };
    // No error, and no STA_UNSYNC.
    call.modes = libc::ADJ_STATUS | libc::ADJ_MAXERROR | libc::ADJ_ESTERROR;
    // SAFETY: the call reads and writes the structure, which outlives it, and keeps no pointer to it.
    let state = unsafe { libc::adjtimex(&raw mut call) };
    Errno::result(state)
        .map(drop)
        .map_err(|error| format!("adjtimex: {error}"))
}
