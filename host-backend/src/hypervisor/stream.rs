//! The socket through which QEMU's migration stream goes.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use nix::sys::socket::{setsockopt, sockopt};

/// Bytes that either end may be ahead of the other. With the kernel's default, some 200 KiB, QEMU and
/// the relay wake each other for every second write, which took a fifth of the time of both.
const AHEAD: usize = 2 << 20;

/// The same where what QEMU writes next matters more than how much it writes: a guest waits for it.
const AHEAD_OF_GUEST: usize = 64 << 10;

/// Lets QEMU write little ahead from now on, by its end of the pair.
pub fn narrow(theirs: &OwnedFd) {
    // Without it pages that a guest waits for come later.
    if let Err(error) = setsockopt(theirs, sockopt::SndBuf, &AHEAD_OF_GUEST) {
        tracing::debug!(%error, "QEMU's socket stays wide");
    }
}

/// A pair of connected sockets: ours, and QEMU's, which it gets by [`super::Qmp::migrate`] or
/// [`super::Qmp::migrate_incoming`].
///
/// # Errors
/// When there are no more descriptors.
pub fn pair() -> std::io::Result<(UnixStream, OwnedFd)> {
    let (ours, theirs) = UnixStream::pair()?;
    for socket in [&ours, &theirs] {
        // Beyond net.core.wmem_max only with CAP_NET_ADMIN; with less it is slower.
        if setsockopt(socket, sockopt::SndBufForce, &AHEAD).is_err() {
            let _ = setsockopt(socket, sockopt::SndBuf, &AHEAD);
        }
    }
    Ok((ours, theirs.into()))
}
