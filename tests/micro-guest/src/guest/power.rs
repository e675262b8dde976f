//! How the guest ends by itself: by the registers of QEMU's pc and q35.

use crate::port;

/// PM1a control register, where SeaBIOS puts it (`PORT_ACPI_PM_BASE` + 4), and its bit `SLP_EN` with type S5, which is 0.
const PM1_CONTROL: u16 = 0x604;
const SLEEP_S5: u16 = 1 << 13;
/// The reset control register of both chipsets, and a full reset.
const RESET_CONTROL: u16 = 0xcf9;
const FULL_RESET: u8 = 0x06;
/// QEMU's `pvpanic`, where the VM has one, and the bit for a panic.
const PANIC: u16 = 0x505;
const PANICKED: u8 = 1;

/// A way to end.
#[derive(Debug, Clone, Copy)]
pub(crate) enum End {
    PowerOff,
    Reset,
    Panic,
}

impl End {
    /// By its command.
    pub(crate) fn named(command: &str) -> Option<Self> {
        match command {
            "poweroff" => Some(Self::PowerOff),
            "reset" => Some(Self::Reset),
            "panic" => Some(Self::Panic),
            _ => None,
        }
    }

    /// Ends. Returns where the VM lacks what it takes, and for as long as QEMU takes.
    pub(crate) fn now(self) {
        // SAFETY: registers of the chipset; no memory is touched.
        unsafe {
            match self {
                Self::PowerOff => port::write_u16(PM1_CONTROL, SLEEP_S5),
                Self::Reset => port::write_u8(RESET_CONTROL, FULL_RESET),
                Self::Panic => port::write_u8(PANIC, PANICKED),
            }
        }
    }
}
