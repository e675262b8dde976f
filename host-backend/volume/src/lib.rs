//! Reads the shared disks of a guest at the destination, while the source's QEMU still writes them.
//!
//! What is read may be stale (the source may hold newer data, or newer qcow2 metadata): the caller
//! checks digests. What cannot be read is an [`Error`], and the caller asks the source for the data.
//!
//! Raw disks are read past the host's page cache ([`reader::raw`]), qcow2 disks through a read-only export of
//! QEMU's storage daemon ([`reader::qcow2`], [`reader::nbd_client`]), so that the image format is read by the code that
//! wrote it.

#![cfg_attr(test, allow(clippy::disallowed_methods))]

mod buffer;
#[cfg(test)]
mod disk_tests;
mod error;
mod reader;
pub mod same;

pub use buffer::AlignedBuffer;
pub use error::Error;
use reader::{qcow2, raw};
use transhume_base::confine::User;
pub use transhume_machine::definition::Format;
use transhume_machine::image_chain::Image;

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

const STORAGE_DAEMON: &str = "qemu-storage-daemon";

/// Offsets and lengths of reads are multiples of this, in bytes.
pub const SECTOR: u64 = 512;

/// What [`open`] needs to know of this host.
#[derive(Debug, Clone)]
pub struct Settings {
    /// QEMU's storage daemon; a bare name is looked for in `PATH`.
    pub storage_daemon: PathBuf,
    /// A directory of ours, in which an export has its socket for the moment of its start.
    pub run_directory: PathBuf,
    /// Reads of one qcow2 disk that may run at once; further ones wait.
    pub connections: usize,
    /// After this long without an answer, a read of a qcow2 disk fails.
    pub patience: Duration,
    /// Who the storage daemon runs as; nobody else than we if there is none.
    pub user: Option<User>,
}

impl Settings {
    /// The usual settings, with this run directory.
    pub fn new(run_directory: impl Into<PathBuf>) -> Self {
        Self {
            storage_daemon: PathBuf::from(STORAGE_DAEMON),
            run_directory: run_directory.into(),
            connections: 8,
            patience: Duration::from_secs(30),
            user: None,
        }
    }

    /// Takes the storage daemon that is in the same folder as this QEMU, if there is one: it then is of
    /// the same release.
    #[must_use]
    pub fn beside(mut self, qemu: &Path) -> Self {
        let storage_daemon = qemu.with_file_name(STORAGE_DAEMON);
        if storage_daemon.is_file() {
            self.storage_daemon = storage_daemon;
        }
        self
    }
}

/// Read access to a disk as the guest sees it. Blocking; several threads may read at once.
pub trait Reader: Send + Sync {
    /// Size of the disk in bytes, a multiple of [`SECTOR`].
    fn size(&self) -> u64;

    /// Fills `buffer` with what the disk holds from `offset` on. Both `offset` and the buffer's
    /// length are multiples of [`SECTOR`], and the range lies within the disk.
    ///
    /// It is fastest if the buffer is an [`AlignedBuffer`] and offset and length are multiples of
    /// [`AlignedBuffer::ALIGNMENT`]; then nothing is copied. After an error the buffer holds anything.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Error>;
}

/// Opens the disk at `path` for reading.
///
/// For qcow2 this starts a process, which ends with the reader, and with this process.
pub fn open(path: &Path, format: Format, settings: &Settings) -> Result<Box<dyn Reader>, Error> {
    let kind = std::fs::metadata(path)
        .map_err(|error| refused(path, error))?
        .file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(Error::Kind(path.to_owned()));
    }
    let image = Image::open(path, format, true, |_, _| Ok(()));
    open_image(&image.map_err(|error| refused(path, error))?, settings)
}

/// The same of a disk that was opened and checked: what its files' names stand for by now does not matter.
pub fn open_image(image: &Image, settings: &Settings) -> Result<Box<dyn Reader>, Error> {
    let Some(top) = image.nodes.first() else {
        return Err(Error::Open {
            path: PathBuf::new(),
            source: std::io::ErrorKind::NotFound.into(),
        });
    };
    Ok(match top.format {
        Format::Raw => Box::new(raw::RawReader::reopen(&top.path, &top.file)?),
        Format::Qcow2 => Box::new(qcow2::Qcow2Reader::open(image, settings)?),
    })
}

fn refused(path: &Path, source: std::io::Error) -> Error {
    match source.kind() {
        // Of O_DIRECT.
        std::io::ErrorKind::InvalidInput => Error::NoDirect(path.to_owned()),
        _ => Error::Open {
            path: path.to_owned(),
            source,
        },
    }
}

/// Refuses a range that is not of whole sectors, or not within a disk of `size` bytes.
fn check_range(size: u64, offset: u64, length: usize) -> Result<(), Error> {
    let length = length as u64;
    if !offset.is_multiple_of(SECTOR) || !length.is_multiple_of(SECTOR) {
        return Err(Error::Unaligned { offset, length });
    }
    if offset.checked_add(length).is_none_or(|end| end > size) {
        return Err(Error::OutOfRange {
            offset,
            length,
            size,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_storage_daemon_beside_qemu_is_taken_if_there_is_one() {
        let folder = tempfile::tempdir().unwrap();
        let qemu = folder.path().join("qemu-system-x86_64");
        let settings = Settings::new("/run").beside(&qemu);
        assert_eq!(settings.storage_daemon, Path::new(STORAGE_DAEMON));
        std::fs::write(folder.path().join(STORAGE_DAEMON), "").unwrap();
        let settings = settings.beside(&qemu);
        assert_eq!(settings.storage_daemon, folder.path().join(STORAGE_DAEMON));
    }

    #[test]
    fn only_whole_sectors_within_the_disk_are_read() {
        assert!(check_range(4096, 0, 4096).is_ok());
        assert!(check_range(4096, 4096, 0).is_ok());
        assert!(check_range(4096, 3584, 512).is_ok());
        assert!(matches!(
            check_range(4096, 1, 512),
            Err(Error::Unaligned { .. })
        ));
        assert!(matches!(
            check_range(4096, 0, 100),
            Err(Error::Unaligned { .. })
        ));
        assert!(matches!(
            check_range(4096, 3584, 1024),
            Err(Error::OutOfRange { .. })
        ));
        assert!(matches!(
            check_range(4096, u64::MAX - 511, 1024),
            Err(Error::OutOfRange { .. })
        ));
    }
}
