//! The software backend: [`Processor`] on crate `cpu`.

use std::sync::atomic::AtomicBool;

use std::sync::Arc;

pub use strata_cpu::Crew;
use strata_cpu::{Bus, Cpu, Exit, Statistics, Waker};

use crate::state::{Activity, DescriptorTable, Registers, Segment};
use crate::{Error, Halt, Processor};

/// A software vCPU.
pub struct SoftCpu(Cpu);

impl SoftCpu {
    /// vCPU number `index` of `crew`; the guest is told that its TSC runs at `tsc_khz`.
    pub fn new(crew: &Arc<Crew>, index: u32, tsc_khz: u32) -> Result<Self, Error> {
        Ok(Self(Cpu::new(crew, index, tsc_khz)?))
    }

    /// The software CPU itself, for what other backends do not have.
    pub fn cpu_mut(&mut self) -> &mut Cpu {
        &mut self.0
    }
}

fn segment_out(s: &strata_cpu::state::Segment) -> Segment {
    Segment {
        selector: s.selector,
        base: s.base,
        limit: s.limit,
        attributes: s.attributes,
    }
}

fn segment_in(s: &Segment) -> strata_cpu::state::Segment {
    strata_cpu::state::Segment {
        selector: s.selector,
        base: s.base,
        limit: s.limit,
        attributes: s.attributes,
    }
}

const FS: usize = strata_cpu::state::segment::FS;
const GS: usize = strata_cpu::state::segment::GS;

impl Processor for SoftCpu {
    fn run(&mut self, stop: &AtomicBool, bus: &dyn Bus) -> Halt {
        match self.0.run(stop, bus) {
            Exit::Stopped => Halt::Stopped,
            Exit::TripleFault => Halt::TripleFault,
            Exit::Fatal(reason) => Halt::Fatal(reason),
        }
    }

    fn waker(&self) -> Waker {
        self.0.waker()
    }

    fn statistics(&self) -> Option<Statistics> {
        Some(self.0.statistics())
    }

    fn registers(&self) -> Registers {
        let s = self.0.state();
        let mut segments = s.segments.each_ref().map(segment_out);
        segments[FS].base = s.fs_base;
        segments[GS].base = s.gs_base;
        Registers {
            gpr: s.gpr,
            rip: s.rip,
            rflags: s.rflags(),
            segments,
            ldtr: segment_out(&s.ldtr),
            tr: segment_out(&s.tr),
            gdtr: DescriptorTable {
                base: s.gdtr.base,
                limit: s.gdtr.limit,
            },
            idtr: DescriptorTable {
                base: s.idtr.base,
                limit: s.idtr.limit,
            },
            cr0: s.cr0,
            cr2: s.cr2,
            cr3: s.cr3,
            cr4: s.cr4,
            efer: s.efer,
            kernel_gs_base: s.kernel_gs_base,
            activity: if self.0.waits_for_startup() {
                Activity::WaitForStartup
            } else {
                Activity::Running
            },
        }
    }

    fn set_registers(&mut self, registers: &Registers) -> Result<(), Error> {
        let Registers {
            gpr,
            rip,
            rflags,
            segments,
            ldtr,
            tr,
            gdtr,
            idtr,
            cr0,
            cr2,
            cr3,
            cr4,
            efer,
            kernel_gs_base,
            activity,
        } = registers;
        if *activity == Activity::WaitForStartup {
            // the startup message finds it as INIT leaves it, whatever else was set
            self.0.wait_for_startup();
            return Ok(());
        }
        let s = self.0.state_mut();
        s.gpr = *gpr;
        s.rip = *rip;
        s.set_rflags(*rflags);
        s.segments = segments.each_ref().map(segment_in);
        s.fs_base = segments[FS].base;
        s.gs_base = segments[GS].base;
        s.ldtr = segment_in(ldtr);
        s.tr = segment_in(tr);
        s.gdtr = strata_cpu::state::DescriptorTable {
            base: gdtr.base,
            limit: gdtr.limit,
        };
        s.idtr = strata_cpu::state::DescriptorTable {
            base: idtr.base,
            limit: idtr.limit,
        };
        s.cr0 = *cr0;
        s.cr2 = *cr2;
        s.cr3 = *cr3;
        s.cr4 = *cr4;
        s.efer = *efer;
        s.kernel_gs_base = *kernel_gs_base;
        s.cpl = (segments[strata_cpu::state::segment::SS].attributes >> 5 & 3) as u8;
        self.0.reset_translations();
        Ok(())
    }
}
