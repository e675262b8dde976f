//! What the C library's allocator keeps of memory that was freed.
//!
//! A migration uses some tens of MiB in a dozen threads. glibc gives each thread an arena of its own, up to eight a CPU, and
//! keeps what was used once: some 250 MiB after twenty moves.

use std::time::Duration;

/// Arenas that all threads share. One costs speed where threads allocate at the same time.
#[cfg(target_env = "gnu")]
const ARENAS: i32 = 2;
/// How long after a migration its threads have ended.
const AFTER: Duration = Duration::from_secs(1);

/// Bounds the arenas. To be called before there are threads.
pub fn bound_arenas() {
    #[cfg(target_env = "gnu")]
    // SAFETY: `mallopt` takes two numbers, and only this thread runs.
    unsafe {
        nix::libc::mallopt(nix::libc::M_ARENA_MAX, ARENAS);
    }
}

/// Gives memory back to the system that nobody uses, a moment after a migration.
pub fn give_back() {
    crate::task::spawn(async {
        tokio::time::sleep(AFTER).await;
        // It takes some milliseconds.
        let _ = crate::task::blocking(trim).await;
    });
}

fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: `malloc_trim` takes a number, locks what it looks at, and touches nothing that is in use.
    unsafe {
        nix::libc::malloc_trim(0);
    }
}
