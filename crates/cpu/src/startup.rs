//! NMI, INIT and startup messages (Intel SDM vol. 3A §9.4, §6.7.1): what a local APIC
//! delivers beside interrupts. Called by `engine` between blocks.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::bus::{Bus, Signal};
use crate::engine::Cpu;
use crate::exception::vector;
use crate::state::{DescriptorTable, Segment, State, cr0, gpr, rflags, segment};
use crate::system::{self, TripleFault};

/// A present, accessed, writable data segment; as code, the same with execute rights.
const REAL_DATA: u16 = 0x93;
const REAL_CODE: u16 = 0x9b;
/// Present LDT and busy 32-bit TSS.
const RESET_LDT: u16 = 0x82;
const RESET_TSS: u16 = 0x8b;

/// What has come and is not done.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Startup {
    /// An NMI waits for the end of another, or of an interrupt shadow.
    nmi: bool,
    /// The vCPU waits for a startup message.
    waits: bool,
}

impl Startup {
    /// Whether the vCPU must not simply go on.
    pub(crate) fn is_pending(self) -> bool {
        self.nmi || self.waits
    }
}

/// The state after INIT (Intel SDM vol. 3A, table 9-1): extended state, time stamp counter
/// and most MSRs stay.
fn reset(state: &mut State, signature: u32) {
    let real = |attributes| Segment {
        base: 0,
        limit: 0xffff,
        selector: 0,
        attributes,
    };
    state.gpr = [0; 16];
    state.gpr[gpr::RDX] = signature.into();
    state.rip = 0xfff0;
    state.set_rflags(rflags::FIXED);
    state.segments = [real(REAL_DATA); 6];
    state.segments[segment::CS] = Segment {
        base: 0xffff_0000,
        selector: 0xf000,
        ..real(REAL_CODE)
    };
    (state.fs_base, state.gs_base) = (0, 0);
    state.ldtr = real(RESET_LDT);
    state.tr = real(RESET_TSS);
    let table = DescriptorTable {
        base: 0,
        limit: 0xffff,
    };
    (state.gdtr, state.idtr) = (table, table);
    state.cpl = 0;
    state.cr0 = state.cr0 & (cr0::CD | cr0::NW) | cr0::ET;
    (state.cr2, state.cr3, state.cr4) = (0, 0, 0);
    state.efer = 0;
    state.dr = [0, 0, 0, 0, 0xffff_0ff0, 0x400];
    state.interrupt_shadow = false;
    state.nmi_blocked = false;
}

impl Cpu {
    /// Has the vCPU wait for a startup message, as every one but the first does after
    /// power-up.
    pub fn wait_for_startup(&mut self) {
        let signature = self.core.cpuid.signature();
        reset(&mut self.core.state, signature);
        self.reset_translations();
        self.startup = Startup {
            nmi: false,
            waits: true,
        };
    }

    /// Whether the vCPU waits for a startup message.
    pub fn waits_for_startup(&self) -> bool {
        self.startup.waits
    }

    /// Sees to what the local APIC has for the vCPU. Returns whether an INIT was among it,
    /// after which the vCPU may have been started again already.
    pub(crate) fn take_signals(&mut self, bus: &dyn Bus) -> bool {
        let mut reset = false;
        while let Some(signal) = bus.take_signal() {
            match signal {
                Signal::Init => {
                    self.wait_for_startup();
                    reset = true;
                }
                Signal::Startup(page) if self.startup.waits => {
                    self.startup.waits = false;
                    let code = &mut self.core.state.segments[segment::CS];
                    code.selector = u16::from(page) << 8;
                    code.base = u64::from(page) << 12;
                    self.core.state.rip = 0;
                }
                Signal::Nmi if !self.startup.waits => self.startup.nmi = true,
                Signal::Startup(_) | Signal::Nmi => {}
            }
        }
        reset
    }

    /// Whether an NMI is to be delivered, which also ends a HLT.
    pub(crate) fn takes_nmi(&self) -> bool {
        self.startup.nmi && !self.core.state.nmi_blocked
    }

    /// Waits for a startup message if one is awaited, and delivers an NMI if it may be.
    pub(crate) fn settle_startup(
        &mut self,
        stop: &AtomicBool,
        bus: &dyn Bus,
    ) -> Result<(), TripleFault> {
        while self.startup.waits && !stop.load(Ordering::SeqCst) {
            self.core.seat.rest();
            self.core.state.block().attention.wait(None);
            self.core.resume();
            self.attend();
            self.take_signals(bus);
        }
        if self.takes_nmi() {
            if self.core.state.interrupt_shadow {
                self.core.look_up();
                return Ok(());
            }
            self.startup.nmi = false;
            system::deliver_interrupt(&mut self.core, bus, vector::NMI)?;
        }
        Ok(())
    }
}
