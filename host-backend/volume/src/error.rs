//! What can go wrong with a disk.

use std::io;
use std::path::PathBuf;
use std::time::Duration;
use thiserror::Error;
use transhume_protocol::nbd::NbdError;

/// Why a disk could not be opened or read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Error {
    /// Opening the file or device failed.
    #[error("cannot open disk {path}: {source}; check that it exists on this host and may be read")]
    Open {
        /// The disk.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The disk is a directory, a pipe or the like.
    #[error(
        "disk {0} is neither a file nor a block device: correct its path in the VM's definition"
    )]
    Kind(PathBuf),
    /// The file system cannot read past the page cache.
    #[error(
        "the file system of disk {0} has no direct reads (O_DIRECT): put the disk on one that has, \
         as QEMU with cache=none needs it too"
    )]
    NoDirect(PathBuf),
    /// Offset or length are not multiples of a sector.
    #[error("a read of {length} bytes at {offset} is not of whole sectors of 512 bytes")]
    Unaligned {
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes.
        length: u64,
    },
    /// The range reaches beyond the disk's end.
    #[error("a read of {length} bytes at {offset} reaches beyond the disk's {size} bytes")]
    OutOfRange {
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes.
        length: u64,
        /// The disk's size in bytes.
        size: u64,
    },
    /// The disk ended before the size that it had when it was opened.
    #[error("disk {path} ends at {offset} bytes: it shrank after it was opened")]
    Truncated {
        /// The disk.
        path: PathBuf,
        /// Where it ended, in bytes.
        offset: u64,
    },
    /// The system refused a read.
    #[error("cannot read disk {path} at {offset}: {source}")]
    Read {
        /// The disk.
        path: PathBuf,
        /// Offset in bytes.
        offset: u64,
        /// What the system said.
        source: io::Error,
    },
    /// A buffer was asked for that is empty or too long, or there is no memory for it.
    #[error("no buffer of {0} bytes: it is empty, longer than is allowed, or memory is short")]
    Buffer(usize),
    /// The socket of an export could not be made.
    #[error(
        "cannot make a socket in {path}: {source}; check that the run directory exists and is ours"
    )]
    Socket {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The storage daemon could not be started.
    #[error(
        "cannot start {program}: {source}; install the package qemu-system-common (Debian), or correct its path"
    )]
    Start {
        /// The program.
        program: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The storage daemon did not offer the disk, or stopped offering it.
    #[error("the export of disk {path} failed: {source}; {said}")]
    Export {
        /// The disk.
        path: PathBuf,
        /// What it said, or what else is known.
        said: String,
        /// What we saw of it.
        source: Box<Error>,
    },
    /// The server closed the connection, or the system did.
    #[error("the connection to the NBD server broke: {0}")]
    Connection(#[source] io::Error),
    /// The server did not answer in time.
    #[error("the NBD server gave no answer for {0:?}: its storage may hang")]
    Silent(Duration),
    /// The server sent what NBD does not allow.
    #[error("the NBD server broke the protocol: {0}")]
    Protocol(#[from] NbdError),
    /// The server refused the export.
    #[error("the NBD server refused the export with code {code}: {said}")]
    Refused {
        /// NBD's code, less its top bit.
        code: u32,
        /// The server's own words, without control characters.
        said: String,
    },
    /// The server acknowledged an export without a size, or says different things of it.
    #[error("the NBD server's description of the export is wrong: {0}")]
    Description(&'static str),
    /// The server failed a read.
    #[error("the NBD server could not read {length} bytes at {offset}: error {code}")]
    Remote {
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes.
        length: usize,
        /// NBD's error number.
        code: u32,
    },
    /// Every connection to the export is gone.
    #[error("no connection to the NBD server is left after earlier errors")]
    NoConnection,
}
