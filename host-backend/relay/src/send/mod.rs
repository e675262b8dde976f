//! What the source sends: pages that QEMU handed over, what is known of them, and in which form and order they go.

pub(crate) mod batches;
pub(crate) mod buffers;
pub(crate) mod clocks;
pub(crate) mod compression;
pub(crate) mod doubt;
pub(crate) mod frame_map;
pub(crate) mod hand_over;
pub(crate) mod hints;
pub(crate) mod link_rate;
pub(crate) mod packer;
pub(crate) mod page_requests;
pub(crate) mod post_copy_switch;
pub(crate) mod prefetch;
pub(crate) mod queue;
#[cfg(test)]
mod queue_models;
#[cfg(test)]
mod queue_tests;
pub(crate) mod replies;
pub(crate) mod scan_steering;
pub(crate) mod sent_pages;
pub(crate) mod shared;
pub(crate) mod transmit;

use transhume_base::sync;
use transhume_link::window;
