//! QEMU's stream, read and steered.

pub(crate) mod migration_settings;
pub(crate) mod multifd_barrier;
#[cfg(test)]
mod multifd_barrier_models;
pub(crate) mod multifd_reader;
pub(crate) mod return_path;
mod stream_post_copy;
pub(crate) mod stream_reader;
pub(crate) mod stream_writer;
pub(crate) mod switchover;

use transhume_base::sync;
use transhume_pages::{PAGE_SIZE, PageKey};
use transhume_protocol::qemu::Page;

/// The page of a record.
pub(crate) fn key(page: Page) -> PageKey {
    PageKey {
        block: page.block,
        page: page.offset / PAGE_SIZE as u64,
    }
}
