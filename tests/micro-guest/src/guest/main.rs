//! A guest without an operating system, for exact tests of migrations.
//!
//! It fills its memory from a seed, reads "page cache" from its disk, changes pages at a set rate,
//! reports its page cache as the guest agent does, and knows what every page must hold. See
//! `README.md` for its parameters and commands.
#![no_std]
#![no_main]
#![allow(
    clippy::cast_possible_truncation,
    reason = "usize has 64 bits here, and page counts were bounded when the tables were made"
)]

extern crate alloc;

mod agent;
mod boot;
mod clock;
mod commands;
mod console;
mod disk;
mod heap;
mod interrupts;
mod lies;
mod memory;
mod pace;
mod paging;
mod parameters;
mod pci;
mod port;
mod power;
mod runtime;
mod serial;
mod start_info;

use crate::agent::{Agent, DiskName};
use crate::clock::Clock;
use crate::commands::{Guest, Parts};
use crate::console::Console;
use crate::disk::VirtioDisk;
use crate::lies::Liar;
use crate::memory::Memory;
use crate::parameters::Parameters;
use crate::serial::Serial;
use crate::start_info::RamMap;
use alloc::string::String;
use core::arch::asm;
use core::fmt::{self, Write};

/// Where the image stands, as in `link.ld`.
const IMAGE_START: u64 = 1 << 20;
const PAGE: u64 = 4096;
/// Heap for everything but the tables of pages.
const HEAP_BASE: u64 = 8 << 20;
/// Heap for each page of memory: its table entry and its place in a list, with room to spare.
const HEAP_PER_PAGE: u64 = 16;

unsafe extern "C" {
    static image_end: u8;
}

/// Entered from [`boot`], on its stack, with the loader's start info.
#[unsafe(no_mangle)]
extern "C" fn start(start_info: u64) -> ! {
    interrupts::set_up();
    // SAFETY: the loader's word; nothing was written but our own image.
    let ram = unsafe { RamMap::new(start_info) };
    let floor = (&raw const image_end).expose_provenance() as u64;
    let heap_size = (HEAP_BASE + ram.total() / 4096 * HEAP_PER_PAGE).next_multiple_of(4096);
    let Some(heap) = ram.place(floor, heap_size) else {
        halt_with(format_args!(
            "no room for a heap of {heap_size} bytes: give the guest more memory"
        ));
    };
    // SAFETY: RAM behind the image; what is below 4 GiB is mapped, and the heap lies there because
    // the map ascends and the first range that fits was taken.
    unsafe { heap::set_up(heap.clone()) };
    // SAFETY: the start info lies below the image.
    let command_line = unsafe { start_info::command_line(start_info) };
    match set_up(&ram, heap.end, &command_line) {
        Ok(guest) => guest.run(),
        Err(problem) => halt_with(format_args!("{problem}")),
    }
}

fn set_up(ram: &RamMap, floor: u64, command_line: &str) -> Result<Guest, String> {
    let parameters = Parameters::parse(command_line)?;
    let clock = Clock::find().ok_or("no ACPI timer: is this machine pc or q35?")?;
    let ranges = ram.above(floor);
    for range in &ranges {
        paging::map_ram(range.clone());
    }
    let mut disk = VirtioDisk::find();
    let sectors = disk.sectors();
    let name = DiskName {
        sectors,
        serial: disk.serial.clone(),
    };
    let liar = Liar::new(parameters.lie, parameters.seed);
    // Image, stack and heap.
    let own = parameters
        .names
        .then(|| IMAGE_START / PAGE..floor.div_ceil(PAGE));
    let agent = Agent::new(Console::find(), name, own, liar);
    let serial = Serial::new();
    // SAFETY: RAM that was just mapped, behind image and heap.
    let memory = unsafe { Memory::new(ranges, &parameters, sectors, &mut disk) }?;
    Ok(Guest::new(
        Parts {
            serial,
            clock,
            memory,
            disk,
            agent,
        },
        &parameters,
    ))
}

/// Ends the guest: `failed` and the reason on COM1, then silence.
fn halt_with(reason: fmt::Arguments<'_>) -> ! {
    // Writing to the port cannot fail.
    let _ = writeln!(serial::LastWords, "\nfailed {reason}");
    loop {
        // SAFETY: stops the processor for good.
        unsafe { asm!("cli", "hlt") };
    }
}

#[panic_handler]
fn panicked(info: &core::panic::PanicInfo<'_>) -> ! {
    halt_with(format_args!("{info}"))
}
