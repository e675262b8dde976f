//! The virtio disk.

use crate::memory::Disk;
use crate::pci::{self, Identity};
use alloc::string::String;
use virtio_drivers::device::blk::VirtIOBlk;
use virtio_drivers::transport::DeviceType;
use virtio_drivers::transport::pci::PciTransport;

/// The first virtio disk, if there is one.
pub(crate) struct VirtioDisk {
    device: Option<VirtIOBlk<Identity, PciTransport>>,
    /// Serial number, as QEMU's `serial=` gives it.
    pub(crate) serial: String,
}

impl VirtioDisk {
    /// Finds the disk.
    pub(crate) fn find() -> Self {
        let mut device =
            pci::find(DeviceType::Block).and_then(|transport| VirtIOBlk::new(transport).ok());
        let mut id = [0; 20];
        let length = device
            .as_mut()
            .and_then(|device| device.device_id(&mut id).ok())
            .unwrap_or(0);
        Self {
            device,
            serial: id[..length].iter().copied().map(char::from).collect(),
        }
    }

    /// Size in sectors; 0 without a disk.
    pub(crate) fn sectors(&self) -> u64 {
        self.device.as_ref().map_or(0, VirtIOBlk::capacity)
    }
}

impl Disk for VirtioDisk {
    fn read(&mut self, sector: u64, out: &mut [u8]) -> bool {
        self.device
            .as_mut()
            .is_some_and(|device| device.read_blocks(sector as usize, out).is_ok())
    }
}
