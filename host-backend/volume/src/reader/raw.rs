//! Raw disks, files or block devices, read past the host's page cache.
//!
//! A cached copy would be stale by the time the guest runs here: on network storage nobody tells this
//! host that the source wrote. A file system without direct reads is therefore refused, and nothing is
//! lost by that: QEMU attaches the disk with cache=none, and would refuse it as well.
//!
//! The device is always read in blocks of 4,096 bytes at multiples of 4,096, which suits logical blocks
//! of 512 and of 4,096 bytes alike and needs no question about which it is. What the caller asks for
//! in smaller pieces, or into other memory, goes through a buffer.

use crate::{AlignedBuffer, Error, Reader, SECTOR, check_range};
use nix::fcntl::OFlag;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

const BLOCK: u64 = AlignedBuffer::ALIGNMENT as u64;
const BOUNCE_LEN: usize = 1024 * 1024;

pub(crate) struct RawReader {
    path: PathBuf,
    pub(crate) file: File,
    /// Length of the file in bytes; the disk's size is this, rounded up to whole sectors.
    length: u64,
}

impl RawReader {
    /// Opens a file or a block device.
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let kind = std::fs::metadata(path)
            .map_err(|source| Error::Open {
                path: path.to_owned(),
                source,
            })?
            .file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::Kind(path.to_owned()));
        }
        Self::named(path, path)
    }

    /// Opens once more, for reading, what is open; `path` is its name, for messages.
    pub(crate) fn reopen(path: &Path, opened: &File) -> Result<Self, Error> {
        let number = format!("/proc/self/fd/{}", opened.as_raw_fd());
        Self::named(path, Path::new(&number))
    }

    fn named(path: &Path, name: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Open {
            path: path.to_owned(),
            source,
        };
        // O_NONBLOCK: should a pipe have taken the file's place by now, opening must not wait for it.
        let mut file = OpenOptions::new()
            .read(true)
            .custom_flags((OFlag::O_DIRECT | OFlag::O_NONBLOCK).bits())
            .open(name)
            .map_err(|source| match source.kind() {
                ErrorKind::InvalidInput => Error::NoDirect(path.to_owned()),
                _ => failed(source),
            })?;
        // The length by metadata is 0 for a device.
        let length = file.seek(SeekFrom::End(0)).map_err(failed)?;
        let reader = Self {
            path: path.to_owned(),
            file,
            length,
        };
        // Some file systems take the flag and refuse the reads.
        if length > 0 {
            let mut block = AlignedBuffer::allocate(AlignedBuffer::ALIGNMENT)?;
            reader.fill(0, &mut block).map_err(|error| match error {
                Error::Read { source, .. } if source.kind() == ErrorKind::InvalidInput => {
                    Error::NoDirect(path.to_owned())
                }
                other => other,
            })?;
        }
        Ok(reader)
    }

    /// Fills `blocks`, aligned whole blocks at a multiple of 4,096, and zeroes what lies beyond the
    /// file's end.
    fn fill(&self, offset: u64, blocks: &mut [u8]) -> Result<(), Error> {
        debug_assert!(offset.is_multiple_of(BLOCK) && AlignedBuffer::is_aligned(blocks));
        let there = self.length.saturating_sub(offset);
        let wanted = usize::try_from(there).map_or(blocks.len(), |there| there.min(blocks.len()));
        let mut done = 0;
        while done < wanted {
            let place = offset + done as u64;
            match self.file.read_at(&mut blocks[done..], place) {
                Ok(count) if done + count >= wanted => break,
                // A read that stops early goes on at a block's start.
                Ok(count) if count >= AlignedBuffer::ALIGNMENT => {
                    done += count - count % AlignedBuffer::ALIGNMENT;
                }
                Ok(count) => {
                    return Err(Error::Truncated {
                        path: self.path.clone(),
                        offset: place + count as u64,
                    });
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(source) => return Err(self.failed(place, source)),
            }
        }
        blocks[wanted..].fill(0);
        Ok(())
    }

    fn failed(&self, offset: u64, source: io::Error) -> Error {
        Error::Read {
            path: self.path.clone(),
            offset,
            source,
        }
    }

    /// Reads any whole sectors into any memory.
    fn read_by_copy(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Error> {
        let mut bounce: Option<AlignedBuffer> = None;
        let mut done = 0;
        while done < buffer.len() {
            let place = offset + done as u64;
            let skip = usize::try_from(place % BLOCK).unwrap_or(0);
            let span = (skip + buffer.len() - done)
                .next_multiple_of(AlignedBuffer::ALIGNMENT)
                .min(BOUNCE_LEN);
            let bounce = match &mut bounce {
                Some(bounce) => bounce,
                none => none.insert(AlignedBuffer::allocate(span)?),
            };
            // Spans never grow, so that the first buffer does for all.
            let blocks = &mut bounce[..span];
            self.fill(place - skip as u64, blocks)?;
            let count = (span - skip).min(buffer.len() - done);
            buffer[done..done + count].copy_from_slice(&blocks[skip..skip + count]);
            done += count;
        }
        Ok(())
    }
}

impl Reader for RawReader {
    fn size(&self) -> u64 {
        // QEMU pads the last sector of a raw file with zeros.
        self.length.next_multiple_of(SECTOR)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Error> {
        check_range(self.size(), offset, buffer.len())?;
        if !offset.is_multiple_of(BLOCK) || !AlignedBuffer::is_aligned(buffer) {
            return self.read_by_copy(offset, buffer);
        }
        let whole = buffer.len() - buffer.len() % AlignedBuffer::ALIGNMENT;
        let (blocks, rest) = buffer.split_at_mut(whole);
        self.fill(offset, blocks)?;
        self.read_by_copy(offset + whole as u64, rest)
    }
}
