use std::io::{self, Read, Write};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use strata_hypervisor::{Bus, Halt};
use tempfile::NamedTempFile;

use super::*;
use crate::config::{Accel, SerialConsole};
use crate::interrupts::Wake;
use crate::layout;
use crate::testing;
use crate::vcpu::Vcpu;

const LONG: Duration = Duration::from_secs(20);
const COM1: u16 = 0x3f8;
const APIC_BASE: u32 = 0x1b;
const TSC_DEADLINE: u32 = 0x6e0;

/// What stands for a guest: a function that acts on the bus as a kernel would.
type Guest = fn(&AtomicBool, &dyn Bus) -> Halt;

struct Fake(Guest);

impl Vcpu for Fake {
    fn run(&mut self, stop: &AtomicBool, bus: &dyn Bus) -> Halt {
        (self.0)(stop, bus)
    }

    fn wake(&self) -> Wake {
        let thread = thread::current();
        Box::new(move || thread.unpark())
    }
}

#[derive(Clone, Default)]
struct Sink {
    bytes: Arc<Mutex<Vec<u8>>>,
    gate: Arc<Mutex<()>>,
}

impl Write for Sink {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let _gate = self.gate.lock();
        self.bytes.lock().unwrap().extend_from_slice(buffer);
        Ok(buffer.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn config(console: SerialConsole) -> (MachineConfig, NamedTempFile) {
    let mut kernel = NamedTempFile::new().unwrap();
    kernel.write_all(&testing::elf()).unwrap();
    let config = MachineConfig {
        cpus: 1,
        memory: 64 << 20,
        accel: Accel::Soft,
        kernel: kernel.path().into(),
        initrd: Vec::new(),
        modules: Vec::new(),
        command_line: None,
        debug_exit: Some(0xf4),
        disks: Vec::new(),
        console,
        networks: Vec::new(),
        vsock: None,
        shares: Vec::new(),
        ports: Vec::new(),
    };
    (config, kernel)
}

fn machine(guest: Guest, sink: &Sink, input: Option<Box<dyn Read + Send>>) -> Machine {
    let (config, _kernel) = config(SerialConsole {
        output: Box::new(sink.clone()),
        input,
    });
    let fake = move |_, _: &_, _: &_, _: &_| Ok(vec![Box::new(Fake(guest)) as Box<dyn Vcpu>]);
    Machine::open_with(config, fake).unwrap().build().unwrap()
}

fn run(guest: Guest) -> Outcome {
    machine(guest, &Sink::default(), None).run()
}

/// Runs on until told to stop, as a halted vCPU does.
fn idle(stop: &AtomicBool) -> Halt {
    while !stop.load(Ordering::SeqCst) {
        thread::park_timeout(LONG);
    }
    Halt::Stopped
}

fn print(bus: &dyn Bus, text: &[u8]) {
    for byte in text {
        bus.port_write(COM1, 1, (*byte).into());
    }
}

/// S5 and sleep enable to PM1 control.
fn power_off(bus: &dyn Bus) {
    bus.port_write(0x604, 2, 5 << 10 | 1 << 13);
}

/// Puts the local APIC into x2APIC mode and enables it, as Linux does.
fn enable_x2apic(bus: &dyn Bus) {
    let base = bus.msr_read(APIC_BASE).unwrap();
    bus.msr_write(APIC_BASE, base | 1 << 10).unwrap();
    bus.msr_write(0x80f, 0x1ff).unwrap();
}

/// Waits for an interrupt without looking at the timer, as running code does.
fn wait_for_interrupt(bus: &dyn Bus) -> Option<u8> {
    let start = Instant::now();
    while start.elapsed() < LONG {
        if bus.interrupt_pending() {
            return bus.acknowledge_interrupt();
        }
        thread::park_timeout(LONG);
    }
    None
}

#[test]
fn all_output_before_a_power_off_is_written_when_run_returns() {
    let sink = Sink::default();
    let guest: Guest = |stop, bus| {
        print(bus, &b"all of this\n".repeat(10_000));
        power_off(bus);
        idle(stop)
    };

    let outcome = machine(guest, &sink, None).run();

    assert_eq!(outcome, Outcome::PowerOff);
    assert!(*sink.bytes.lock().unwrap() == b"all of this\n".repeat(10_000));
}

#[test]
fn both_ways_of_resetting_end_in_a_reset() {
    let by_register: Guest = |stop, bus| {
        bus.port_write(0xcf9, 1, 6);
        idle(stop)
    };
    let by_keyboard: Guest = |stop, bus| {
        bus.port_write(0x64, 1, 0xfe);
        idle(stop)
    };

    assert_eq!(run(by_register), Outcome::Reset);
    assert_eq!(run(by_keyboard), Outcome::Reset);
}

#[test]
fn a_write_to_the_debug_exit_port_ends_the_machine_with_its_value() {
    let byte: Guest = |stop, bus| {
        bus.port_write(0xf4, 1, 0x1234_5678);
        idle(stop)
    };
    let word: Guest = |stop, bus| {
        if bus.port_read(0xf7, 1) as u8 == 0 {
            bus.port_write(0xf6, 4, 0x1234_5678);
        }
        idle(stop)
    };

    assert_eq!(run(byte), Outcome::DebugExit(0x78));
    assert_eq!(run(word), Outcome::DebugExit(0x1234_5678));
}

#[test]
fn a_debug_exit_port_on_another_device_is_refused() {
    for port in [0x3f5, COM1, 0x3ff, 0x70, 0xcf9, 0x604] {
        let (mut config, _kernel) = config(SerialConsole {
            output: Box::new(io::sink()),
            input: None,
        });
        config.debug_exit = Some(port);

        let error = Machine::open(config).and_then(Opened::build).err();
        assert!(matches!(error, Some(Error::DebugExitTaken(taken)) if taken == port));
    }
}

#[test]
fn a_vcpu_that_cannot_go_on_ends_the_machine() {
    assert_eq!(run(|_, _| Halt::TripleFault), Outcome::TripleFault);
    let outcome = run(|_, _| Halt::Fatal("no such instruction".into()));
    assert_eq!(outcome, Outcome::Failed("no such instruction".into()));
    assert!(matches!(
        run(|_, _| panic!("on purpose")),
        Outcome::Failed(_)
    ));
}

#[test]
fn a_machine_can_be_stopped_from_outside() {
    let machine = machine(|stop, _| idle(stop), &Sink::default(), None);
    let control = machine.control();
    let stopper = thread::spawn(move || {
        thread::sleep(Duration::from_millis(20));
        control.stop();
    });

    assert_eq!(machine.run(), Outcome::Stopped);
    stopper.join().unwrap();
}

#[test]
fn a_machine_stops_though_nobody_takes_its_output() {
    let guest: Guest = |stop, bus| {
        print(bus, &vec![b'x'; 1 << 20]);
        idle(stop)
    };
    let sink = Sink::default();
    let machine = machine(guest, &sink, None);
    let control = machine.control();
    let _gate = sink.gate.lock().unwrap();
    let stopper = thread::spawn(move || {
        thread::sleep(Duration::from_millis(20));
        control.stop();
    });

    assert_eq!(machine.run(), Outcome::Stopped);
    stopper.join().unwrap();
}

#[test]
fn a_panic_told_by_pvpanic_outlives_the_reset_after_it() {
    let guest: Guest = |stop, bus| {
        bus.port_write(0x505, 1, 1);
        bus.port_write(0xcf9, 1, 6);
        idle(stop)
    };

    assert_eq!(run(guest), Outcome::Panic);
}

#[test]
fn a_reset_with_a_panic_report_on_the_console_is_a_panic() {
    let guest: Guest = |stop, bus| {
        print(
            bus,
            b"[    0.5] Kernel panic - not syncing: No init found.\r\n",
        );
        bus.port_write(0xcf9, 1, 6);
        idle(stop)
    };

    assert_eq!(run(guest), Outcome::Panic);
}

#[test]
fn a_local_apic_timer_interrupts_a_running_vcpu() {
    let guest: Guest = |stop, bus| {
        enable_x2apic(bus);
        bus.msr_write(0x832, 2 << 17 | 0xec).unwrap();
        let deadline = tsc() + 3_000_000;
        bus.msr_write(TSC_DEADLINE, deadline).unwrap();
        assert_eq!(bus.next_timer(), Some(deadline));
        let vector = wait_for_interrupt(bus);
        if vector == Some(0xec) && tsc() >= deadline && bus.next_timer().is_none() {
            power_off(bus);
        }
        idle(stop)
    };

    assert_eq!(run(guest), Outcome::PowerOff);
}

#[test]
fn console_input_interrupts_the_guest_through_the_io_apic() {
    let guest: Guest = |stop, bus| {
        enable_x2apic(bus);
        bus.mmio_write(0xfec0_0000, &0x18_u32.to_le_bytes());
        bus.mmio_write(0xfec0_0010, &0x31_u32.to_le_bytes());
        bus.port_write(COM1 + 4, 1, 0x0b);
        bus.port_write(COM1 + 2, 1, 0x81);
        bus.port_write(COM1 + 1, 1, 1);
        if wait_for_interrupt(bus) == Some(0x31) {
            while bus.port_read(COM1 + 5, 1) & 1 != 0 {
                let byte = bus.port_read(COM1, 1) as u8;
                print(bus, &[byte.to_ascii_uppercase()]);
            }
            power_off(bus);
        }
        idle(stop)
    };
    let sink = Sink::default();

    let outcome = machine(guest, &sink, Some(Box::new(&b"typed"[..]))).run();

    assert_eq!(outcome, Outcome::PowerOff);
    assert_eq!(*sink.bytes.lock().unwrap(), b"TYPED");
}

#[test]
fn the_pci_bus_is_reached_by_ports_and_by_ecam() {
    let guest: Guest = |stop, bus| {
        bus.port_write(0xcf8, 4, 0x8000_0000);
        let by_ports = bus.port_read(0xcfc, 4);
        let mut by_ecam = [0; 4];
        bus.mmio_read(layout::PCI_ECAM, &mut by_ecam);
        if by_ports != u32::MAX && by_ports == u32::from_le_bytes(by_ecam) {
            power_off(bus);
        }
        idle(stop)
    };

    assert_eq!(run(guest), Outcome::PowerOff);
}

#[test]
fn the_local_apic_answers_by_mmio_until_it_is_in_x2apic_mode() {
    let guest: Guest = |stop, bus| {
        let version = || {
            let mut data = [0; 4];
            bus.mmio_read(0xfee0_0030, &mut data);
            u32::from_le_bytes(data)
        };
        let before = version();
        enable_x2apic(bus);
        let after = version();
        let by_msr = bus.msr_read(0x803);
        if by_msr == Some(before.into()) && after == u32::MAX {
            power_off(bus);
        }
        idle(stop)
    };

    assert_eq!(run(guest), Outcome::PowerOff);
}

#[test]
fn accesses_that_no_device_answers_read_all_ones_and_unknown_msrs_fault() {
    let guest: Guest = |stop, bus| {
        let mut data = [0; 8];
        bus.mmio_read(0xf000_0000, &mut data);
        bus.mmio_write(0xf000_0000, &data);
        bus.port_write(0x1234, 4, 0);
        let ports = bus.port_read(0x1234, 2) as u16;
        let msrs = [0x8ff, 0x4b56_4d04, 0x1234].map(|msr| bus.msr_read(msr));
        if data == [0xff; 8] && ports == 0xffff && msrs == [None; 3] {
            power_off(bus);
        }
        idle(stop)
    };

    assert_eq!(run(guest), Outcome::PowerOff);
}

#[test]
fn more_vcpus_than_can_be_run_are_refused() {
    let (mut config, _kernel) = config(SerialConsole {
        output: Box::new(io::sink()),
        input: None,
    });
    config.cpus = MAX_CPUS + 1;

    assert!(matches!(Machine::open(config), Err(Error::Cpus(17))));
}

#[test]
fn a_machine_that_is_never_run_ends_its_threads_when_dropped() {
    let sink = Sink::default();
    drop(machine(|stop, _| idle(stop), &sink, None));

    let start = Instant::now();
    while Arc::strong_count(&sink.bytes) > 1 && start.elapsed() < LONG {
        thread::yield_now();
    }
    assert_eq!(Arc::strong_count(&sink.bytes), 1);
}
