//! The sockets through which QEMU's migration stream goes.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::UnixListener;
use tokio::time::timeout;

/// Bytes that either end may be ahead of the other. With the kernel's default, some 200 KiB, QEMU and
/// the relay wake each other for every second write, which took a fifth of the time of both.
const AHEAD: usize = 2 << 20;
/// How long QEMU may take to open a socket that it was told of.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The socket's name in the VM's run directory.
const NAME: &str = "stream.sock";

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
pub fn pair() -> io::Result<(UnixStream, OwnedFd)> {
    let (ours, theirs) = UnixStream::pair()?;
    [&ours, &theirs].into_iter().for_each(widen);
    Ok((ours, theirs.into()))
}

/// Lets the end that writes to this socket be ahead.
pub fn widen(socket: &UnixStream) {
    // Beyond net.core.wmem_max only with CAP_NET_ADMIN; with less it is slower.
    if setsockopt(socket, sockopt::SndBufForce, &AHEAD).is_err() {
        let _ = setsockopt(socket, sockopt::SndBuf, &AHEAD);
    }
}

/// Where a QEMU opens a stream and its channels, which it can by an address alone. Only its own process is
/// let in, and the address is gone when this is dropped.
#[derive(Debug)]
pub struct MigrationListener {
    listener: UnixListener,
    path: PathBuf,
    process: u32,
}

impl MigrationListener {
    /// A door for the QEMU of that process id in the run directory `folder`. `None` if that QEMU sees another
    /// folder by that name or none, or is of a user who does not get through to it: it could not open the door.
    ///
    /// # Errors
    /// When the socket cannot be made.
    pub fn open(folder: &Path, process: u32) -> io::Result<Option<Self>> {
        let Some(owner) = sees(process, folder) else {
            return Ok(None);
        };
        let path = folder.join(NAME);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        let door = Self {
            listener,
            path,
            process,
        };
        // Until then its folder keeps others out, and `accept` does anyway.
        std::fs::set_permissions(&door.path, std::fs::Permissions::from_mode(0o600))?;
        if owner != nix::unistd::geteuid().as_raw() {
            std::os::unix::fs::chown(&door.path, Some(owner), None)?;
        }
        Ok(Some(door))
    }

    /// The address.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The next socket that QEMU opens.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`] if it opens none for ten seconds.
    pub async fn accept(&self) -> io::Result<UnixStream> {
        let accept = async {
            loop {
                let (socket, _) = self.listener.accept().await?;
                let from = socket.peer_cred()?.pid();
                if from.and_then(|id| u32::try_from(id).ok()) == Some(self.process) {
                    let socket = socket.into_std()?;
                    socket.set_nonblocking(false)?;
                    return Ok(socket);
                }
                tracing::warn!(?from, path = %self.path.display(), "not QEMU: shut out");
            }
        };
        match timeout(TIMEOUT, accept).await {
            Ok(socket) => socket,
            Err(_) => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("QEMU did not open {}", self.path.display()),
            )),
        }
    }
}

impl Drop for MigrationListener {
    fn drop(&mut self) {
        // At worst the next migration removes it.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The user of a process that finds the same folder by that path and gets through to it.
fn sees(process: u32, folder: &Path) -> Option<u32> {
    let root = PathBuf::from(format!("/proc/{process}/root"));
    let theirs = std::fs::metadata(root.join(folder.strip_prefix("/").ok()?)).ok()?;
    let ours = std::fs::metadata(folder).ok()?;
    let owner = std::fs::metadata(format!("/proc/{process}")).ok()?.uid();
    let open = |folder: &Path| std::fs::metadata(folder).is_ok_and(|it| it.mode() & 0o001 != 0);
    let gets_through = owner == nix::unistd::geteuid().as_raw() || folder.ancestors().all(open);
    let same = (theirs.dev(), theirs.ino()) == (ours.dev(), ours.ino());
    (same && gets_through).then_some(owner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[tokio::test]
    async fn the_door_is_for_one_process_and_leaves_nothing() {
        let folder = tempfile::tempdir().expect("a folder");
        let door = MigrationListener::open(folder.path(), std::process::id()).expect("a socket");
        let door = door.expect("we see our own folder");
        let path = door.path().to_owned();
        let mode = std::fs::metadata(&path).expect("it is there").mode();
        assert_eq!(mode & 0o777, 0o600);
        let mut qemu = UnixStream::connect(&path).expect("it listens");
        let mut ours = door.accept().await.expect("it is us");
        qemu.write_all(b"QEVM").expect("it is open");
        let mut read = [0; 4];
        ours.read_exact(&mut read)
            .expect("it blocks until they came");
        assert_eq!(&read, b"QEVM");
        drop(door);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn another_process_is_shut_out() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut other = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .expect("a process");
        let door = MigrationListener::open(folder.path(), other.id()).expect("a socket");
        let door = door.expect("it sees our folder");
        let mut stranger = UnixStream::connect(door.path()).expect("it listens");
        let left = tokio::select! {
            _ = door.accept() => None,
            left = tokio::task::spawn_blocking(move || stranger.read(&mut [0])) => Some(left),
        };
        let left = left.expect("nobody was let in").expect("a thread");
        assert_eq!(left.expect("it was closed"), 0);
        other.kill().expect("it runs");
        other.wait().expect("it ended");
    }

    #[tokio::test]
    async fn no_door_for_one_who_cannot_see_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let nobody = MigrationListener::open(folder.path(), u32::MAX).expect("nothing was made");
        assert!(nobody.is_none());
        let nowhere = MigrationListener::open(&folder.path().join("none"), std::process::id());
        assert!(nowhere.expect("nothing was made").is_none());
    }
}
