//! What compiled Rust expects of a C library: moving, filling and comparing memory.
//!
//! In assembler, because a compiler may turn a loop in Rust into a call of the very function.

use core::arch::{asm, global_asm};

/// Copies `count` bytes upwards.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    // SAFETY: C's contract; words first, then the rest.
    unsafe {
        asm!(
            "rep movsq",
            "mov ecx, {tail:e}",
            "rep movsb",
            tail = in(reg) count & 7,
            inout("rcx") count / 8 => _,
            inout("rdi") to => _,
            inout("rsi") from => _,
            options(nostack, preserves_flags),
        );
    }
    to
}

/// Copies `count` bytes between places that may overlap.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, count: usize) -> *mut u8 {
    if to.addr().wrapping_sub(from.addr()) >= count {
        // SAFETY: upwards, what is overwritten was already read.
        return unsafe { memcpy(to, from, count) };
    }
    // SAFETY: C's contract; from the last byte down: the odd bytes, then words.
    unsafe {
        asm!(
            "std",
            "rep movsb",
            "sub rsi, 7",
            "sub rdi, 7",
            "mov rcx, {words}",
            "rep movsq",
            "cld",
            words = in(reg) count / 8,
            inout("rcx") count & 7 => _,
            inout("rdi") to.wrapping_add(count).wrapping_sub(1) => _,
            inout("rsi") from.wrapping_add(count).wrapping_sub(1) => _,
            options(nostack),
        );
    }
    to
}

/// Fills `count` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, count: usize) -> *mut u8 {
    let word = u64::from(byte.to_le_bytes()[0]) * 0x0101_0101_0101_0101;
    // SAFETY: C's contract; words first, then the rest.
    unsafe {
        asm!(
            "rep stosq",
            "mov ecx, {tail:e}",
            "rep stosb",
            tail = in(reg) count & 7,
            in("rax") word,
            inout("rcx") count / 8 => _,
            inout("rdi") to => _,
            options(nostack, preserves_flags),
        );
    }
    to
}

/// Compares `count` bytes: below, at or above 0, as the first that differ.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, count: usize) -> i32 {
    let (left, right): (u32, u32);
    // SAFETY: C's contract. Without a difference, both registers keep their zero.
    unsafe {
        asm!(
            "xor {left:e}, {left:e}",
            "xor {right:e}, {right:e}",
            "cmp rax, rax",
            "repe cmpsb",
            "je 2f",
            "movzx {left:e}, byte ptr [rsi - 1]",
            "movzx {right:e}, byte ptr [rdi - 1]",
            "2:",
            left = out(reg) left,
            right = out(reg) right,
            inout("rcx") count => _,
            inout("rsi") a => _,
            inout("rdi") b => _,
            in("rax") 0_u64,
            options(nostack),
        );
    }
    left.cast_signed() - right.cast_signed()
}

/// Whether `count` bytes differ.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, count: usize) -> i32 {
    // SAFETY: the same contract.
    unsafe { memcmp(a, b, count) }
}

// The compiled `alloc` names the unwinder, which a program that aborts never calls.
global_asm!(
    r#"
    .section .text.unwind, "ax", @progbits
    .global _Unwind_Resume
    .global rust_eh_personality
_Unwind_Resume:
rust_eh_personality:
    ud2
"#
);
