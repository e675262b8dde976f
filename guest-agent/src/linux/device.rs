//! The kernel module's device, /dev/transhume. See kernel-module/transhume.h.

use super::Error;
use nix::errno::Errno;
use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use transhume_protocol::agent::Range;

/// `TRANSHUME_ABI_VERSION`.
const ABI_VERSION: i32 = 2;
/// Half of it is room for records, 1,365 of them; the other half is the module's scratch space.
const READ_LEN: usize = 64 * 1024;
/// Size of `struct transhume_record`.
const RECORD_LEN: usize = 24;

pub(super) const MAGIC: u8 = 0xd7;

/// `struct transhume_start`.
#[repr(C)]
#[derive(Debug)]
pub(super) struct Start {
    fd: i32,
    flags: u32,
}

/// `struct transhume_counts`: what a report came across, in pages where not said otherwise.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Counts {
    /// Inodes looked at.
    pub(super) inodes: u64,
    /// Files with pages in the cache.
    pub(super) files: u64,
    pub(super) reported: u64,
    pub(super) busy: u64,
    pub(super) unmapped: u64,
    pub(super) unfit: u64,
    pub(super) refused: u64,
}

nix::ioctl_none!(transhume_version, MAGIC, 0);
nix::ioctl_write_ptr!(transhume_start, MAGIC, 1, Start);
nix::ioctl_read!(transhume_counts, MAGIC, 2, Counts);

/// A report of the module.
pub(super) struct Device {
    file: File,
    buffer: Vec<u8>,
    records: VecDeque<(u32, Range)>,
    finished: bool,
}

impl Device {
    /// A report of the module.
    pub(super) fn open() -> Result<Self, Error> {
        Ok(Self {
            file: open_file()?,
            buffer: vec![0; READ_LEN],
            records: VecDeque::new(),
            finished: true,
        })
    }

    /// Begins a report of the file system that this file is on.
    pub(super) fn start(&mut self, on: BorrowedFd<'_>) -> Result<(), Errno> {
        let start = Start {
            fd: on.as_raw_fd(),
            flags: 0,
        };
        self.records.clear();
        // SAFETY: both descriptors are open, and `start` outlives the call, which only reads it.
        unsafe { transhume_start(self.file.as_raw_fd(), &raw const start) }?;
        self.finished = false;
        Ok(())
    }

    /// Whether everything was read.
    pub(super) fn is_finished(&self) -> bool {
        self.finished && self.records.is_empty()
    }

    /// The next record, with the packed device number of its disk. `None` at the end, and also
    /// after some work without a find.
    pub(super) fn next(&mut self) -> Result<Option<(u32, Range)>, Errno> {
        if self.records.is_empty() && !self.finished {
            let read = match nix::unistd::read(self.file.as_fd(), &mut self.buffer) {
                Ok(0) => {
                    self.finished = true;
                    0
                }
                Ok(read) => read,
                Err(Errno::EINTR) => 0,
                Err(error) => return Err(error),
            };
            let records = self.buffer.get(..read).unwrap_or_default();
            self.records
                .extend(records.chunks_exact(RECORD_LEN).filter_map(decode));
        }
        Ok(self.records.pop_front())
    }

    /// What the report came across so far.
    pub(super) fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        // SAFETY: the descriptor is open, and `counts` is what the call fills.
        let _ = unsafe { transhume_counts(self.file.as_raw_fd(), &raw mut counts) };
        counts
    }
}

/// Opens the device and checks that it speaks our version.
pub(super) fn open_file() -> Result<File, Error> {
    let file = File::options()
        .read(true)
        .open("/dev/transhume")
        .map_err(|error| Error::Device(errno(&error)))?;
    // SAFETY: the descriptor is open, and the call has no argument.
    let found = unsafe { transhume_version(file.as_raw_fd()) }.map_err(Error::Device)?;
    if found != ABI_VERSION {
        return Err(Error::DeviceVersion {
            found,
            wanted: ABI_VERSION,
        });
    }
    Ok(file)
}

/// `None` for a void record.
fn decode(record: &[u8]) -> Option<(u32, Range)> {
    let u64_at = |at: usize| {
        let bytes = record.get(at..at + 8)?.try_into().ok()?;
        Some(u64::from_ne_bytes(bytes))
    };
    let u32_at = |at: usize| {
        let bytes = record.get(at..at + 4)?.try_into().ok()?;
        Some(u32::from_ne_bytes(bytes))
    };
    let range = Range {
        pfn: u64_at(0)?,
        sector: u64_at(8)?,
        pages: u32_at(16)?,
    };
    (range.pages > 0).then_some((u32_at(20)?, range))
}

fn errno(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

/// Opens a mount's root, to be handed to the module or walked.
pub(super) fn open_root(point: &std::path::Path) -> Result<OwnedFd, Errno> {
    use nix::fcntl::{OFlag, open};
    use nix::sys::stat::Mode;
    open(
        point,
        OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK,
        Mode::empty(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_decoded_and_a_void_one_dropped() {
        let mut record = Vec::new();
        record.extend(7_u64.to_ne_bytes());
        record.extend(800_u64.to_ne_bytes());
        record.extend(3_u32.to_ne_bytes());
        record.extend(0xfe00_u32.to_ne_bytes());
        let range = Range {
            pfn: 7,
            sector: 800,
            pages: 3,
        };
        assert_eq!(decode(&record), Some((0xfe00, range)));
        assert_eq!(decode(&[0; RECORD_LEN]), None);
        assert_eq!(decode(&record[..20]), None);
    }
}
