//! What can end a migration.

use std::fmt;

use thiserror::Error as ThisError;
use transhume_protocol::link::GuestEnd;

/// What an error means for the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// Found out before the guest was touched.
    Refused,
    /// The VM runs on at the source.
    Failed,
    /// The operator's wish; the VM runs on at the source.
    Cancelled,
    /// The VM's guest ended by itself: nothing runs it any more.
    Ended,
    /// The VM's QEMU ended, and not by its guest's doing: nothing runs it any more, or part of its memory is lost.
    Lost,
    /// An operator must look: it is not known which host has the VM, or its QEMU here hangs.
    Unresolved,
}

/// What a VM does at the source that was not moved after all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stays {
    /// As it did before.
    Running,
    /// As it was before.
    Paused,
}

impl fmt::Display for Stays {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Running => "runs on",
            Self::Paused => "stays paused",
        })
    }
}

/// Why a migration did not come to its end.
#[derive(Debug, ThisError)]
pub enum Error {
    /// Something is missing, here or at the destination.
    #[error("{}", reasons.join("\n"))]
    Refused {
        /// A line for each thing, with its cure.
        reasons: Vec<String>,
    },
    /// The operator ended it.
    #[error("the migration was cancelled; the VM {stays} at {host}")]
    Cancelled {
        /// The source.
        host: String,
        /// What it does there.
        stays: Stays,
    },
    /// It failed before the hand-over.
    #[error("the migration failed: {cause}\nThe VM {stays} at {host}; {cure}.")]
    Failed {
        /// What happened.
        cause: String,
        /// The source.
        host: String,
        /// What it does there.
        stays: Stays,
        /// What to do.
        cure: String,
    },
    /// The VM's guest ended by itself meanwhile.
    #[error(
        "the migration is over: {vm}'s guest {} at {host} meanwhile. Nothing runs it any more, and no error is known; {next}.",
        how.did()
    )]
    Ended {
        /// The VM.
        vm: String,
        /// Where its guest ran.
        host: String,
        /// What it did.
        how: GuestEnd,
        /// What may be done.
        next: String,
    },
    /// The VM's QEMU ended at the source, which had the VM, and not by its guest's doing.
    #[error(
        "the migration failed: {vm}'s QEMU at {host} has ended: {cause}\nIts guest did not shut down: nothing runs it any \
         more, and what it had not written to disk is lost. Start it again."
    )]
    Died {
        /// The VM.
        vm: String,
        /// The source.
        host: String,
        /// What is known of it.
        cause: String,
    },
    /// It failed before the hand-over, and the VM does not run here either: its QEMU hangs.
    #[error("the migration failed: {cause}\nThe VM does not run at {host}: {cure}.")]
    Lost {
        /// What happened.
        cause: String,
        /// The source.
        host: String,
        /// What to do.
        cure: String,
    },
    /// The rest of the memory cannot follow a VM in post-copy any more.
    #[error(
        "post-copy cannot go on: {cause}\n{vm} was handed over to {to}, and part of its memory is lost. What its \
         guest had not written to disk is lost as well. `transhume vm stop {vm} --force` on both hosts ends what \
         is left of it; then start it again."
    )]
    Broken {
        /// The VM.
        vm: String,
        /// The destination.
        to: String,
        /// What happened.
        cause: String,
    },
    /// The peer is silent after the commit.
    #[error("{to} fell silent while it took {vm} over ({cause}); {vm} is paused here")]
    Unresolved {
        /// The VM.
        vm: String,
        /// The destination.
        to: String,
        /// What happened.
        cause: String,
    },
}

impl Error {
    /// What it means for the VM.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Refused { .. } => ErrorKind::Refused,
            Self::Cancelled { .. } => ErrorKind::Cancelled,
            Self::Failed { .. } => ErrorKind::Failed,
            Self::Ended { .. } => ErrorKind::Ended,
            Self::Died { .. } | Self::Broken { .. } => ErrorKind::Lost,
            Self::Lost { .. } | Self::Unresolved { .. } => ErrorKind::Unresolved,
        }
    }

    #[expect(clippy::needless_pass_by_value, reason = "it stands in `map_err`")]
    pub(crate) fn refused(reason: impl ToString) -> Self {
        Self::Refused {
            reasons: vec![reason.to_string()],
        }
    }
}

/// Why a relay's thread stopped. The first one of a relay is what the migration failed of.
#[derive(Debug, ThisError)]
pub(crate) enum RelayError {
    /// The link to the other host.
    #[error(transparent)]
    Link(#[from] transhume_link::Error),
    /// A frame of the other host.
    #[error(transparent)]
    Frame(#[from] transhume_protocol::link::LinkError),
    /// QEMU's stream.
    #[error("QEMU's migration stream cannot be relayed: {0}")]
    Stream(#[from] transhume_protocol::qemu::Error),
    /// QEMU's socket.
    #[error("the migration socket of this host's QEMU failed: {0}")]
    Socket(std::io::Error),
    /// The guest's memory at the destination.
    #[error("the memory of this host's QEMU cannot be written: {0}")]
    Memory(std::io::Error),
    /// The stream ended before the VM's whole state was sent.
    #[error("this host's QEMU ended its migration stream early")]
    EarlyEnd,
    /// The stream goes over to post-copy though nobody said so.
    #[error("this host's QEMU went over to post-copy by itself; does anything else drive it?")]
    Unasked,
    /// QEMU's channels hold pages whose order nobody can know.
    #[error(
        "this host's QEMU sent pages through several channels without telling their order; \
         `qemu-channels = 1` in transhumed.toml does without"
    )]
    Disordered,
    /// The guest of a VM that was handed over has ended there by itself.
    #[error("the VM's guest {} at its destination", .0.did())]
    GuestEnded(GuestEnd),
    /// The other side gave up.
    #[error("the other host gave up: {0}")]
    Aborted(String),
    /// While memory moved it showed that a disk is not the same on both hosts.
    #[error("{0}")]
    OtherStorage(String),
    /// The other side sent something that makes no sense at this point.
    #[error("the other host sent what does not belong here ({0})")]
    Misplaced(&'static str),
    /// A page's content could not be decompressed.
    #[error("a batch of pages cannot be decompressed: {0}")]
    Decompress(std::io::Error),
    /// The other side counts bytes wrongly.
    #[error("the other host's count of bytes is wrong: {0}")]
    Window(#[from] transhume_link::window::WindowError),
    /// Another thread stopped first.
    #[error("the relay was stopped")]
    Stopped,
}

/// Why the rest of a VM's memory does not follow it, at either host.
#[derive(Debug)]
pub(crate) enum CutOff {
    /// Its guest has ended by itself, so it needs none.
    GuestEnded(GuestEnd),
    /// The stream broke, or QEMU ended otherwise, for this reason.
    Broken(String),
}

impl From<String> for CutOff {
    fn from(cause: String) -> Self {
        Self::Broken(cause)
    }
}
