//! Readers of disks, by their format.

pub(crate) mod nbd_client;
pub(crate) mod qcow2;
mod qsd_export;
pub(crate) mod raw;
