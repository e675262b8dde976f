//! What this host has for a VM's disks: shown to the source, and read for it where it compares.
//!
//! A source learns nothing but digests, under a key that it cannot choose, of files that this host's `paths` allow and
//! the VM names as its disks, and so many of them at most.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, SyncSender, TrySendError};
use std::time::Duration;

use transhume_protocol::link::{Compared, Comparison, Control, Signs, StorageHere};

use crate::error::RelayError;
use transhume_guest::monotonic_ns;
use transhume_link::{Connection, Error, TIMEOUT};
use transhume_machine::Definition;
use transhume_volume::same::{self, Signed, Storage};

/// How long storage may take to show itself.
const LOOK_TIMEOUT: Duration = Duration::from_secs(20);
/// Comparisons before the session, and in it, at most.
const MAX_COMPARISONS: usize = 64;
/// The same of questions for the clock.
const MAX_CLOCK_QUESTIONS: usize = 16;

/// The storage of a VM that was offered.
pub(crate) struct Shown {
    storage: Arc<Storage>,
    /// Our signs, until the source has looked for them.
    signed: Option<Signed>,
    key: [u8; 16],
}

/// Reads for a source that compares.
#[derive(Clone)]
pub(crate) struct Comparer {
    storage: Arc<Storage>,
    key: [u8; 16],
}

impl Shown {
    /// Opens the disks, looks for the source's signs, and leaves some.
    pub(crate) async fn of(
        definition: &Definition,
        host: &str,
        theirs: Signs,
    ) -> Result<(Self, StorageHere), String> {
        let (definition, name) = (definition.clone(), host.to_owned());
        let look = transhume_base::task::blocking(move || {
            let storage = Storage::open(&definition, &name)?;
            let signed = storage.sign()?;
            let here = storage.look(&theirs, &signed.signs);
            let shown = Self {
                storage: Arc::new(storage),
                key: same::key(&theirs.nonce, &signed.signs.nonce),
                signed: Some(signed),
            };
            Ok::<_, same::Error>((shown, here))
        });
        match tokio::time::timeout(LOOK_TIMEOUT, look).await {
            Ok(Ok(looked)) => {
                looked.map_err(|error| format!("the disks on {host}: {error}; see `dmesg` there"))
            }
            Ok(Err(error)) => Err(format!(
                "looking at the disks on {host} failed: {error}; see the daemon's log"
            )),
            Err(_) => Err(format!(
                "the storage of {host} did not answer within {} s; check its mounts (`findmnt`, `dmesg`)",
                LOOK_TIMEOUT.as_secs()
            )),
        }
    }

    /// Answers the source's comparisons and questions for the clock until it says something else, which is returned. Blocks.
    pub(crate) fn serve(&mut self, connection: &mut Connection) -> Result<Control, Error> {
        for _ in 0..MAX_COMPARISONS + MAX_CLOCK_QUESTIONS {
            match connection.receive(TIMEOUT)? {
                Control::ClockWanted => connection.send(&Control::Clock {
                    monotonic_ns: monotonic_ns(),
                })?,
                Control::Compare(comparison) => {
                    let read = self.storage.read(&comparison, &self.key);
                    let read =
                        read.map_err(|_| Error::Unexpected("a comparison that is out of bounds"))?;
                    connection.send(&Control::Compared(read))?;
                }
                other => {
                    // It has looked.
                    self.signed = None;
                    return Ok(other);
                }
            }
        }
        Err(Error::Unexpected("questions without an end"))
    }

    /// For the session.
    pub(crate) fn comparer(&self) -> Comparer {
        Comparer {
            storage: Arc::clone(&self.storage),
            key: self.key,
        }
    }
}

/// Questions of a session to its [`Comparer`].
pub(crate) struct Questions {
    sender: Option<SyncSender<Comparison>>,
    left: usize,
}

impl Questions {
    /// Those of a session, and who is to answer them.
    pub(crate) fn new() -> (Self, Receiver<Comparison>) {
        let (sender, receiver) = mpsc::sync_channel(1);
        let questions = Self {
            sender: Some(sender),
            left: MAX_COMPARISONS,
        };
        (questions, receiver)
    }

    /// None are answered.
    pub(crate) fn none() -> Self {
        Self {
            sender: None,
            left: 0,
        }
    }

    /// Takes one; the source waits for the answer before it asks again.
    pub(crate) fn ask(&mut self, comparison: Comparison) -> Result<(), RelayError> {
        const TOO_MANY: RelayError = RelayError::Misplaced("comparison of disks");
        let sender = self
            .sender
            .as_ref()
            .filter(|_| self.left > 0)
            .ok_or(TOO_MANY)?;
        self.left -= 1;
        match sender.try_send(comparison) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(_)) => Err(TOO_MANY),
            Err(TrySendError::Disconnected(_)) => Err(RelayError::Stopped),
        }
    }
}

impl Comparer {
    /// Answers until nobody asks any more.
    pub(crate) fn run(
        &self,
        questions: &Receiver<Comparison>,
        answer: impl Fn(Compared),
    ) -> Result<(), RelayError> {
        while let Ok(comparison) = questions.recv() {
            let read = self.storage.read(&comparison, &self.key);
            let read = read.map_err(|_| RelayError::Misplaced("comparison of disks"))?;
            answer(read);
        }
        Ok(())
    }
}
