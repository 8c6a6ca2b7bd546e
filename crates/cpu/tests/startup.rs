//! INIT, startup messages and NMI, as a vCPU takes them from its bus.
//!
//! Guest code is real-mode machine code, given as bytes. It reports by writing words to
//! [`REPORT`]; a write to [`END`] stops it.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use strata_cpu::{Bus, Cpu, Crew, Exit, Signal, Waker};
use strata_memory::{Bytes, GuestAddress, GuestMemory};

const REPORT: u16 = 0x10;
const END: u16 = 0xf4;
/// `mov ax, cs; out REPORT, ax`
const REPORT_CS: &[u8] = &[0x8c, 0xc8, 0xe7, 0x10];
/// `out END, al; hlt`
const FINISH: &[u8] = &[0xe6, 0xf4, 0xf4];
/// `sti; hlt`
const HALT: &[u8] = &[0xfb, 0xf4];

struct Sender {
    /// Given when the vCPU asks.
    signals: RefCell<VecDeque<Signal>>,
    /// Given one for each word that is reported, in this order.
    on_report: RefCell<VecDeque<Signal>>,
    /// Given all at once when the vCPU is halted.
    in_halt: RefCell<VecDeque<Signal>>,
    reports: RefCell<Vec<u32>>,
    stop: AtomicBool,
    waker: Waker,
}

impl Bus for Sender {
    fn port_read(&self, _port: u16, _size: u8) -> u32 {
        u32::MAX
    }
    fn port_write(&self, port: u16, _size: u8, value: u32) {
        if port == REPORT {
            self.reports.borrow_mut().push(value);
            if let Some(signal) = self.on_report.borrow_mut().pop_front() {
                self.signals.borrow_mut().push_back(signal);
                self.waker.wake();
            }
        }
        if port == END {
            self.stop.store(true, Ordering::SeqCst);
            self.waker.wake();
        }
    }
    fn mmio_read(&self, _address: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _address: u64, _data: &[u8]) {}
    fn msr_read(&self, _msr: u32) -> Option<u64> {
        None
    }
    fn msr_write(&self, _msr: u32, _value: u64) -> Option<()> {
        None
    }
    fn interrupt_pending(&self) -> bool {
        false
    }
    fn acknowledge_interrupt(&self) -> Option<u8> {
        None
    }
    fn task_priority(&self) -> u8 {
        0
    }
    fn set_task_priority(&self, _priority: u8) {}
    fn next_timer(&self) -> Option<u64> {
        // asked before a halted vCPU waits
        let mut late = self.in_halt.borrow_mut();
        if !late.is_empty() {
            self.signals.borrow_mut().append(&mut late);
            self.waker.wake();
        }
        None
    }
    fn take_signal(&self) -> Option<Signal> {
        self.signals.borrow_mut().pop_front()
    }
}

/// When the vCPU is sent what.
#[derive(Default)]
struct Sent<'a> {
    first: &'a [Signal],
    on_report: &'a [Signal],
    in_halt: &'a [Signal],
}

/// Runs a vCPU that waits for a startup message, with code at these pages. Returns what was
/// reported before the end.
fn run(pages: &[(u8, &[&[u8]])], sent: &Sent<'_>) -> Vec<u32> {
    let queue = |signals: &[Signal]| RefCell::new(signals.iter().copied().collect());
    let memory = GuestMemory::new(1 << 20).unwrap();
    for (page, code) in pages {
        let at = GuestAddress(u64::from(*page) << 12);
        memory.ram().write_slice(&code.concat(), at).unwrap();
    }
    // the vector of NMI: 0x3000:0
    let nmi = GuestAddress(8);
    memory.ram().write_slice(&[0, 0, 0, 0x30], nmi).unwrap();
    let mut cpu = Cpu::new(&Crew::new(memory, 1), 0, 1_000_000).unwrap();
    cpu.wait_for_startup();
    assert!(cpu.waits_for_startup());
    let bus = Sender {
        signals: queue(sent.first),
        on_report: queue(sent.on_report),
        in_halt: queue(sent.in_halt),
        reports: RefCell::default(),
        stop: AtomicBool::new(false),
        waker: cpu.waker(),
    };
    cpu.waker().wake();
    assert_eq!(cpu.run(&bus.stop, &bus), Exit::Stopped);
    bus.reports.into_inner()
}

#[test]
fn a_startup_message_starts_its_page_in_real_mode() {
    let sent = Sent {
        first: &[Signal::Init, Signal::Startup(0x20)],
        ..Sent::default()
    };
    assert_eq!(run(&[(0x20, &[REPORT_CS, FINISH])], &sent), [0x2000]);
}

#[test]
fn a_second_startup_message_is_ignored() {
    let sent = Sent {
        first: &[Signal::Startup(0x20), Signal::Startup(0x21)],
        on_report: &[Signal::Startup(0x21)],
        ..Sent::default()
    };
    let pages: &[(u8, &[&[u8]])] = &[
        (0x20, &[REPORT_CS, FINISH]),
        (0x21, &[REPORT_CS, REPORT_CS, FINISH]),
    ];
    assert_eq!(run(pages, &sent), [0x2000]);
}

#[test]
fn init_and_startup_that_come_together_start_a_halted_vcpu() {
    let sent = Sent {
        first: &[Signal::Startup(0x20)],
        in_halt: &[Signal::Init, Signal::Startup(0x21)],
        ..Sent::default()
    };
    let pages: &[(u8, &[&[u8]])] = &[
        (0x20, &[REPORT_CS, HALT, REPORT_CS, FINISH]),
        (0x21, &[REPORT_CS, FINISH]),
    ];
    assert_eq!(run(pages, &sent), [0x2000, 0x2100]);
}

/// Reports twice and returns.
const HANDLER: (u8, &[&[u8]]) = (0x30, &[REPORT_CS, REPORT_CS, &[0xcf]]);

#[test]
fn an_nmi_ends_a_halt() {
    let sent = Sent {
        first: &[Signal::Startup(0x20)],
        in_halt: &[Signal::Nmi],
        ..Sent::default()
    };
    let pages = &[(0x20, &[HALT, REPORT_CS, FINISH][..]), HANDLER];
    assert_eq!(run(pages, &sent), [0x3000, 0x3000, 0x2000]);
}

#[test]
fn an_nmi_waits_for_the_end_of_another() {
    // the second comes while the handler of the first reports
    let sent = Sent {
        first: &[Signal::Startup(0x20)],
        on_report: &[Signal::Nmi, Signal::Nmi],
        ..Sent::default()
    };
    let pages = &[(0x20, &[REPORT_CS, REPORT_CS, FINISH][..]), HANDLER];
    let reports = run(pages, &sent);
    assert_eq!(reports, [0x2000, 0x3000, 0x3000, 0x3000, 0x3000, 0x2000]);
}

/// Tells a vCPU that waits for startup to stop, while these signals are there for it. Returns
/// what its code, at page 0x20, reported in its first instruction.
fn stop_waiting(signals: &[Signal]) -> Vec<u32> {
    let memory = GuestMemory::new(1 << 20).unwrap();
    // out REPORT, ax
    let page = GuestAddress(0x2_0000);
    memory.ram().write_slice(&[0xe7, 0x10], page).unwrap();
    let mut cpu = Cpu::new(&Crew::new(memory, 1), 0, 1_000_000).unwrap();
    cpu.wait_for_startup();
    let waker = cpu.waker();
    let bus = Sender {
        signals: RefCell::new(signals.iter().copied().collect()),
        on_report: RefCell::default(),
        in_halt: RefCell::default(),
        reports: RefCell::default(),
        stop: AtomicBool::new(false),
        waker: waker.clone(),
    };
    let stop = &AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(move || {
            thread::sleep(Duration::from_millis(20));
            stop.store(true, Ordering::SeqCst);
            waker.wake();
        });
        assert_eq!(cpu.run(stop, &bus), Exit::Stopped);
    });
    bus.reports.into_inner()
}

#[test]
fn a_vcpu_that_waits_for_startup_stops_when_told_to() {
    assert_eq!(stop_waiting(&[]), Vec::<u32>::new());
}

#[test]
fn a_vcpu_that_is_told_to_stop_as_it_is_started_runs_nothing() {
    assert_eq!(stop_waiting(&[Signal::Startup(0x20)]), Vec::<u32>::new());
}
