//! The state that a vCPU enters the kernel in: 64-bit mode, an identity map of the low
//! 4 GiB, flat segments, interrupts off, RSI at the zero page.

use strata_hypervisor::state::{DescriptorTable, Registers, Segment};
use strata_memory::GuestMemory;

use crate::error::Error;
use crate::layout;

/// Selectors that the boot protocol asks for.
const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;
const BOOT_TSS: u16 = 0x20;

/// Accessed, readable code, present, 64-bit, in 4 KiB units.
const CODE_ATTRIBUTES: u16 = 0xa09b;
/// Accessed, writable data, present, 32-bit, in 4 KiB units.
const DATA_ATTRIBUTES: u16 = 0xc093;
/// A busy 64-bit TSS, present.
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

/// Writes GDT and page tables to guest memory and returns the registers to start with.
pub(super) fn prepare(memory: &GuestMemory, entry: u64) -> Result<Registers, Error> {
    let code = segment(BOOT_CS, CODE_ATTRIBUTES, u32::MAX);
    let data = segment(BOOT_DS, DATA_ATTRIBUTES, u32::MAX);
    let task = segment(BOOT_TSS, TSS_ATTRIBUTES, TSS_LIMIT);
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
        rflags: RFLAGS,
        // ES, CS, SS, DS, FS, GS.
        segments: [data, code, data, data, data, data],
        ldtr: Segment::default(),
        tr: task,
        gdtr: DescriptorTable {
            base: layout::BOOT_GDT,
            limit: (size_of_val(&gdt) - 1) as u16,
        },
        idtr: DescriptorTable::default(),
        cr0: CR0_PE | CR0_ET | CR0_NE | CR0_PG,
        cr3: layout::BOOT_PAGE_TABLES,
        cr4: CR4_PAE,
        efer: EFER_LME | EFER_LMA,
        ..Registers::default()
    })
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
