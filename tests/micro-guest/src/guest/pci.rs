//! PCI: configuration by ports, the memory that virtio devices see, and the devices themselves.

use crate::{paging, port};
use alloc::alloc::{Layout, alloc_zeroed, dealloc};
use core::ptr::NonNull;
use virtio_drivers::transport::DeviceType;
use virtio_drivers::transport::pci::bus::{
    Command, ConfigurationAccess, DeviceFunction, DeviceFunctionInfo, PciRoot,
};
use virtio_drivers::transport::pci::{PciTransport, virtio_device_type};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

const ADDRESS_PORT: u16 = 0xcf8;
const DATA_PORT: u16 = 0xcfc;

struct Ports;

impl Ports {
    fn select(function: DeviceFunction, register: u8) {
        let address = 1 << 31
            | u32::from(function.bus) << 16
            | u32::from(function.device) << 11
            | u32::from(function.function) << 8
            | u32::from(register & !3);
        // SAFETY: selects a configuration register; one processor does so.
        unsafe { port::write_u32(ADDRESS_PORT, address) };
    }
}

impl ConfigurationAccess for Ports {
    fn read_word(&self, function: DeviceFunction, register: u8) -> u32 {
        Self::select(function, register);
        // SAFETY: reads what was selected.
        unsafe { port::read_u32(DATA_PORT) }
    }

    fn write_word(&mut self, function: DeviceFunction, register: u8, data: u32) {
        Self::select(function, register);
        // SAFETY: writes what was selected, on behalf of the device's driver.
        unsafe { port::write_u32(DATA_PORT, data) };
    }

    unsafe fn unsafe_clone(&self) -> Self {
        Self
    }
}

/// Memory as virtio devices see it: every address is its own.
pub(crate) enum Identity {}

// SAFETY: the heap's blocks are exclusive, zeroed here and aligned; RAM and registers are mapped at
// their physical address.
unsafe impl Hal for Identity {
    fn dma_alloc(pages: usize, _direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let memory = dma_layout(pages)
            // SAFETY: the layout has a size: the drivers ask for at least a page.
            .and_then(|layout| NonNull::new(unsafe { alloc_zeroed(layout) }));
        match memory {
            Some(memory) => (memory.as_ptr().expose_provenance() as PhysAddr, memory),
            None => (0, NonNull::dangling()),
        }
    }

    unsafe fn dma_dealloc(_address: PhysAddr, memory: NonNull<u8>, pages: usize) -> i32 {
        if let Some(layout) = dma_layout(pages) {
            // SAFETY: the caller gives back what `dma_alloc` gave.
            unsafe { dealloc(memory.as_ptr(), layout) };
        }
        0
    }

    unsafe fn mmio_phys_to_virt(address: PhysAddr, size: usize) -> NonNull<u8> {
        paging::map_registers(address..address + size as u64);
        NonNull::new(core::ptr::with_exposed_provenance_mut(address as usize))
            .unwrap_or(NonNull::dangling())
    }

    unsafe fn share(buffer: NonNull<[u8]>, _direction: BufferDirection) -> PhysAddr {
        buffer.as_ptr().cast::<u8>().expose_provenance() as PhysAddr
    }

    unsafe fn unshare(_address: PhysAddr, _buffer: NonNull<[u8]>, _direction: BufferDirection) {}
}

fn dma_layout(pages: usize) -> Option<Layout> {
    Layout::from_size_align(pages * PAGE_SIZE, PAGE_SIZE).ok()
}

/// Every function that is there. Machines of tests have few buses.
fn functions(root: &PciRoot<Ports>) -> impl Iterator<Item = (DeviceFunction, DeviceFunctionInfo)> {
    (0..8).flat_map(|bus| root.enumerate_bus(bus))
}

/// The first virtio device of this type, switched on.
pub(crate) fn find(wanted: DeviceType) -> Option<PciTransport> {
    let mut root = PciRoot::new(Ports);
    let (function, _) =
        functions(&root).find(|(_, info)| virtio_device_type(info) == Some(wanted))?;
    root.set_command(
        function,
        Command::IO_SPACE | Command::MEMORY_SPACE | Command::BUS_MASTER,
    );
    PciTransport::new::<Identity, _>(&mut root, function).ok()
}

/// I/O base of the power management registers: PIIX4 on pc, ICH9 on q35.
pub(crate) fn power_management_base() -> Option<u16> {
    const INTEL: u16 = 0x8086;
    const BASE_REGISTER: u8 = 0x40;
    let root = PciRoot::new(Ports);
    let (function, _) = functions(&root)
        .find(|(_, info)| info.vendor_id == INTEL && matches!(info.device_id, 0x7113 | 0x2918))?;
    let base = (Ports.read_word(function, BASE_REGISTER) & 0xff80) as u16;
    (base != 0).then_some(base)
}
