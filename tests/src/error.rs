//! The crate's one error type.

use nix::errno::Errno;
use std::path::{Path, PathBuf};

/// What can go wrong in the test bed. Every message names the cause and, where one is known, the cure.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file operation failed.
    #[error("Cannot {action} {}: {source}", path.display())]
    File {
        /// What was tried, as a verb: "read", "create".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's word.
        source: std::io::Error,
    },
    /// A system call failed.
    #[error("Cannot {action}: {source}")]
    System {
        /// What was tried.
        action: String,
        /// The system's word.
        source: std::io::Error,
    },
    /// A program could not be started.
    #[error("Cannot start {program}: {source}. {cure}")]
    Start {
        /// Its name.
        program: String,
        /// The system's word.
        source: std::io::Error,
        /// What to do.
        cure: String,
    },
    /// A program ended with an error.
    #[error("{program} failed ({status}). {cure}\n{output}")]
    Command {
        /// The command line.
        program: String,
        /// How it ended.
        status: String,
        /// What to do.
        cure: String,
        /// The end of what it printed.
        output: String,
    },
    /// This machine lacks something, or cannot get it.
    #[error("{what}. {cure}")]
    Machine {
        /// What is missing.
        what: String,
        /// What to do.
        cure: String,
    },
    /// Something did not happen in time.
    #[error("{what} did not happen within {seconds} s. {hint}")]
    Late {
        /// What was waited for.
        what: String,
        /// How long.
        seconds: u64,
        /// Where to look.
        hint: String,
    },
    /// QEMU refused a command or said something unexpected.
    #[error("QEMU ({name}): {what}")]
    Qemu {
        /// Which one.
        name: String,
        /// What it said.
        what: String,
    },
    /// A guest said something wrong, or nothing.
    #[error("The guest ({name}): {what}")]
    Guest {
        /// Which one.
        name: String,
        /// What it said.
        what: String,
    },
    /// A check of a scenario did not hold.
    #[error("{0}")]
    Check(String),
    /// What was asked for makes no sense.
    #[error("{0}")]
    Usage(String),
    /// Ctrl-C.
    #[error("Interrupted")]
    Interrupted,
}

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// For `map_err` on file operations.
    pub fn file(
        action: &'static str,
        path: impl AsRef<Path>,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Self::File {
            action,
            path,
            source,
        }
    }

    /// For `map_err` on system calls.
    pub fn system<E: Into<std::io::Error>>(action: impl Into<String>) -> impl FnOnce(E) -> Self {
        let action = action.into();
        move |source| Self::System {
            action,
            source: source.into(),
        }
    }

    /// Whether the machine, a download or somebody else's program is to blame, so that nothing is known of ours.
    pub fn is_machinery(&self) -> bool {
        match self {
            Self::Machine { .. } => true,
            Self::File { source, .. }
            | Self::System { source, .. }
            | Self::Start { source, .. } => {
                let code = source.raw_os_error().map(Errno::from_raw);
                matches!(
                    code,
                    Some(Errno::ENOSPC | Errno::ENOMEM | Errno::EMFILE | Errno::ENFILE)
                )
            }
            _ => false,
        }
    }

    /// Something that this machine lacks, and the cure.
    pub fn machine(what: impl Into<String>, cure: impl Into<String>) -> Self {
        Self::Machine {
            what: what.into(),
            cure: cure.into(),
        }
    }
}

/// Fails a scenario unless `holds`.
pub fn check(holds: bool, message: impl FnOnce() -> String) -> Result<()> {
    if holds {
        Ok(())
    } else {
        Err(Error::Check(message()))
    }
}
