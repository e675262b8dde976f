//! What can go wrong with certificates.

use std::io;
use std::path::{Path, PathBuf};

/// Why a certificate was not made or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is an authority already.
    #[error(
        "{path} is there already; hosts believe that authority: to have another one, take its files away first"
    )]
    Exists {
        /// Its file.
        path: PathBuf,
    },
    /// There is a certificate of that host already.
    #[error(
        "{path} is there already, and may be in use; `--renew` makes a new key and certificate in its place, --out DIR \
         puts them elsewhere"
    )]
    Issued {
        /// Its file.
        path: PathBuf,
    },
    /// There is no authority.
    #[error(
        "{path} cannot be read: {source}; `transhume pki init` makes an authority, --dir says where it is"
    )]
    NoAuthority {
        /// Its file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file.
    #[error("cannot {action} {path}: {source}")]
    File {
        /// As in "write".
        action: &'static str,
        /// Which.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file that holds something else.
    #[error("{path} holds no certificate: {cause}")]
    Content {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        cause: String,
    },
    /// A certificate could not be made.
    #[error("the certificate cannot be made: {0}")]
    Make(#[from] rcgen::Error),
}

impl Error {
    pub(super) fn file(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::File {
            action,
            path: path.to_owned(),
            source,
        }
    }
}
