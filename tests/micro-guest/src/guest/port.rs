//! I/O ports.

use core::arch::asm;

/// Reads a byte.
///
/// # Safety
///
/// Reading the port must have no effect on memory that Rust knows of.
pub(crate) unsafe fn read_u8(port: u16) -> u8 {
    let value;
    // SAFETY: the caller vouches for the port.
    unsafe {
        asm!("in al, dx", out("al") value, in("dx") port, options(nomem, nostack, preserves_flags));
    };
    value
}

/// Writes a byte.
///
/// # Safety
///
/// As for [`read_u8`].
pub(crate) unsafe fn write_u8(port: u16, value: u8) {
    // SAFETY: the caller vouches for the port.
    unsafe {
        asm!("out dx, al", in("al") value, in("dx") port, options(nomem, nostack, preserves_flags));
    };
}

/// Writes 16 bits.
///
/// # Safety
///
/// As for [`read_u8`].
pub(crate) unsafe fn write_u16(port: u16, value: u16) {
    // SAFETY: the caller vouches for the port.
    unsafe {
        asm!("out dx, ax", in("ax") value, in("dx") port, options(nomem, nostack, preserves_flags));
    };
}

/// Reads 32 bits.
///
/// # Safety
///
/// As for [`read_u8`].
pub(crate) unsafe fn read_u32(port: u16) -> u32 {
    let value;
    // SAFETY: the caller vouches for the port.
    unsafe {
        asm!("in eax, dx", out("eax") value, in("dx") port, options(nomem, nostack, preserves_flags));
    };
    value
}

/// Writes 32 bits.
///
/// # Safety
///
/// As for [`read_u8`].
pub(crate) unsafe fn write_u32(port: u16, value: u32) {
    // SAFETY: the caller vouches for the port.
    unsafe {
        asm!("out dx, eax", in("eax") value, in("dx") port, options(nomem, nostack, preserves_flags));
    };
}
