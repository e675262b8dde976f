//! Time from the ACPI power management timer.
//!
//! Of the clocks that QEMU's pc and q35 have, this one needs no calibration, is there whatever
//! `hpet=` says, and goes on at the destination where it stopped at the source, because its value
//! is made from the virtual clock that migrates. The TSC's frequency is the host's; the PIT wraps
//! after 55 ms. The timer's 24 bits wrap after 4.7 s, so it is read in every turn of the main loop;
//! a longer stall loses time, which only lowers a rate.

use crate::pci;
use crate::port;

/// Ticks in a second.
pub(crate) const HZ: u64 = 3_579_545;
const MASK: u32 = 0x00ff_ffff;

/// The clock.
pub(crate) struct Clock {
    port: u16,
    last: u32,
    ticks: u64,
}

impl Clock {
    /// Finds the timer; `None` on a machine without ACPI.
    pub(crate) fn find() -> Option<Self> {
        let port = pci::power_management_base()? + 8;
        let mut clock = Self {
            port,
            last: 0,
            ticks: 0,
        };
        clock.last = clock.read();
        Some(clock)
    }

    fn read(&self) -> u32 {
        // SAFETY: the timer's register, which reading does not change.
        unsafe { port::read_u32(self.port) & MASK }
    }

    /// Ticks since the clock was found.
    pub(crate) fn now(&mut self) -> u64 {
        let value = self.read();
        self.ticks += u64::from(value.wrapping_sub(self.last) & MASK);
        self.last = value;
        self.ticks
    }

    /// Microseconds in so many ticks.
    pub(crate) const fn micros(ticks: u64) -> u64 {
        ticks / HZ * 1_000_000 + ticks % HZ * 1_000_000 / HZ
    }
}
