//! The guest's CPUID: a table made once from the host's, less what the software CPU does
//! not run and plus what it does by itself.
//!
//! Called by `system::execute`, and by the translator, which asks what the guest may
//! execute. Never runs the host's CPUID after creation: it traps to the host's hypervisor.

use std::arch::x86_64::__cpuid_count;

use iced_x86::CpuidFeature;

use crate::mmu::{Core, PHYSICAL_BITS};
use crate::state::cr4;

/// Bits of leaf 1, ECX (Intel SDM vol. 2A, CPUID).
mod leaf1_ecx {
    pub(super) const PCID: u32 = 1 << 17;
    pub(super) const X2APIC: u32 = 1 << 21;
    pub(super) const TSC_DEADLINE: u32 = 1 << 24;
    pub(super) const XSAVE: u32 = 1 << 26;
    pub(super) const OSXSAVE: u32 = 1 << 27;
    pub(super) const AVX: u32 = 1 << 28;
    pub(super) const F16C: u32 = 1 << 29;
    pub(super) const FMA: u32 = 1 << 12;
    pub(super) const HYPERVISOR: u32 = 1 << 31;
    /// SSE3, PCLMULQDQ, SSSE3, CX16, SSE4.1, SSE4.2, MOVBE, POPCNT, AES, RDRAND.
    pub(super) const HOST: u32 =
        1 | 1 << 1 | 1 << 9 | 1 << 13 | 1 << 19 | 1 << 20 | 1 << 22 | 1 << 23 | 1 << 25 | 1 << 30;
}

/// Bits of leaf 1, EDX.
mod leaf1_edx {
    /// DE, PSE, TSC, MSR, PAE, APIC, SEP, MTRR, PGE, PAT, PSE-36, CLFLUSH, FXSR: done here.
    pub(super) const OWN: u32 = 1 << 2
        | 1 << 3
        | 1 << 4
        | 1 << 5
        | 1 << 6
        | 1 << 9
        | 1 << 11
        | 1 << 12
        | 1 << 13
        | 1 << 16
        | 1 << 17
        | 1 << 19
        | 1 << 24;
    /// FPU, CX8, CMOV, MMX, SSE, SSE2.
    pub(super) const HOST: u32 = 1 | 1 << 8 | 1 << 15 | 1 << 23 | 1 << 25 | 1 << 26;
    pub(super) const HTT: u32 = 1 << 28;
}

/// Bits of leaf 7, subleaf 0.
mod leaf7 {
    /// EBX: FSGSBASE, SMEP, ERMS, INVPCID, SMAP, CLFLUSHOPT, CLWB: done here.
    pub(super) const EBX_OWN: u32 = 1 | 1 << 7 | 1 << 9 | 1 << 10 | 1 << 20 | 1 << 23 | 1 << 24;
    /// EBX: BMI1, BMI2, RDSEED, ADX, SHA, and "FCS and FDS are zero".
    pub(super) const EBX_HOST: u32 = 1 << 3 | 1 << 8 | 1 << 13 | 1 << 18 | 1 << 19 | 1 << 29;
    pub(super) const EBX_AVX2: u32 = 1 << 5;
    /// ECX: UMIP.
    pub(super) const ECX_OWN: u32 = 1 << 2;
    /// EDX: FSRM, SERIALIZE.
    pub(super) const EDX_OWN: u32 = 1 << 4 | 1 << 14;
    /// EDX: IBRS and IBPB; `IA32_ARCH_CAPABILITIES`.
    pub(super) const EDX_INTEL: u32 = 1 << 26 | 1 << 29;
}

/// Bits of the extended leaves (AMD APM vol. 3, appendix E).
mod extended {
    /// 0x80000001 ECX: LAHF in 64-bit mode, PREFETCHW.
    pub(super) const ECX_OWN: u32 = 1 | 1 << 8;
    /// 0x80000001 ECX: LZCNT.
    pub(super) const ECX_HOST: u32 = 1 << 5;
    pub(super) const ECX_CMP_LEGACY: u32 = 1 << 1;
    pub(super) const ECX_TOPOEXT: u32 = 1 << 22;
    /// 0x80000001 EDX: SYSCALL, NX, 1 GiB pages, RDTSCP, long mode.
    pub(super) const EDX_OWN: u32 = 1 << 11 | 1 << 20 | 1 << 26 | 1 << 27 | 1 << 29;
    pub(super) const EDX_MMXEXT: u32 = 1 << 22;
    /// 0x80000001 EDX bits that repeat leaf 1 on AMD.
    pub(super) const EDX_MIRROR: u32 = 0x0183_f3ff;
    /// 0x80000008 EBX: XSAVE always stores error pointers, no speculative store bypass, no
    /// branch type confusion.
    pub(super) const EBX_CLEAN: u32 = 1 << 2 | 1 << 26 | 1 << 29;
    /// 0x80000021 EAX: LFENCE serialises, null selectors clear the base, automatic IBRS, no
    /// speculative return stack overflow.
    pub(super) const EAX_21: u32 = 1 << 2 | 1 << 6 | 1 << 8 | 1 << 29;
    /// 0x80000021 ECX: no transient scheduler attacks.
    pub(super) const ECX_21: u32 = 1 << 1 | 1 << 2;
}

/// KVM's paravirtual features: clock sources, no delay after port I/O, stable clock.
const KVM_FEATURES: u32 = 1 | 1 << 1 | 1 << 3 | 1 << 24;
/// Frequency of the local APIC timer's input, in kHz.
const APIC_BUS_KHZ: u32 = 1_000_000;
/// Frequency of the local APIC timer's input, in Hz: leaf 0x15's crystal.
const CRYSTAL_HZ: u64 = APIC_BUS_KHZ as u64 * 1000;

/// Whose CPU the guest sees. The two differ in what SYSRET, SYSENTER and a few others do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Vendor {
    /// Intel, and whoever follows its manual.
    Intel,
    /// AMD and Hygon.
    Amd,
}

/// One row: leaf, subleaf ([`ANY`] when it does not count), EAX to EDX.
type Row = (u32, u32, [u32; 4]);
const ANY: u32 = u32::MAX;

/// What CPUID returns, and what follows from it.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    vendor: Vendor,
    rows: Vec<Row>,
    /// XCR0 bits that may be set.
    xcr0: u64,
    /// One bit for each feature whose instructions may be executed, by its number.
    offered: [u64; 4],
}

fn host(leaf: u32, subleaf: u32) -> [u32; 4] {
    let r = __cpuid_count(leaf, subleaf);
    [r.eax, r.ebx, r.ecx, r.edx]
}

/// The host's leaf if it has it, else zeros.
fn host_or_zero(leaf: u32, subleaf: u32) -> [u32; 4] {
    if host(leaf & 0x8000_0000, 0)[0] >= leaf {
        host(leaf, subleaf)
    } else {
        [0; 4]
    }
}

/// Where a vCPU stands in its machine: its APIC id and how many vCPUs there are.
#[derive(Clone, Copy)]
struct Place {
    apic_id: u32,
    cpus: u32,
}

impl Place {
    /// Bits of the APIC id below the package.
    fn shift(self) -> u32 {
        self.cpus.next_power_of_two().trailing_zeros()
    }
}

impl Table {
    /// Makes the table of the vCPU with `apic_id` in a machine of `cpus`. `tsc_khz` is the
    /// frequency of the guest's TSC; 0 leaves out the leaves that tell it.
    pub(crate) fn from_host(tsc_khz: u32, apic_id: u32, cpus: u32) -> Self {
        let leaf0 = host(0, 0);
        let name: Vec<u8> = [leaf0[1], leaf0[3], leaf0[2]]
            .iter()
            .flat_map(|r| r.to_le_bytes())
            .collect();
        let amd = name == b"AuthenticAMD" || name == b"HygonGenuine";
        let vendor = if amd { Vendor::Amd } else { Vendor::Intel };
        let avx = std::is_x86_feature_detected!("avx") && std::is_x86_feature_detected!("avx2");
        let place = Place {
            apic_id,
            cpus: cpus.max(1),
        };
        let mut table = Self {
            vendor,
            rows: Vec::new(),
            xcr0: if avx { 7 } else { 3 },
            offered: [0; 4],
        };
        table.basic(leaf0, tsc_khz, place);
        table.hypervisor(tsc_khz);
        table.extended(place);
        table.rows.sort_by_key(|row| (row.0, row.1));
        for feature in CpuidFeature::values() {
            if table.offers(feature) {
                table.offered[feature as usize / 64] |= 1 << (feature as usize % 64);
            }
        }
        table
    }

    fn put(&mut self, leaf: u32, subleaf: u32, values: [u32; 4]) {
        self.rows.push((leaf, subleaf, values));
    }

    fn avx(&self) -> bool {
        self.xcr0 & 4 != 0
    }

    fn basic(&mut self, leaf0: [u32; 4], tsc_khz: u32, place: Place) {
        let intel = self.vendor == Vendor::Intel;
        let max = if tsc_khz == 0 { 0xd } else { 0x15 };
        self.put(0, ANY, [max, leaf0[1], leaf0[2], leaf0[3]]);

        let leaf1 = host(1, 0);
        let siblings = place.cpus.next_power_of_two();
        let ebx = leaf1[1] & 0x0000_ff00 | siblings.min(255) << 16 | place.apic_id << 24;
        let mut ecx = leaf1[2] & leaf1_ecx::HOST
            | leaf1_ecx::PCID
            | leaf1_ecx::X2APIC
            | leaf1_ecx::TSC_DEADLINE
            | leaf1_ecx::XSAVE
            | leaf1_ecx::HYPERVISOR;
        if self.avx() {
            ecx |= leaf1_ecx::AVX | leaf1[2] & (leaf1_ecx::FMA | leaf1_ecx::F16C);
        }
        let mut edx = leaf1[3] & leaf1_edx::HOST | leaf1_edx::OWN;
        if place.cpus > 1 {
            edx |= leaf1_edx::HTT;
        }
        self.put(1, ANY, [leaf1[0], ebx, ecx, edx]);
        if intel {
            self.put(2, ANY, host_or_zero(2, 0));
            self.intel_caches();
        }
        // the APIC timer never stops
        self.put(6, ANY, [1 << 2, 0, 0, 0]);
        self.leaf7();
        self.put(0xb, 0, [0, 1, 1 << 8, place.apic_id]);
        self.put(
            0xb,
            1,
            [place.shift(), place.cpus, 2 << 8 | 1, place.apic_id],
        );
        self.put(0xb, ANY, [0, 0, 2, place.apic_id]);
        self.put(0xd, 0, [self.xcr0 as u32, 0, self.xsave_size(), 0]);
        // XSAVEOPT and XSAVEC
        self.put(0xd, 1, [0b11, self.xsave_size(), 0, 0]);
        if self.avx() {
            self.put(0xd, 2, [256, 576, 0, 0]);
        }
        if tsc_khz != 0 {
            let hz = u64::from(tsc_khz) * 1000;
            let common = gcd(hz, CRYSTAL_HZ);
            self.put(
                0x15,
                ANY,
                [
                    (CRYSTAL_HZ / common) as u32,
                    (hz / common) as u32,
                    CRYSTAL_HZ as u32,
                    0,
                ],
            );
        }
    }

    fn xsave_size(&self) -> u32 {
        if self.avx() { 832 } else { 576 }
    }

    /// Leaf 4: the host's caches, each belonging to one core with one thread.
    fn intel_caches(&mut self) {
        for subleaf in 0..8 {
            let mut cache = host_or_zero(4, subleaf);
            // type 0: no more caches
            if cache[0].trailing_zeros() >= 5 {
                break;
            }
            cache[0] &= 0x3fff;
            self.put(4, subleaf, cache);
        }
    }

    fn leaf7(&mut self) {
        let leaf7 = host_or_zero(7, 0);
        let mut ebx = leaf7[1] & leaf7::EBX_HOST | leaf7::EBX_OWN;
        if self.avx() {
            ebx |= leaf7[1] & leaf7::EBX_AVX2;
        }
        let intel = if self.vendor == Vendor::Intel {
            leaf7::EDX_INTEL
        } else {
            0
        };
        self.put(7, 0, [0, ebx, leaf7::ECX_OWN, leaf7::EDX_OWN | intel]);
    }

    /// The leaves that tell the guest what it runs on. The signature and the features are
    /// those of KVM's paravirtual interface; the leaf of frequencies is also known there.
    fn hypervisor(&mut self, tsc_khz: u32) {
        let word = |text: &[u8; 4]| u32::from_le_bytes(*text);
        self.put(
            0x4000_0000,
            ANY,
            [0x4000_0010, word(b"KVMK"), word(b"VMKV"), word(b"M\0\0\0")],
        );
        self.put(0x4000_0001, ANY, [KVM_FEATURES, 0, 0, 0]);
        self.put(0x4000_0010, ANY, [tsc_khz, APIC_BUS_KHZ, 0, 0]);
    }

    fn extended(&mut self, place: Place) {
        let amd = self.vendor == Vendor::Amd;
        let leaf0 = host(0x8000_0000, 0);
        let max = if amd { 0x8000_0021 } else { 0x8000_0008 };
        let name = if amd {
            [leaf0[1], leaf0[2], leaf0[3]]
        } else {
            [0; 3]
        };
        self.put(0x8000_0000, ANY, [max, name[0], name[1], name[2]]);

        let leaf1 = host_or_zero(0x8000_0001, 0);
        let mut ecx = leaf1[2] & extended::ECX_HOST | extended::ECX_OWN;
        let mut edx = extended::EDX_OWN;
        if amd {
            ecx |= extended::ECX_TOPOEXT;
            if place.cpus > 1 {
                ecx |= extended::ECX_CMP_LEGACY;
            }
            edx |= leaf1[3] & extended::EDX_MMXEXT;
            edx |= self.get(1, 0)[3] & extended::EDX_MIRROR;
        }
        self.put(
            0x8000_0001,
            ANY,
            [if amd { leaf1[0] } else { 0 }, 0, ecx, edx],
        );
        for leaf in 0x8000_0002..=0x8000_0006 {
            self.put(leaf, ANY, host_or_zero(leaf, 0));
        }
        // invariant TSC
        self.put(0x8000_0007, ANY, [0, 0, 0, 1 << 8]);
        let cores = place.shift() << 12 | (place.cpus - 1) & 0xff;
        self.put(
            0x8000_0008,
            ANY,
            [PHYSICAL_BITS | 48 << 8, extended::EBX_CLEAN, cores, 0],
        );
        if amd {
            for subleaf in 0..8 {
                let mut cache = host_or_zero(0x8000_001d, subleaf);
                if cache[0].trailing_zeros() >= 5 {
                    break;
                }
                cache[0] &= 0x3fff;
                self.put(0x8000_001d, subleaf, cache);
            }
            self.put(
                0x8000_001e,
                ANY,
                [place.apic_id, place.apic_id & 0xff, 0, 0],
            );
            self.put(0x8000_0021, ANY, [extended::EAX_21, 0, extended::ECX_21, 0]);
        }
    }

    fn get(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let find = |sub| {
            self.rows
                .iter()
                .find(|r| r.0 == leaf && r.1 == sub)
                .map(|r| r.2)
        };
        find(subleaf).or_else(|| find(ANY)).unwrap_or([0; 4])
    }

    /// Offers no random numbers any more.
    pub(crate) fn withdraw_random(&mut self) {
        let withdrawn = [
            (1, 2, 30, CpuidFeature::RDRAND),
            (7, 1, 18, CpuidFeature::RDSEED),
        ];
        for (leaf, register, bit, feature) in withdrawn {
            for row in self.rows.iter_mut().filter(|row| row.0 == leaf) {
                let values: &mut [u32; 4] = &mut row.2;
                values[register] &= !(1 << bit);
            }
            let number = feature as usize;
            self.offered[number / 64] &= !(1 << (number % 64));
        }
    }

    /// Family, model and stepping, as in EDX after a reset.
    pub(crate) fn signature(&self) -> u32 {
        self.get(1, 0)[0]
    }

    /// Whose CPU the guest sees.
    pub(crate) fn vendor(&self) -> Vendor {
        self.vendor
    }

    /// The bits that XCR0 may have.
    pub(crate) fn xcr0(&self) -> u64 {
        self.xcr0
    }

    /// Whether the guest may execute instructions of `feature`. Anything not known here is
    /// not offered.
    pub(crate) fn offered(&self, feature: CpuidFeature) -> bool {
        let number = feature as usize;
        self.offered
            .get(number / 64)
            .is_some_and(|word| word >> (number % 64) & 1 != 0)
    }

    fn offers(&self, feature: CpuidFeature) -> bool {
        use CpuidFeature as F;
        let [_, _, ecx1, edx1] = self.get(1, 0);
        let [_, ebx7, ..] = self.get(7, 0);
        let [_, _, ecx81, _] = self.get(0x8000_0001, 0);
        let bit = |register: u32, bit: u32| register >> bit & 1 != 0;
        match feature {
            F::INTEL8086 | F::INTEL186 | F::INTEL286 | F::INTEL386 | F::INTEL486 | F::X64 | F::CPUID
            | F::MULTIBYTENOP | F::PAUSE | F::RDPMC | F::CX8 | F::CMOV | F::FPU | F::FPU287
            | F::FPU387 | F::MMX | F::SSE | F::SSE2 | F::TSC | F::MSR | F::FXSR | F::CLFSH
            | F::SYSCALL | F::RDTSCP | F::PREFETCHW | F::CLFLUSHOPT | F::CLWB | F::FSGSBASE
            | F::INVPCID | F::SERIALIZE | F::SMAP | F::XSAVE | F::XSAVEC | F::XSAVEOPT
            // no effect on a CPU without them
            | F::CET_IBT | F::CLDEMOTE => true,
            F::SEP => bit(edx1, 11),
            F::SSE3 => bit(ecx1, 0),
            F::PCLMULQDQ => bit(ecx1, 1),
            F::SSSE3 => bit(ecx1, 9),
            F::FMA => bit(ecx1, 12),
            F::CMPXCHG16B => bit(ecx1, 13),
            F::SSE4_1 => bit(ecx1, 19),
            F::SSE4_2 => bit(ecx1, 20),
            F::MOVBE => bit(ecx1, 22),
            F::POPCNT => bit(ecx1, 23),
            F::AES => bit(ecx1, 25),
            F::AVX => bit(ecx1, 28),
            F::F16C => bit(ecx1, 29),
            F::RDRAND => bit(ecx1, 30),
            F::BMI1 => bit(ebx7, 3),
            F::AVX2 => bit(ebx7, 5),
            F::BMI2 => bit(ebx7, 8),
            F::RDSEED => bit(ebx7, 18),
            F::ADX => bit(ebx7, 19),
            F::SHA => bit(ebx7, 29),
            F::LZCNT => bit(ecx81, 5),
            _ => false,
        }
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// What CPUID returns for `leaf` and `subleaf` on this vCPU: EAX, EBX, ECX, EDX.
pub(crate) fn cpuid(core: &Core, leaf: u32, subleaf: u32) -> [u32; 4] {
    let mut values = core.cpuid.get(leaf, subleaf);
    match (leaf, subleaf) {
        (1, _) if core.state.cr4 & cr4::OSXSAVE != 0 => values[2] |= leaf1_ecx::OSXSAVE,
        (0xd, 0) => values[1] = if core.state.xcr0 & 4 != 0 { 832 } else { 576 },
        (0xb, _) => values[2] = values[2] & !0xff | subleaf & 0xff,
        _ => {}
    }
    values
}
