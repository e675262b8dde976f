//! A read-only export of a qcow2 disk by QEMU's storage daemon.

use super::nbd_client::{Client, printable};
use crate::{Error, Format, Settings};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{getpid, getppid, mkdtemp};
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use std::{fs, io};
use transhume_base::confine::{Confinement, DAC_READ_SEARCH};
use transhume_base::task;
use transhume_machine::image_chain::{Image, Node};

const NAME: &str = "disk";
const MAX_CONNECTIONS: usize = 64;
/// The last bytes of what the storage daemon says are kept, so many.
const TAIL: usize = 2048;
/// How long a failed export is waited for, to hear its last words.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// A storage daemon that runs as long as this lives, and its export.
pub(super) struct Export {
    process: Process,
    client: Client,
}

impl Export {
    pub(super) fn start(image: &Image, settings: &Settings) -> Result<Self, Error> {
        let connections = settings.connections.clamp(1, MAX_CONNECTIONS);
        let (listener, streams) = sockets(&settings.run_directory, connections)?;
        let files = for_reading(image)?;
        let mut command = Command::new(&settings.storage_daemon);
        command
            .args(arguments(image, &files, connections))
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let descriptors = files.iter().map(AsRawFd::as_raw_fd);
        // It takes no descriptors, and opens them once more by their numbers: for files of whatever owner it needs one
        // right, which is to read.
        let confinement =
            Confinement::of(settings.user.as_ref(), descriptors.collect()).keeping(DAC_READ_SEARCH);
        let (process, ended) =
            Process::start(command, confinement).map_err(|source| Error::Start {
                program: settings.storage_daemon.clone(),
                source,
            })?;
        match Client::start(streams, NAME, settings.patience) {
            Ok(client) => Ok(Self { process, client }),
            Err(source) => Err(Error::Export {
                path: image
                    .nodes
                    .first()
                    .map(|top| top.path.clone())
                    .unwrap_or_default(),
                said: process.last_words(&ended),
                source: Box::new(source),
            }),
        }
    }

    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// The last that the storage daemon said.
    pub(super) fn said(&self) -> String {
        self.process.said()
    }

    /// Id of the storage daemon's process.
    #[cfg(test)]
    pub(super) fn pid(&self) -> u32 {
        lock(&self.process.shared.child)
            .as_ref()
            .map_or(0, Child::id)
    }
}

/// A listening socket and connections that wait in its queue.
///
/// The storage daemon inherits the listening end, so that there is no moment to wait for, and the path
/// is gone before it starts: nobody else can connect, and nothing is left behind by a kill -9.
fn sockets(
    run_directory: &Path,
    connections: usize,
) -> Result<(UnixListener, Vec<UnixStream>), Error> {
    let failed = |source| Error::Socket {
        path: run_directory.to_owned(),
        source,
    };
    // Made with mode 0700.
    let directory =
        mkdtemp(&run_directory.join("export-XXXXXX")).map_err(|errno| failed(errno.into()))?;
    let path = directory.join("nbd");
    let made = UnixListener::bind(&path).and_then(|listener| {
        let streams = (0..connections)
            .map(|_| UnixStream::connect(&path))
            .collect::<io::Result<_>>()?;
        Ok((listener, streams))
    });
    // Should this fail, an empty directory stays.
    let _ = fs::remove_dir_all(&directory);
    made.map_err(failed)
}

/// The files of an image once more, to read alone: what is open may be writable, and its locks are QEMU's.
fn for_reading(image: &Image) -> Result<Vec<File>, Error> {
    let open = |node: &Node| {
        OpenOptions::new()
            .read(true)
            .custom_flags(OFlag::O_DIRECT.bits())
            .open(format!("/proc/self/fd/{}", node.file.as_raw_fd()))
            .map_err(|source| Error::Open {
                path: node.path.clone(),
                source,
            })
    };
    image.nodes.iter().map(open).collect()
}

/// The storage daemon's command line: the image node by node, from the lowest, so that it opens nothing else.
fn arguments(image: &Image, files: &[File], connections: usize) -> Vec<String> {
    let name = |depth: usize| match depth {
        0 => NAME.to_owned(),
        _ => format!("{NAME}-{depth}"),
    };
    let mut arguments = Vec::new();
    for (depth, (node, open)) in image.nodes.iter().zip(files).enumerate().rev() {
        let driver = if node.block_device {
            "host_device"
        } else {
            "file"
        };
        // The source's QEMU holds the image's lock and goes on writing: this side takes no lock. Metadata that the
        // source has written since is seen at the latest when the cache of tables was cleaned.
        let file = serde_json::json!({
            "node-name": format!("file-{depth}"), "driver": driver,
            "filename": format!("/proc/self/fd/{}", open.as_raw_fd()), "read-only": true,
            "locking": "off", "cache": {"direct": true},
        });
        let mut disk = serde_json::json!({
            "node-name": name(depth), "driver": node.format.to_string(), "file": format!("file-{depth}"),
            "read-only": true, "cache": {"direct": true},
        });
        if node.format == Format::Qcow2 {
            disk["cache-clean-interval"] = 1.into();
            disk["backing"] = match image.nodes.get(depth + 1) {
                Some(_) => name(depth + 1).into(),
                None => serde_json::Value::Null,
            };
        }
        for node in [file, disk] {
            arguments.extend(["--blockdev".to_owned(), node.to_string()]);
        }
    }
    arguments.extend([
        "--nbd-server".into(),
        format!("addr.type=fd,addr.str=0,max-connections={connections}"),
        "--export".into(),
        format!("type=nbd,id=export,node-name={NAME},name={NAME},writable=off"),
    ]);
    arguments
}

/// A child process that is killed with this value, and with our own process.
struct Process {
    shared: Arc<Shared>,
}

struct Shared {
    child: Mutex<Option<Child>>,
    said: Mutex<Vec<u8>>,
}

impl Process {
    /// Starts the child from a thread of its own, which stays until the child has ended: the kernel
    /// sends the parent-death signal when the thread that started a child ends, not the process.
    ///
    /// Also returns what breaks when the child has said its last.
    fn start(mut command: Command, confinement: Confinement) -> io::Result<(Self, Receiver<()>)> {
        let shared = Arc::new(Shared {
            child: Mutex::new(None),
            said: Mutex::new(Vec::new()),
        });
        let (started, answer) = mpsc::channel();
        let (alive, ended) = mpsc::channel();
        let parent = getpid();
        // SAFETY: between fork and exec system calls alone are made, which are safe to make there, and an
        // error is made without allocating.
        unsafe {
            command.pre_exec(move || {
                // Before the signal is asked for, which a change of user takes back.
                confinement.apply()?;
                set_pdeathsig(Signal::SIGKILL)?;
                // The parent may have died before the signal was asked for.
                if getppid() == parent {
                    Ok(())
                } else {
                    Err(Errno::ESRCH.into())
                }
            });
        }
        let owner = Arc::clone(&shared);
        task::thread("volume-export", move || {
            owner.own(command, &started, alive);
        })?;
        answer
            .recv()
            .unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()))?;
        Ok((Self { shared }, ended))
    }

    /// Ends the process and returns what it said.
    fn last_words(&self, ended: &Receiver<()>) -> String {
        self.shared.kill();
        // A process that hangs in its storage cannot be killed; then there is nothing to hear.
        let _ = ended.recv_timeout(LAST_WORDS);
        self.said()
    }

    fn said(&self) -> String {
        let said = printable(&lock(&self.shared.said));
        if said.is_empty() {
            "the storage daemon said nothing".into()
        } else {
            format!("the storage daemon said: {said}")
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Its owner waits for it; this thread need not.
        self.shared.kill();
    }
}

impl Shared {
    fn own(&self, mut command: Command, started: &Sender<io::Result<()>>, alive: Sender<()>) {
        let spawned = command.spawn();
        // Closes our end of the listening socket, so that connections break if the child dies.
        drop(command);
        let stderr = match spawned {
            Ok(mut child) => {
                let stderr = child.stderr.take();
                *lock(&self.child) = Some(child);
                let _ = started.send(Ok(()));
                stderr
            }
            Err(error) => {
                let _ = started.send(Err(error));
                return;
            }
        };
        if let Some(stderr) = stderr {
            self.listen(stderr);
        }
        drop(alive);
        self.kill();
        // Out of the lock: a child that cannot be killed must not hold up anyone but this thread.
        let child = lock(&self.child).take();
        if let Some(mut child) = child {
            let _ = child.wait();
        }
    }

    /// Keeps the tail of what the child says, until it is closed.
    fn listen(&self, mut stderr: ChildStderr) {
        let mut piece = [0; 512];
        loop {
            match stderr.read(&mut piece) {
                Ok(0) => return,
                Ok(count) => {
                    let mut said = lock(&self.said);
                    said.extend_from_slice(&piece[..count]);
                    let excess = said.len().saturating_sub(TAIL);
                    said.drain(..excess);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }

    fn kill(&self) {
        if let Some(child) = lock(&self.child).as_mut() {
            // It has nothing to write; an error means that it has ended.
            let _ = child.kill();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
