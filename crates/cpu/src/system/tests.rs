//! A machine for the tests of system instructions: 2 MiB of identity-mapped 4 KiB pages,
//! a GDT, an IDT whose handlers lie at known addresses, a TSS, and a bus that remembers.

use std::cell::{Cell, RefCell};

use iced_x86::{Decoder, DecoderOptions, Instruction};
use strata_memory::{Bytes, GuestAddress, GuestMemory, PAGE_SIZE};

use super::{Flow, execute};
use crate::bus::Bus;
use crate::crew::Crew;
use crate::exception::Exception;
use crate::mmu::Core;
use crate::state::{DescriptorTable, Segment, cr0, cr4, efer, gpr, rflags, segment as index};

const PML4: u64 = 0x1000;
pub(super) const PAGE_TABLE: u64 = 0x4000;
pub(super) const GDT: u64 = 0x10000;
const IDT: u64 = 0x11000;
pub(super) const TSS: u64 = 0x12000;
pub(super) const RSP0: u64 = 0x20000;
pub(super) const IST1: u64 = 0x22000;
pub(super) const CODE: u64 = 0x30000;
pub(super) const STACK: u64 = 0x40000;
const HANDLERS: u64 = 0x50000;
/// Where the same 2 MiB are mapped a second time.
pub(super) const HIGH: u64 = 0xffff_8000_0000_0000;

pub(super) const KERNEL_CS: u16 = 0x10;
pub(super) const KERNEL_DS: u16 = 0x18;
pub(super) const USER_CS32: u16 = 0x23;
pub(super) const USER_DS: u16 = 0x2b;
pub(super) const USER_CS: u16 = 0x33;
pub(super) const TSS_SELECTOR: u16 = 0x40;
pub(super) const FREE_TSS: u16 = 0x50;
pub(super) const NOT_PRESENT_CS: u16 = 0x60;
pub(super) const BASED_DS: u16 = 0x6b;

pub(super) const PTE_P: u64 = 1;
pub(super) const PTE_W: u64 = 2;
pub(super) const PTE_U: u64 = 4;

/// Remembers what it was asked.
#[derive(Default)]
pub(super) struct TestBus {
    pub(super) written: RefCell<Vec<(u16, u8, u32)>>,
    pub(super) priority: Cell<u8>,
    pub(super) deadline: Cell<u64>,
}

impl Bus for TestBus {
    fn port_read(&self, port: u16, _size: u8) -> u32 {
        0x1234_0000 | u32::from(port)
    }
    fn port_write(&self, port: u16, size: u8, value: u32) {
        self.written.borrow_mut().push((port, size, value));
    }
    fn mmio_read(&self, _address: u64, data: &mut [u8]) {
        data.fill(0xee);
    }
    fn mmio_write(&self, _address: u64, _data: &[u8]) {}
    fn msr_read(&self, msr: u32) -> Option<u64> {
        (msr == 0x6e0).then(|| self.deadline.get())
    }
    fn msr_write(&self, msr: u32, value: u64) -> Option<()> {
        (msr == 0x6e0).then(|| self.deadline.set(value))
    }
    fn interrupt_pending(&self) -> bool {
        false
    }
    fn acknowledge_interrupt(&self) -> Option<u8> {
        None
    }
    fn task_priority(&self) -> u8 {
        self.priority.get()
    }
    fn set_task_priority(&self, priority: u8) {
        self.priority.set(priority);
    }
    fn next_timer(&self) -> Option<u64> {
        None
    }
}

pub(super) struct Machine {
    pub(super) core: Core,
    pub(super) bus: TestBus,
}

/// Descriptor of a flat segment with the given bits 55:40.
fn flat(attributes: u64) -> u64 {
    0x000f_0000_0000_ffff | attributes << 40
}

pub(super) fn handler(vector: u8) -> u64 {
    HANDLERS + u64::from(vector) * 16
}

impl Machine {
    /// In ring 0, interrupts off, RIP at [`CODE`], RSP at [`STACK`].
    pub(super) fn new() -> Self {
        let memory = GuestMemory::new(16 << 20).unwrap();
        let mut machine = Self {
            core: Core::new(&Crew::new(memory, 1), 0, 0).unwrap(),
            bus: TestBus::default(),
        };
        machine.build_pages();
        machine.build_tables();
        let state = &mut *machine.core.state;
        state.cr0 = cr0::PG | cr0::PE | cr0::WP | cr0::NE | cr0::ET | cr0::MP;
        state.cr3 = PML4;
        state.cr4 = cr4::PAE | cr4::PGE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
        state.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
        state.xcr0 = machine.core.cpuid.xcr0();
        state.gdtr = DescriptorTable {
            base: GDT,
            limit: 0x6f,
        };
        state.idtr = DescriptorTable {
            base: IDT,
            limit: 0xfff,
        };
        state.tr = Segment {
            base: TSS,
            limit: 0x67,
            selector: TSS_SELECTOR,
            attributes: 0x8b,
        };
        state.rip = CODE;
        state.gpr[gpr::RSP] = STACK;
        machine.set_ring(0);
        machine.core.select_space(false);
        machine
    }

    fn build_pages(&mut self) {
        let all = PTE_P | PTE_W | PTE_U;
        self.put(PML4, 0x2000 | all);
        self.put(PML4 + 256 * 8, 0x2000 | all);
        self.put(0x2000, 0x3000 | all);
        self.put(0x3000, PAGE_TABLE | all);
        for page in 0..512 {
            self.put(PAGE_TABLE + page * 8, (page * PAGE_SIZE) | all);
        }
    }

    fn build_tables(&mut self) {
        let rows = [
            (KERNEL_CS, flat(0xa09b)),
            (KERNEL_DS, flat(0xc093)),
            (USER_CS32, flat(0xc0fb)),
            (USER_DS, flat(0xc0f3)),
            (USER_CS, flat(0xa0fb)),
            (TSS_SELECTOR, 0x67 | (TSS & 0xff_ffff) << 16 | 0x8b << 40),
            (FREE_TSS, 0x67 | (TSS & 0xff_ffff) << 16 | 0x89 << 40),
            (NOT_PRESENT_CS, flat(0xa01b)),
            // data with base 0x1234_5678, not yet accessed
            (BASED_DS, 0x12cf_f234_5678_ffff),
        ];
        for (selector, raw) in rows {
            self.put(GDT + u64::from(selector & !7), raw);
        }
        for vector in 0..=255 {
            self.set_gate(vector, KERNEL_CS, 0x8e, 0);
        }
        self.put(TSS + 4, RSP0);
        self.put(TSS + 0x24, IST1);
        self.put(TSS + 0x66, 0x68);
    }

    /// Writes an IDT entry for the vector's handler.
    pub(super) fn set_gate(&mut self, vector: u8, selector: u16, access: u64, ist: u64) {
        let offset = handler(vector);
        let at = IDT + u64::from(vector) * 16;
        let low = offset & 0xffff
            | u64::from(selector) << 16
            | ist << 32
            | access << 40
            | offset >> 16 << 48;
        self.put(at, low);
        self.put(at + 8, offset >> 32);
    }

    pub(super) fn set_ring(&mut self, ring: u8) {
        let (cs, ss, code, data) = if ring == 0 {
            (KERNEL_CS, KERNEL_DS, 0xa09b, 0xc093)
        } else {
            (USER_CS, USER_DS, 0xa0fb, 0xc0f3)
        };
        let state = &mut *self.core.state;
        state.cpl = ring;
        state.segments[index::CS] = Segment {
            base: 0,
            limit: u32::MAX,
            selector: cs,
            attributes: code,
        };
        state.segments[index::SS] = Segment {
            base: 0,
            limit: u32::MAX,
            selector: ss,
            attributes: data,
        };
    }

    pub(super) fn user(mut self) -> Self {
        self.set_ring(3);
        self
    }

    /// Sets the page-table entry of the page at `linear`, whichever was there.
    pub(super) fn set_page(&mut self, linear: u64, flags: u64) {
        self.put(
            PAGE_TABLE + linear / PAGE_SIZE * 8,
            linear & !(PAGE_SIZE - 1) | flags,
        );
        self.core.flush_all();
    }

    pub(super) fn put(&mut self, address: u64, value: u64) {
        self.core
            .memory
            .ram()
            .write_obj(value, GuestAddress(address))
            .unwrap();
    }

    pub(super) fn get(&self, address: u64) -> u64 {
        self.core
            .memory
            .ram()
            .read_obj(GuestAddress(address))
            .unwrap()
    }

    pub(super) fn put_bytes(&mut self, address: u64, bytes: &[u8]) {
        self.core
            .memory
            .ram()
            .write_slice(bytes, GuestAddress(address))
            .unwrap();
    }

    pub(super) fn bytes(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.core
            .memory
            .ram()
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    /// Executes one instruction as the engine does.
    pub(super) fn run(&mut self, code: &[u8]) -> Result<Flow, Exception> {
        let instr = decode(code, self.core.state.rip);
        let flow = execute(&mut self.core, &self.bus, &instr)?;
        if flow == Flow::Next {
            self.core.state.rip = instr.next_ip();
        }
        Ok(flow)
    }

    pub(super) fn reg(&mut self, register: usize) -> &mut u64 {
        &mut self.core.state.gpr[register]
    }

    pub(super) fn selector(&self, register: usize) -> u16 {
        self.core.state.segments[register].selector
    }

    /// The `i`th eight bytes on the stack.
    pub(super) fn stacked(&self, i: u64) -> u64 {
        self.get(self.core.state.gpr[gpr::RSP] + 8 * i)
    }

    /// Puts eight-byte values on the stack, the first on top.
    pub(super) fn stack(&mut self, values: &[u64]) {
        let rsp = STACK - 8 * values.len() as u64;
        for (i, value) in values.iter().enumerate() {
            self.put(rsp + 8 * i as u64, *value);
        }
        self.core.state.gpr[gpr::RSP] = rsp;
    }

    pub(super) fn flag(&self, flag: u64) -> bool {
        self.core.state.rflags() & flag != 0
    }

    pub(super) fn set_flags(&mut self, flags: u64) {
        self.core.state.set_rflags(flags | rflags::FIXED);
    }
}

pub(super) fn decode(code: &[u8], rip: u64) -> Instruction {
    Decoder::with_ip(64, code, rip, DecoderOptions::NONE).decode()
}

pub(super) fn gp(code: u32) -> Result<Flow, Exception> {
    Err(Exception::general_protection(code))
}

pub(super) fn ud() -> Result<Flow, Exception> {
    Err(Exception::undefined())
}

/// The #PF of a write from the given ring to a page that is not there.
pub(super) fn missing_page(address: u64, write: bool, user: bool) -> Exception {
    Exception::page_fault(address, u32::from(write) << 1 | u32::from(user) << 2)
}
