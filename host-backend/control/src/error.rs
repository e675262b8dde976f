//! What can go wrong in the service.

use std::io;
use std::path::PathBuf;
use transhume_api::{Failure, FailureKind};
use transhume_hypervisor as hypervisor;
use transhume_hypervisor::preflight::Refusal;

/// An error of the service. Each message names the cause and the cure.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The hypervisor's drivers failed.
    #[error("{0}")]
    Hypervisor(#[from] hypervisor::Error),
    /// This host cannot prove who it is.
    #[error(transparent)]
    Identity(#[from] transhume_link::IdentityError),
    /// A VM cannot run here.
    #[error("{}", list(.0))]
    Unfit(Vec<Refusal>),
    /// What was asked for cannot be done as things are; nothing was touched.
    #[error("{cause}; {cure}")]
    Refused {
        /// Why.
        cause: String,
        /// What to do.
        cure: String,
    },
    /// A VM was not started; nothing of it stays.
    #[error("{name} was not started: {cause}")]
    NotStarted {
        /// The VM.
        name: String,
        /// Why, with QEMU's own words.
        cause: String,
    },
    /// The configuration is wrong.
    #[error("{path}: {cause}")]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to write.
        cause: String,
    },
    /// A file, a folder or a socket could not be used.
    #[error("cannot {action} {path}: {source}{cure}")]
    File {
        /// What was tried, as in "create".
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
        /// What to do, after a semicolon; may be empty.
        cure: &'static str,
    },
    /// The service said no.
    #[error("{}", .0.message)]
    Answered(Failure),
}

impl Error {
    pub(super) fn refused(cause: impl Into<String>, cure: impl Into<String>) -> Self {
        Self::Refused {
            cause: cause.into(),
            cure: cure.into(),
        }
    }

    pub(super) fn file(action: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
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
            Self::Unfit(_)
            | Self::Config { .. }
            | Self::Identity(_)
            | Self::Refused { .. }
            | Self::NotStarted { .. }
            | Self::Hypervisor(
                hypervisor::Error::Definition(_) | hypervisor::Error::Differs { .. },
            ) => FailureKind::Refused,
            Self::Answered(failure) => failure.kind,
            _ => FailureKind::Failed,
        }
    }
}

impl From<transhume_machine::Error> for Error {
    fn from(error: transhume_machine::Error) -> Self {
        Self::Hypervisor(error.into())
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

fn list(refusals: &[Refusal]) -> String {
    match refusals {
        [one] => one.to_string(),
        many => {
            let lines: Vec<String> = many.iter().map(|one| format!("\n  - {one}")).collect();
            format!("{} things are in the way:{}", many.len(), lines.concat())
        }
    }
}

impl Error {
    /// For a client that could not be served at all.
    pub(super) fn busy(cause: impl Into<String>) -> Self {
        Self::Answered(Failure {
            kind: FailureKind::Failed,
            message: cause.into(),
        })
    }
}
