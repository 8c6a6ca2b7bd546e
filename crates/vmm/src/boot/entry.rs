//! The state that a vCPU enters the kernel in, always with flat segments and interrupts off.
//! Linux: 64-bit mode, an identity map of the low 4 GiB, RSI at the zero page. Multiboot:
//! 32-bit protected mode without paging, EBX at the information.

use strata_hypervisor::state::{DescriptorTable, Registers, Segment};
use strata_memory::GuestMemory;

use crate::error::Error;
use crate::layout;

/// Selectors that the boot protocol asks for.
const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;
const BOOT_TSS: u16 = 0x20;

/// Selectors of a kernel that is to bring its own, but may forget to.
const PROTECTED_CS: u16 = 0x08;
const PROTECTED_DS: u16 = 0x10;

/// Accessed, readable code, present, 64-bit, in 4 KiB units.
const CODE_ATTRIBUTES: u16 = 0xa09b;
/// Accessed, readable code, present, 32-bit, in 4 KiB units.
const CODE_32_ATTRIBUTES: u16 = 0xc09b;
/// Accessed, writable data, present, 32-bit, in 4 KiB units.
const DATA_ATTRIBUTES: u16 = 0xc093;
/// A busy TSS of the mode's width, present.
const TSS_ATTRIBUTES: u16 = 0x008b;
const TSS_LIMIT: u32 = 0x67;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set; IF and DF are clear.
const RFLAGS: u64 = 2;

const PAGE: u64 = 4096;
const LARGE_PAGE: u64 = 2 << 20;
const GIB: u64 = 1 << 30;
/// Present and writable.
const TABLE_ENTRY: u64 = 0b11;
/// Present, writable and a large page.
const LARGE_PAGE_ENTRY: u64 = 0b1000_0011;
/// How much of memory is mapped, in GiB; a page directory each.
const MAPPED_GIB: u64 = 4;

/// Writes a GDT to guest memory and returns the registers to enter a 32-bit kernel with, these
/// in EAX and EBX (Multiboot specification 0.6.96 §3.2).
pub(super) fn protected_mode(
    memory: &GuestMemory,
    entry: u32,
    eax: u32,
    ebx: u32,
) -> Result<Registers, Error> {
    let code = segment(PROTECTED_CS, CODE_32_ATTRIBUTES, u32::MAX);
    let data = segment(PROTECTED_DS, DATA_ATTRIBUTES, u32::MAX);
    let gdt = [0, descriptor(&code), descriptor(&data)];
    super::write(memory, layout::BOOT_GDT, &words(gdt))?;

    let mut gpr = [0; 16];
    gpr[0] = eax.into();
    gpr[3] = ebx.into();
    gpr[4] = layout::BOOT_STACK;
    Ok(Registers {
        gpr,
        rip: entry.into(),
        cr0: CR0_PE | CR0_ET,
        ..flat(code, data, &gdt)
    })
}

/// Writes GDT and page tables to guest memory and returns the registers to start Linux with.
pub(super) fn long_mode(memory: &GuestMemory, entry: u64) -> Result<Registers, Error> {
    let code = segment(BOOT_CS, CODE_ATTRIBUTES, u32::MAX);
    let data = segment(BOOT_DS, DATA_ATTRIBUTES, u32::MAX);
    let gdt = [0, 0, descriptor(&code), descriptor(&data)];
    super::write(memory, layout::BOOT_GDT, &words(gdt))?;
    super::write(
        memory,
        layout::BOOT_PAGE_TABLES,
        &page_tables(layout::BOOT_PAGE_TABLES),
    )?;

    let mut gpr = [0; 16];
    gpr[4] = layout::BOOT_STACK;
    gpr[6] = layout::ZERO_PAGE;
    Ok(Registers {
        gpr,
        rip: entry,
        cr0: CR0_PE | CR0_ET | CR0_NE | CR0_PG,
        cr3: layout::BOOT_PAGE_TABLES,
        cr4: CR4_PAE,
        efer: EFER_LME | EFER_LMA,
        ..flat(code, data, &gdt)
    })
}

/// What both modes have in common: these segments, from a GDT that is written already, and no
/// interrupts.
fn flat(code: Segment, data: Segment, gdt: &[u64]) -> Registers {
    Registers {
        rflags: RFLAGS,
        // ES, CS, SS, DS, FS, GS.
        segments: [data, code, data, data, data, data],
        ldtr: Segment::default(),
        tr: segment(BOOT_TSS, TSS_ATTRIBUTES, TSS_LIMIT),
        gdtr: DescriptorTable {
            base: layout::BOOT_GDT,
            limit: (size_of_val(gdt) - 1) as u16,
        },
        idtr: DescriptorTable::default(),
        ..Registers::default()
    }
}

fn segment(selector: u16, attributes: u16, limit: u32) -> Segment {
    Segment {
        selector,
        base: 0,
        limit,
        attributes,
    }
}

/// The descriptor in memory of a segment at base 0 whose limit is in 4 KiB units.
fn descriptor(segment: &Segment) -> u64 {
    let limit = u64::from(segment.limit >> 12);
    u64::from(segment.attributes) << 40 | (limit & 0xf_0000) << 32 | limit & 0xffff
}

fn words(words: impl IntoIterator<Item = u64>) -> Vec<u8> {
    words.into_iter().flat_map(u64::to_le_bytes).collect()
}

/// A PML4, a PDPT and a page directory for each GiB, to be placed at `base`.
fn page_tables(base: u64) -> Vec<u8> {
    let entries = (PAGE / 8) as usize;
    let table = |filled: Vec<u64>| {
        let mut table = filled;
        table.resize(entries, 0);
        table
    };
    let pdpt = base + PAGE;
    let directory = |gib: u64| pdpt + PAGE + gib * PAGE;
    let mut tables = table(vec![pdpt | TABLE_ENTRY]);
    tables.extend(table(
        (0..MAPPED_GIB)
            .map(|gib| directory(gib) | TABLE_ENTRY)
            .collect(),
    ));
    let pages = (0..MAPPED_GIB * GIB).step_by(LARGE_PAGE as usize);
    tables.extend(pages.map(|address| address | LARGE_PAGE_ENTRY));
    words(tables)
}
