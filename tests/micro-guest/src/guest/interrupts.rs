//! The interrupt table: exceptions end the guest with a word on COM1, and the PIT wakes it from `hlt`.

use crate::{halt_with, port};
use core::arch::{asm, global_asm};

const GATES: usize = 48;
const TIMER_VECTOR: usize = 32;
/// Divisor of the PIT's 1,193,182 Hz: 250 wake-ups a second.
const PIT_DIVISOR: u16 = 4773;

// Exceptions: a stub each pushes vector and, where the processor does not, an error code.
global_asm!(
    r#"
    .section .text.stubs, "ax", @progbits
    .global exception_stubs
    .balign 16
exception_stubs:
    .set vector, 0
    .rept 32
    .balign 16
    .if (vector == 8) || (vector >= 10 && vector <= 14) || (vector == 17) || (vector == 21) || (vector == 29) || (vector == 30)
    .else
    pushq $0
    .endif
    pushq $vector
    jmp exception_common
    .set vector, vector + 1
    .endr
exception_common:
    popq %rdi
    popq %rsi
    movq (%rsp), %rdx
    movq %cr2, %rcx
    andq $-16, %rsp
    call exception
    ud2

    .global timer_stub
timer_stub:
    pushq %rax
    movb $0x20, %al
    outb %al, $0x20
    popq %rax
    iretq

    .global ignore_stub
ignore_stub:
    iretq
"#,
    options(att_syntax)
);

unsafe extern "C" {
    static exception_stubs: [[u8; 16]; 32];
    fn timer_stub();
    fn ignore_stub();
}

#[repr(C, align(16))]
struct Table([[u64; 2]; GATES]);

static mut TABLE: Table = Table([[0; 2]; GATES]);

#[repr(C, packed)]
struct TablePointer {
    limit: u16,
    base: u64,
}

fn gate(handler: u64) -> [u64; 2] {
    // Interrupt gate, present, code segment 8.
    [
        (handler & 0xffff) | 8 << 16 | 0x8e << 40 | (handler >> 16 & 0xffff) << 48,
        handler >> 32,
    ]
}

/// Sets up the table, the interrupt controller and the timer. Interrupts stay off but in [`wait`].
pub(crate) fn set_up() {
    let timer = timer_stub as unsafe extern "C" fn() as usize as u64;
    let ignore = ignore_stub as unsafe extern "C" fn() as usize as u64;
    let pointer = TablePointer {
        limit: (size_of::<Table>() - 1) as u16,
        base: (&raw const TABLE).expose_provenance() as u64,
    };
    // SAFETY: one processor runs, with interrupts off, and the table lives for ever.
    unsafe {
        let stubs = (&raw const exception_stubs).expose_provenance() as u64;
        for vector in 0..GATES {
            TABLE.0[vector] = gate(match vector {
                0..TIMER_VECTOR => stubs + 16 * vector as u64,
                TIMER_VECTOR => timer,
                _ => ignore,
            });
        }
        asm!("lidt [{}]", in(reg) &raw const pointer, options(readonly, nostack, preserves_flags));
        // Both controllers: vectors from 32, edge triggered, all masked but the timer.
        for (port, value) in [
            (0x20, 0x11),
            (0xa0, 0x11),
            (0x21, 0x20),
            (0xa1, 0x28),
            (0x21, 0x04),
            (0xa1, 0x02),
            (0x21, 0x01),
            (0xa1, 0x01),
            (0x21, 0xfe),
            (0xa1, 0xff),
        ] {
            port::write_u8(port, value);
        }
        port::write_u8(0x43, 0x34);
        port::write_u8(0x40, PIT_DIVISOR.to_le_bytes()[0]);
        port::write_u8(0x40, PIT_DIVISOR.to_le_bytes()[1]);
    }
}

/// Sleeps until the timer's next tick, 4 ms at most.
pub(crate) fn wait() {
    // SAFETY: the handler saves what it changes; the stack pointer steps over the red zone first.
    unsafe {
        asm!(
            "lea rsp, [rsp - 128]",
            "sti",
            "hlt",
            "cli",
            "lea rsp, [rsp + 128]"
        );
    };
}

#[unsafe(no_mangle)]
extern "C" fn exception(vector: u64, error: u64, address: u64, fault: u64) -> ! {
    halt_with(format_args!(
        "exception {vector} error {error:#x} at {address:#x}, cr2 {fault:#x}"
    ))
}
