use super::super::asm::Asm;
use super::super::lower::{Mode, Numbers, Tools};
use super::super::thunks::{self, Callbacks, wide_offset};
use super::super::{Source, translate};
use super::*;
use crate::mmu::Wide;
use crate::segmentation::Legacy;
use crate::system::cpuid::Table;

/// Where the cache would be.
const CACHE: u64 = 0x7f00_0000_0000;
/// Where the guest's 64-bit code is.
const START: u64 = 0xffff_8000_1234_5000;
/// Where its other code is.
const LEGACY_START: u64 = 0x4000;

struct Translator {
    thunks: Thunks,
    host: u64,
    tools: Tools,
    table: Table,
    blocks: u64,
    way: Way,
}

/// What the accesses of a block look at.
#[derive(Clone, Copy)]
enum Way {
    Windows,
    /// The TLB, as where a place roams.
    Tlb,
    /// A wide window before it.
    Wide(Wide),
}

const WIDE: Wide = Wide {
    store: false,
    number: 1,
};
const WAYS: [Way; 4] = [
    Way::Windows,
    Way::Tlb,
    Way::Wide(WIDE),
    Way::Wide(Wide {
        store: true,
        number: 3,
    }),
];

impl Translator {
    fn new() -> Self {
        let mut asm = Asm::new(CACHE);
        let callbacks = Callbacks {
            access: 0x5555_0000_1000,
            commit: 0x5555_0000_2000,
        };
        let thunks = thunks::emit(&mut asm, 7, &callbacks);
        Self {
            thunks,
            host: asm.here().next_multiple_of(16),
            tools: Tools {
                encoder: iced_x86::Encoder::new(64),
                info: InstructionInfoFactory::new(),
            },
            table: Table::from_host(1_000_000, 0, 1),
            blocks: 0,
            way: Way::Windows,
        }
    }

    fn translate(&mut self, bytes: &[u8], mode: Mode, draft: bool) -> Option<Lowered> {
        let places = 0..bytes.len() as u16;
        let roaming: Vec<_> = match self.way {
            Way::Windows => Vec::new(),
            Way::Tlb => places.map(|place| (place, None)).collect(),
            Way::Wide(wide) => places.map(|place| (place, Some(wide))).collect(),
        };
        let source = Source {
            start: start(mode),
            bytes,
            mode,
            crossing: false,
            roaming: &roaming,
            draft,
        };
        let numbers = Numbers { first_system: 0 };
        let table = &self.table;
        let offered = |feature| table.offered(feature);
        let translated = translate(
            &source,
            &mut self.tools,
            &self.thunks,
            self.host,
            &numbers,
            offered,
        )?;
        self.blocks += 1;
        Some(translated.lowered)
    }

    fn verify(&self, block: &Lowered) -> Result<(), String> {
        let offered = |feature| self.table.offered(feature);
        verify(block, self.host, &self.thunks, &offered)
    }

    #[track_caller]
    fn holds(&mut self, bytes: &[u8], mode: Mode) {
        self.way = Way::Windows;
        self.holds_as(bytes, mode, false);
        self.way = WAYS[self.blocks as usize % WAYS.len()];
        if !matches!(self.way, Way::Windows) {
            self.holds_as(bytes, mode, false);
        }
        if mode.has_drafts() {
            self.holds_as(bytes, mode, true);
        }
    }

    #[track_caller]
    fn holds_as(&mut self, bytes: &[u8], mode: Mode, draft: bool) {
        if let Some(block) = self.translate(bytes, mode, draft)
            && let Err(broken) = self.verify(&block)
        {
            let bits = mode.legacy.map_or(64, |legacy| legacy.bitness());
            let guest = Decoder::with_ip(bits, bytes, start(mode), DecoderOptions::NONE).decode();
            let form = if draft { "draft" } else { "block" };
            panic!("{broken}\nin the {form} for {bytes:02x?}, which begins with {guest}");
        }
    }
}

const SUPERVISOR: Mode = Mode {
    user: false,
    extended: 3,
    tsc: true,
    aligned: false,
    single: false,
    apart: false,
    middle: false,
    smap: true,
    open: false,
    legacy: None,
};
const USER: Mode = Mode {
    user: true,
    ..SUPERVISOR
};

fn start(mode: Mode) -> u64 {
    mode.legacy.map_or(START, |_| LEGACY_START)
}

/// 32- or 16-bit code in ring 3, with segments that have bases or limits, or flat ones.
fn legacy(big: bool, segments: u8) -> Mode {
    Mode {
        legacy: Some(Legacy {
            big_code: big,
            big_stack: big,
            checked: segments,
            based: segments,
            code_base: 0x1_0000,
            code_limit: 0xffff,
            tag: 7,
        }),
        ..USER
    }
}

/// Every opcode of every map, with all prefixes that select instructions, every ModRM digit,
/// on registers and on memory; some padding for displacement and immediates.
fn every_form(mut f: impl FnMut(&[u8])) {
    let padding = [0x11; 10];
    let mut bytes = Vec::with_capacity(24);
    let modrm = (0..8).flat_map(|digit| [0xc1_u8, 0x03, 0x84].map(|mode| mode | digit << 3));
    let modrm: Vec<u8> = modrm.collect();
    let mut emit = |prefix: &[u8], opcode: u8| {
        for modrm in &modrm {
            bytes.clear();
            bytes.extend_from_slice(prefix);
            bytes.extend_from_slice(&[opcode, *modrm]);
            bytes.extend_from_slice(&padding);
            f(&bytes);
        }
    };
    let legacy: [&[u8]; 4] = [&[], &[0x66], &[0xf2], &[0xf3]];
    // REX, with registers that have homes and with those that live in the state block
    let rexes: [&[u8]; 4] = [&[], &[0x48], &[0x45], &[0x4f]];
    let maps: [&[u8]; 4] = [&[], &[0x0f], &[0x0f, 0x38], &[0x0f, 0x3a]];
    for opcode in 0..=255 {
        for (legacy, rex, map) in combine(&legacy, &rexes, &maps) {
            emit(&[legacy, rex, map].concat(), opcode);
        }
        // VEX: maps 1 to 3, W, L and the prefix; registers 2 and 13
        for map in 1..=3_u8 {
            for low in 0..8_u8 {
                for w in [0, 0x80_u8] {
                    emit(&[0xc4, 0xe0 | map, w | 0x68 | low], opcode);
                    emit(&[0xc4, 0x40 | map, w | 0x10 | low], opcode);
                }
            }
        }
    }
}

fn combine<'a>(
    a: &'a [&'a [u8]],
    b: &'a [&'a [u8]],
    c: &'a [&'a [u8]],
) -> impl Iterator<Item = (&'a [u8], &'a [u8], &'a [u8])> {
    let with = move |x: &'a [u8]| {
        b.iter()
            .flat_map(move |y| c.iter().map(move |z| (x, *y, *z)))
    };
    a.iter().flat_map(move |x| with(x))
}

#[test]
fn every_form_of_every_instruction_stays_within_guest_state_and_cache() {
    let mut translator = Translator::new();
    let mut even = false;
    every_form(|bytes| {
        even = !even;
        translator.holds(bytes, if even { USER } else { SUPERVISOR });
    });
    assert!(translator.blocks > 100_000, "{}", translator.blocks);
}

#[test]
fn so_does_every_form_in_32_and_16_bit_code() {
    let modes = [legacy(true, 0), legacy(true, 0x3f), legacy(false, 0x3f)];
    let mut translator = Translator::new();
    let mut turn = 0;
    every_form(|bytes| {
        turn += 1;
        translator.holds(bytes, modes[turn % modes.len()]);
    });
    assert!(translator.blocks > 100_000, "{}", translator.blocks);
}

/// xorshift64*: the same on every run.
struct Random(u64);

impl Random {
    fn new() -> Self {
        Self(0x2545_f491_4f6c_dd1d)
    }

    fn byte(&mut self) -> u8 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 56) as u8
    }

    fn of(&mut self, list: &[u8]) -> u8 {
        list[usize::from(self.byte()) % list.len()]
    }

    fn mode(&mut self) -> Mode {
        let bits = self.byte();
        Mode {
            user: bits & 1 != 0,
            aligned: bits & 0x0e == 0,
            single: bits & 0x70 == 0,
            apart: bits & 0x80 != 0,
            open: bits & 0x81 == 0x80,
            ..SUPERVISOR
        }
    }
}

#[test]
fn blocks_of_random_bytes_stay_within_guest_state_and_cache() {
    let mut translator = Translator::new();
    let mut random = Random::new();
    for _ in 0..20_000 {
        let bytes: [u8; 64] = std::array::from_fn(|_| random.byte());
        translator.holds(&bytes, random.mode());
    }
}

/// An instruction that may be part of a span: an access off one of a few registers, or a change
/// of one of them.
fn member(random: &mut Random, block: &mut Vec<u8>) {
    // RBX, RSP, RBP, R9, which lives in the state block, and R13
    let base = random.of(&[3, 4, 5, 9, 13]);
    let reg = random.byte() & 15;
    let rex = 0x48 | (reg & 8) >> 1 | base >> 3;
    let low = base & 7;
    let modrm = |mode: u8, reg: u8| mode | (reg & 7) << 3 | low;
    let sib: &[u8] = if low == 4 { &[0x24] } else { &[] };
    let disp = random.byte();
    match random.byte() % 8 {
        // moves, arithmetic and exchanges with memory
        0..=3 => {
            let opcode = random.of(&[0x8b, 0x89, 0x03, 0x01, 0x87, 0x8a, 0x88, 0x63, 0x3b]);
            block.extend_from_slice(&[rex, opcode, modrm(0x40, reg)]);
            block.extend_from_slice(sib);
            block.push(disp);
        }
        // vectors
        4 => {
            let opcode = random.of(&[0x10, 0x11, 0x28, 0x29]);
            block.extend_from_slice(&[rex, 0x0f, opcode, modrm(0x40, reg)]);
            block.extend_from_slice(sib);
            block.push(disp);
        }
        // ADD, SUB, INC and DEC of the base, in 64 and sometimes 32 bits
        5 => {
            let narrow = 0xf7 | random.byte() & 8;
            let group = random.of(&[0xc0, 0xe8]) | low;
            block.extend_from_slice(&[rex & !4 & narrow, 0x83, group, disp]);
        }
        6 => block.extend_from_slice(&[rex & !4, 0xff, random.of(&[0xc0, 0xc8]) | low]),
        // PUSH, POP and LEA
        _ => match random.byte() % 3 {
            0 => block.extend_from_slice(&[0x41, 0x50 | random.of(&[0, 8]) | low]),
            1 => block.push(0x50 | random.byte() & 15),
            _ => {
                block.extend_from_slice(&[rex, 0x8d, modrm(0x40, random.of(&[base, reg]))]);
                block.extend_from_slice(sib);
                block.push(disp);
            }
        },
    }
}

#[test]
fn accesses_that_share_a_check_stay_within_what_was_checked() {
    let mut translator = Translator::new();
    let mut random = Random::new();
    let mut block = Vec::new();
    for _ in 0..20_000 {
        block.clear();
        for _ in 0..12 {
            member(&mut random, &mut block);
        }
        block.push(random.of(&[0xc3, 0x90]));
        let mode = Mode {
            user: random.byte() & 1 != 0,
            ..SUPERVISOR
        };
        translator.holds(&block, mode);
    }
}

/// What is wrong with the block for MOV RAX, [RBX] when `new` stands where `old` was.
#[track_caller]
fn fault_of(old: &[u8], new: &[u8]) -> String {
    fault_by(Way::Windows, old, new)
}

/// The same where its access looks elsewhere.
#[track_caller]
fn fault_by(way: Way, old: &[u8], new: &[u8]) -> String {
    let mut translator = Translator::new();
    translator.way = way;
    let mut block = translator
        .translate(&[0x48, 0x8b, 0x03], USER, false)
        .unwrap();
    translator.verify(&block).unwrap();
    let starts = |at: &usize| block.code[*at..].starts_with(old);
    let at = (0..block.code.len()).find(starts).unwrap();
    block.code[at..at + new.len()].copy_from_slice(new);
    translator.verify(&block).unwrap_err()
}

/// `cmp r10, 4096 - 8`
const COMPARE: [u8; 7] = [0x49, 0x81, 0xfa, 0xf8, 0x0f, 0, 0];
/// `mov r9, [rbx + r11]`, R9 being guest RAX
const LOAD: [u8; 4] = [0x4e, 0x8b, 0x0c, 0x1b];

#[test]
fn a_block_that_breaks_a_rule_is_found() {
    let wider = [0x49, 0x81, 0xfa, 0xf9, 0x0f, 0, 0];
    let faults: [(&[u8], &[u8], &str); 12] = [
        (&COMPARE, &wider, "more than was checked"),
        (&COMPARE, &[0x90; 7], "nobody's"),
        // mov r9, [rbx]
        (&LOAD, &[0x4c, 0x8b, 0x0b, 0x90], "nobody's"),
        // mov r9, [rcx + r11]
        (&LOAD, &[0x4e, 0x8b, 0x0c, 0x19], "not the address"),
        // clzero, which writes to [rax]
        (&LOAD, &[0x0f, 0x01, 0xfc, 0x90], "not offered"),
        // mov [rbx + r11], r9
        (&LOAD, &[0x4e, 0x89, 0x0c, 0x1b], "stores where a load"),
        // mov rsp, rbx
        (&LOAD, &[0x48, 0x89, 0xdc, 0x90], "stack pointer"),
        // ret 8
        (&LOAD, &[0xc2, 8, 0, 0x90], "stack pointer"),
        // push 0
        (
            &COMPARE,
            &[0x68, 0, 0, 0, 0, 0x90, 0x90],
            "a word on the stack",
        ),
        // syscall
        (&LOAD, &[0x0f, 0x05, 0x90, 0x90], "a call to somewhere else"),
        // int 0x80
        (&LOAD, &[0xcd, 0x80, 0x90, 0x90], "transfer of control"),
        // jmp r9
        (&LOAD, &[0x41, 0xff, 0xe1, 0x90], "past the jump cache"),
    ];
    for (old, new, expected) in faults {
        let fault = fault_of(old, new);
        assert!(fault.contains(expected), "{new:02x?}: {fault}");
    }
}

#[test]
fn an_access_past_a_wide_window_is_found() {
    // ja, and three no-ops
    let over = [0x0f, 0x87];
    let never = [0x0f, 0x1f];
    let fault = fault_by(Way::Wide(WIDE), &over, &never);
    assert!(fault.contains("nobody's"), "{fault}");

    // lea r10, [rbx]; mov r11, r10; sub r11, gs:[start]: of the next window
    let start = wide_offset(WIDE);
    let other = start + size_of::<WideWindow>() as i32;
    let fault = fault_by(Way::Wide(WIDE), &start.to_le_bytes(), &other.to_le_bytes());
    assert!(fault.contains("nobody's"), "{fault}");

    // mov [rbx + r11], r9
    let fault = fault_by(Way::Wide(WIDE), &LOAD, &[0x4e, 0x89, 0x0c, 0x1b]);
    assert!(fault.contains("stores where a load"), "{fault}");
}

#[test]
fn a_draft_that_does_more_than_its_thunk_checked_is_found() {
    let mut translator = Translator::new();
    let mut block = translator
        .translate(&[0x48, 0x8b, 0x03], USER, true)
        .unwrap();
    translator.verify(&block).unwrap();
    let at = (0..block.code.len())
        .find(|at| block.code[*at..].starts_with(&LOAD))
        .unwrap();

    // mov [rbx + r11], r9
    block.code[at..at + 4].copy_from_slice(&[0x4e, 0x89, 0x0c, 0x1b]);
    assert!(
        translator
            .verify(&block)
            .unwrap_err()
            .contains("stores where a load")
    );
    // mov r9, [rcx + r11]
    block.code[at..at + 4].copy_from_slice(&[0x4e, 0x8b, 0x0c, 0x19]);
    assert!(
        translator
            .verify(&block)
            .unwrap_err()
            .contains("not the address")
    );
}
