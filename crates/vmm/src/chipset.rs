//! The glue of the chipset's devices to the buses: locks, the time of day, and what comes
//! of a guest's requests to end.

use std::sync::Arc;
use std::sync::Mutex;

use strata_devices::ioapic::{IOAPIC_BASE, IOAPIC_SIZE};
use strata_devices::pm::{self, PowerManagement, Request};
use strata_devices::pvpanic::{self, Events, PVPANIC_PORT};
use strata_devices::rtc::{self, RTC_PORT, Rtc};
use strata_devices::serial::{self, COM1_PORT};

use crate::bus::{Buses, MmioDevice, PortDevice};
use crate::clock::{Clock, time_of_day};
use crate::console::SerialPort;
use crate::ending::{Ending, Outcome};
use crate::error::Error;
use crate::interrupts::Interrupts;
use crate::layout;
use crate::sync::lock;
use crate::virtio::PciRoot;

struct RtcPorts(Mutex<Rtc>);

impl PortDevice for RtcPorts {
    fn port_read(&self, port: u16, _size: u8) -> u32 {
        lock(&self.0)
            .read((port - RTC_PORT) as u8, time_of_day())
            .into()
    }

    fn port_write(&self, port: u16, _size: u8, value: u32) {
        lock(&self.0).write((port - RTC_PORT) as u8, value as u8, time_of_day());
    }
}

struct PowerPorts {
    power: Mutex<PowerManagement>,
    clock: Clock,
    ending: Arc<Ending>,
}

impl PortDevice for PowerPorts {
    fn port_read(&self, port: u16, _size: u8) -> u32 {
        if port == pm::TIMER_PORT {
            return PowerManagement::timer(self.clock.now());
        }
        lock(&self.power).read(port).into()
    }

    fn port_write(&self, port: u16, _size: u8, value: u32) {
        let request = lock(&self.power).write(port, value as u16);
        match request {
            Some(Request::PowerOff) => self.ending.end(Outcome::PowerOff),
            Some(Request::Reset) => self.ending.end(Outcome::Reset),
            None => {}
        }
    }
}

struct PvPanicPort {
    ending: Arc<Ending>,
    serial: Arc<SerialPort>,
}

impl PortDevice for PvPanicPort {
    fn port_read(&self, _port: u16, _size: u8) -> u32 {
        // A driver that asks what is offered will tell of panics itself.
        self.serial.stop_panic_watch();
        pvpanic::read().into()
    }

    fn port_write(&self, _port: u16, _size: u8, value: u32) {
        let events = pvpanic::write(value as u8);
        if events.contains(Events::CRASH_LOADED) {
            self.ending.recovered();
        } else if events.contains(Events::PANICKED) {
            self.ending.panicked();
        }
    }
}

/// Ports of the debug exit, as QEMU's `isa-debug-exit` has them for test kernels.
const DEBUG_EXIT_PORTS: u16 = 4;

/// What a guest writes here ends the machine.
struct DebugExitPort(Arc<Ending>);

impl PortDevice for DebugExitPort {
    fn port_read(&self, _port: u16, _size: u8) -> u32 {
        0
    }

    fn port_write(&self, _port: u16, size: u8, value: u32) {
        let unused_bits = 32 - 8 * u32::from(size.clamp(1, 4));
        let value = value << unused_bits >> unused_bits;
        self.0.end(Outcome::DebugExit(value));
    }
}

struct IoApicMmio(Interrupts);

impl MmioDevice for IoApicMmio {
    fn mmio_read(&self, address: u64, data: &mut [u8]) -> bool {
        self.0.ioapic_read(address - IOAPIC_BASE, data);
        true
    }

    fn mmio_write(&self, address: u64, data: &[u8]) -> bool {
        self.0.ioapic_write(address - IOAPIC_BASE, data);
        true
    }
}

impl PortDevice for PciRoot {
    fn port_read(&self, port: u16, size: u8) -> u32 {
        PciRoot::port_read(self, port, size)
    }

    fn port_write(&self, port: u16, size: u8, value: u32) {
        PciRoot::port_write(self, port, size, value);
    }
}

impl MmioDevice for PciRoot {
    fn mmio_read(&self, address: u64, data: &mut [u8]) -> bool {
        PciRoot::mmio_read(self, address, data)
    }

    fn mmio_write(&self, address: u64, data: &[u8]) -> bool {
        PciRoot::mmio_write(self, address, data)
    }
}

/// What the chipset is connected to.
pub(crate) struct Parts {
    pub(crate) clock: Clock,
    pub(crate) ending: Arc<Ending>,
    pub(crate) interrupts: Interrupts,
    pub(crate) serial: Arc<SerialPort>,
    pub(crate) pci: Arc<PciRoot>,
    /// Where the debug-exit ports begin, if there are any.
    pub(crate) debug_exit: Option<u16>,
}

/// Puts every device of the machine where the guest finds it.
pub(crate) fn buses(parts: Parts) -> Result<Buses, Error> {
    let Parts {
        clock,
        ending,
        interrupts,
        serial,
        pci,
        debug_exit,
    } = parts;
    let rtc = Arc::new(RtcPorts(Mutex::new(Rtc::new())));
    let power = Arc::new(PowerPorts {
        power: Mutex::new(PowerManagement::new()),
        clock,
        ending: Arc::clone(&ending),
    });
    let pvpanic = Arc::new(PvPanicPort {
        ending: Arc::clone(&ending),
        serial: Arc::clone(&serial),
    });

    let mut buses = Buses::default();
    buses.add_ports(pm::KEYBOARD_PORT..pm::KEYBOARD_PORT + 1, power.clone());
    buses.add_ports(RTC_PORT..RTC_PORT + rtc::PORTS, rtc);
    buses.add_ports(COM1_PORT..COM1_PORT + serial::PORTS, serial);
    buses.add_ports(PVPANIC_PORT..PVPANIC_PORT + 1, pvpanic);
    buses.add_ports(
        pm::EVENT_PORT..pm::CONTROL_PORT + u16::from(pm::CONTROL_LENGTH),
        power.clone(),
    );
    buses.add_ports(pm::TIMER_PORT..pm::TIMER_PORT + 4, power.clone());
    // The reset register lies between PCI's two configuration ports.
    buses.add_ports(0xcf8..pm::RESET_PORT, pci.clone());
    buses.add_ports(pm::RESET_PORT..pm::RESET_PORT + 1, power);
    buses.add_ports(pm::RESET_PORT + 1..0xd00, pci.clone());
    if let Some(port) = debug_exit {
        let ports = port..port.saturating_add(DEBUG_EXIT_PORTS);
        if buses.has_ports(&ports) {
            return Err(Error::DebugExitTaken(port));
        }
        buses.add_ports(ports, Arc::new(DebugExitPort(ending)));
    }

    buses.add_mmio(
        IOAPIC_BASE..IOAPIC_BASE + IOAPIC_SIZE,
        Arc::new(IoApicMmio(interrupts)),
    );
    buses.add_mmio(
        layout::PCI_WINDOW.start..layout::PCI_WINDOW.end,
        pci.clone(),
    );
    // BARs that the guest has moved, and ECAM.
    buses.set_rest(pci);
    Ok(buses)
}
