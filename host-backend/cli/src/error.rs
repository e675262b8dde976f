//! What can go wrong at the command line.

use std::io;
use std::path::PathBuf;
use transhume_api::{Failure, FailureKind};

/// Each message names the cause and the cure.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Certificates.
    #[error(transparent)]
    Pki(#[from] transhume_pki::Error),
    /// What was asked for makes no sense; nobody was asked.
    #[error("{cause}; {cure}")]
    Refused {
        /// Why.
        cause: String,
        /// What to do.
        cure: String,
    },
    /// A file could not be used.
    #[error("cannot {action} {path}: {source}{cure}")]
    File {
        /// What was tried, as in "read".
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
        /// What to do, after a semicolon; may be empty.
        cure: &'static str,
    },
    /// The service does not answer as it should.
    #[error("transhumed at {socket} {cause}")]
    Service {
        /// Its socket.
        socket: PathBuf,
        /// What happened, and what to do.
        cause: String,
    },
    /// The service said no.
    #[error("{}", .0.message)]
    Answered(Failure),
}

impl Error {
    pub(crate) fn refused(cause: impl Into<String>, cure: impl Into<String>) -> Self {
        Self::Refused {
            cause: cause.into(),
            cure: cure.into(),
        }
    }

    pub(crate) fn file(action: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::File {
            action,
            path: path.into(),
            source,
            cure: "",
        }
    }

    /// How it ended, for an exit code.
    pub fn kind(&self) -> FailureKind {
        match self {
            Self::Pki(
                transhume_pki::Error::Exists { .. }
                | transhume_pki::Error::Issued { .. }
                | transhume_pki::Error::NoAuthority { .. },
            )
            | Self::Refused { .. } => FailureKind::Refused,
            Self::Answered(failure) => failure.kind,
            _ => FailureKind::Failed,
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Answered(failure) => failure,
            error => Self {
                kind: error.kind(),
                message: error.to_string(),
            },
        }
    }
}
