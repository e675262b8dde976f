//! The threads that read the shared disks.

use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use transhume_protocol::link::Digest;

use super::placement::Placement;
use super::read_plan::{READ_PAGES, Read};
use crate::error::RelayError;
use transhume_pages::digest::Digester;
use transhume_pages::{PAGE_SIZE, SECTORS_PER_PAGE};
use transhume_volume::{self as volume, AlignedBuffer};

/// Reads under way at once: enough for network storage to work on, and 8 MiB of memory.
pub(crate) const THREADS: usize = 8;
/// Bytes in a sector of the agent's reports.
const SECTOR: u64 = PAGE_SIZE as u64 / SECTORS_PER_PAGE;

/// Length of the buffers that are kept, in bytes.
const POOLED: usize = READ_PAGES * PAGE_SIZE;

/// Buffers that no page in the output refers to any more.
#[derive(Default)]
pub(crate) struct Pool {
    free: Mutex<Vec<AlignedBuffer>>,
}

/// A buffer that goes back to its pool.
struct Pooled {
    buffer: Option<AlignedBuffer>,
    pool: Arc<Pool>,
}

impl AsRef<[u8]> for Pooled {
    fn as_ref(&self) -> &[u8] {
        self.buffer.as_deref().unwrap_or_default()
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            let mut free = self
                .pool
                .free
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            if buffer.len() == POOLED && free.len() < THREADS {
                free.push(buffer);
            }
        }
    }
}

/// What a disk reader needs.
pub(crate) struct DiskReader {
    pub(crate) placement: Arc<Placement>,
    pub(crate) volumes: Arc<Vec<Box<dyn volume::Reader>>>,
    pub(crate) digester: Digester,
    pub(crate) pool: Arc<Pool>,
    /// Bytes read so far, by all readers.
    pub(crate) disk_bytes: Arc<AtomicU64>,
}

impl DiskReader {
    /// Reads until the placement is stopped.
    pub(crate) fn run(self) -> Result<(), RelayError> {
        loop {
            let read = self.placement.next_read()?;
            self.placement.output.wait_for_room()?;
            self.placement.wait_for_replies()?;
            let found = self.read(&read);
            self.placement.found(&read, found)?;
        }
    }

    /// A short read gets a short buffer where it waits in the output as a whole.
    fn buffer(&self, length: usize) -> Option<AlignedBuffer> {
        if length <= POOLED / 2 && !self.placement.is_direct() {
            return AlignedBuffer::allocate(length).ok();
        }
        let free = self
            .pool
            .free
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        match free {
            Some(buffer) => Some(buffer),
            None => AlignedBuffer::allocate(POOLED).ok(),
        }
    }

    fn read(&self, read: &Read) -> Option<(super::output::Contents, Vec<Digest>)> {
        let length = read.pages * PAGE_SIZE;
        let mut buffer = self.buffer(length)?;
        let volume = self.volumes.get(usize::from(read.place.disk))?;
        let offset = read.place.sector.checked_mul(SECTOR)?;
        let result = volume.read_at(offset, buffer.get_mut(..length)?);
        if let Err(error) = result {
            // The guest may have named a place that is none: its pages come over the link.
            tracing::debug!(disk = read.place.disk, offset, length, %error, "read ahead failed");
            return None;
        }
        self.disk_bytes.fetch_add(length as u64, Ordering::Relaxed);
        let (pages, _) = buffer.deref().as_chunks::<PAGE_SIZE>();
        let digests = read
            .targets
            .iter()
            .map(|&(_, index)| pages.get(index).map(|page| self.digester.digest(page)))
            .collect::<Option<_>>()?;
        let kept = buffer.len();
        let contents = Pooled {
            buffer: Some(buffer),
            pool: Arc::clone(&self.pool),
        };
        Some((self.placement.output.keep(contents, kept), digests))
    }
}
