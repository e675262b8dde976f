//! Whether two hosts have the same storage for a disk; `docs/storage.md` says what proves what.
//!
//! A disk is a chain of *nodes*: the file or device that the definition names, and for qcow2 what that is based on.
//! Each host opens its own ([`Storage`]), and leaves signs that the other one sees only if both have the same thing:
//! a lock on a file, at an offset that was drawn at random, and a mark beside it ([`Signed`]). [`prove`] judges by
//! them and by what identifies devices. Then both read blocks past all caches, and the source compares them
//! ([`compare`]). Nothing of it writes to the nodes.

mod compare;
mod device;
mod drawn;
mod lock;
mod mark;
mod node;
mod places;
mod proof;
mod structure;
#[cfg(test)]
mod tests;

pub use compare::{Difference, Outcome, compare};
pub use node::{Disk, Signed, Storage};
pub use places::{Care, samples};
pub use proof::{Proof, is_one_kernel, prove};

use std::io;
use std::path::PathBuf;
use thiserror::Error;

/// Why the storage of a host cannot be looked at.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// A node cannot be opened or read.
    #[error(transparent)]
    Volume(#[from] super::Error),
    /// An image's chain cannot be followed.
    #[error("cannot tell what disk {path} is based on: {source}")]
    Chain {
        /// The image.
        path: PathBuf,
        /// What is wrong.
        source: io::Error,
    },
    /// The system does not tell of an open node.
    #[error("cannot look at disk {path}: {source}")]
    Look {
        /// The node.
        path: PathBuf,
        /// What it said.
        source: io::Error,
    },
    /// There are no random numbers.
    #[error("the system gives no random numbers: {0}")]
    Random(io::Error),
    /// The other host asks for, or says, what cannot be.
    #[error("the other host's words on its storage are out of bounds ({0})")]
    Bounds(&'static str),
}

/// Key of the digests, and seed of the places: the source, which draws first and is told digests, cannot choose it.
pub fn key(one: &[u8; 16], other: &[u8; 16]) -> [u8; 16] {
    std::array::from_fn(|n| one[n] ^ other[n])
}
