//! From the hypervisor's PVH entry (32-bit, no paging) to Rust in long mode.

use core::arch::global_asm;

// The tables of the first 4 GiB are data: entry code only has to load them. 2 MiB pages, because
// QEMU's default CPU knows no larger ones.
global_asm!(
    r#"
    .section .note.Xen, "a", @note
    .balign 4
    .long 4                 # size of the name
    .long 8                 # size of the value
    .long 18                # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_start

    .section .text.boot, "ax", @progbits
    .code32
    .global pvh_start
pvh_start:
    cli
    cld
    movl $boot_stack_top, %esp
    movl %ebx, %edi         # the start info, later the first argument
    movl %cr4, %eax
    orl $0x620, %eax        # PAE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl $boot_pml4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx  # EFER
    rdmsr
    orl $0x100, %eax        # LME
    wrmsr
    movl %cr0, %eax
    andl $0x9ffffff3, %eax  # no CD, NW, TS, EM
    orl $0x80000023, %eax   # PG, NE, MP, PE
    movl %eax, %cr0
    lgdt boot_gdt_pointer
    ljmp $8, $1f
    .code64
1:
    movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    xorl %eax, %eax
    movl %eax, %fs
    movl %eax, %gs
    movl %edi, %edi         # clears the upper half
    xorl %ebp, %ebp
    call start
    ud2

    .section .data.boot, "aw", @progbits
    .balign 8
boot_gdt:
    .quad 0
    .quad 0x00209a0000000000    # 64-bit code
    .quad 0x0000920000000000    # data
boot_gdt_pointer:
    .word 23
    .quad boot_gdt

    .balign 4096
    .global boot_pml4
boot_pml4:
    .quad boot_pdpt + 3
    .fill 511, 8, 0
boot_pdpt:
    .quad boot_directories + 0x0003
    .quad boot_directories + 0x1003
    .quad boot_directories + 0x2003
    .quad boot_directories + 0x3003
    .fill 508, 8, 0
boot_directories:
    .set frame, 0
    .rept 2048
    .quad frame * 0x200000 + 0x83
    .set frame, frame + 1
    .endr

    .section .bss.boot, "aw", @nobits
    .balign 4096
    .skip 256 * 1024
boot_stack_top:
"#,
    options(att_syntax)
);
