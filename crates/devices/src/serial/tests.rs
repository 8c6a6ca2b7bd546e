use super::*;

/// A port as Linux's 8250 driver leaves it when a terminal is open.
fn open() -> Serial {
    let mut serial = Serial::new();
    serial.write(IDENTIFICATION, 0x81);
    serial.write(MODEM_CONTROL, (Mcr::DTR | Mcr::RTS | Mcr::OUT2).bits());
    serial.write(
        INTERRUPT_ENABLE,
        (Ier::RECEIVED_DATA | Ier::LINE_STATUS).bits(),
    );
    serial
}

fn identification(serial: &mut Serial) -> u8 {
    serial.read(IDENTIFICATION) & 0x0f
}

#[test]
fn linux_recognises_a_16550a() {
    // The steps of the 8250 driver's autoconfig: IER sticks to four bits, loopback shows
    // in the modem status, FIFO enable shows in IIR bits 7:6, no EFR, scratch works.
    let mut serial = Serial::new();
    serial.write(INTERRUPT_ENABLE, 0);
    assert_eq!(serial.read(INTERRUPT_ENABLE) & 0x0f, 0);
    serial.write(INTERRUPT_ENABLE, 0x0f);
    assert_eq!(serial.read(INTERRUPT_ENABLE), 0x0f);
    serial.write(INTERRUPT_ENABLE, 0);

    serial.write(MODEM_CONTROL, Mcr::LOOPBACK.bits() | 0x0a);
    assert_eq!(serial.read(MODEM_STATUS) & 0xf0, 0x90);
    serial.write(MODEM_CONTROL, 0);

    serial.write(LINE_CONTROL, 0);
    serial.write(IDENTIFICATION, 1);
    assert_eq!(serial.read(IDENTIFICATION) >> 6, 3);

    serial.write(SCRATCH, 0xa5);
    assert_eq!(serial.read(SCRATCH), 0xa5);
}

#[test]
fn the_divisor_latch_hides_data_and_interrupt_enable() {
    let mut serial = Serial::new();
    serial.write(LINE_CONTROL, 0x83);
    assert_eq!(serial.write(DATA, 0x34), None);
    serial.write(INTERRUPT_ENABLE, 0x12);
    assert_eq!(
        (serial.read(DATA), serial.read(INTERRUPT_ENABLE)),
        (0x34, 0x12)
    );

    serial.write(LINE_CONTROL, 0x03);

    assert_eq!(serial.read(INTERRUPT_ENABLE), 0);
    assert_eq!(serial.write(DATA, b'x'), Some(b'x'));
}

#[test]
fn the_transmitter_is_always_empty() {
    let mut serial = open();
    serial.write(DATA, b'x');

    assert_eq!(serial.read(LINE_STATUS), 0x60);
}

#[test]
fn enabling_the_transmitter_interrupt_raises_it_and_reading_its_cause_clears_it() {
    let mut serial = open();
    assert!(!serial.interrupt());

    serial.write(INTERRUPT_ENABLE, 0x07);

    assert!(serial.interrupt());
    assert_eq!(identification(&mut serial), 0x02);
    assert!(!serial.interrupt());
    assert_eq!(identification(&mut serial), 0x01);
    serial.write(DATA, b'x');
    assert_eq!(identification(&mut serial), 0x02);
}

#[test]
fn received_bytes_raise_a_timeout_below_the_trigger_level_and_data_at_it() {
    let mut serial = open();

    assert_eq!(serial.receive(b"abc"), 3);
    assert!(serial.interrupt());
    assert_eq!(identification(&mut serial), 0x0c);
    serial.receive(b"defgh");
    assert_eq!(identification(&mut serial), 0x04);

    assert_eq!(serial.read(LINE_STATUS) & 1, 1);
    let all: Vec<u8> = (0..8).map(|_| serial.read(DATA)).collect();
    assert_eq!(all, b"abcdefgh");
    assert_eq!(serial.read(LINE_STATUS) & 1, 0);
    assert!(!serial.interrupt());
}

#[test]
fn the_fifo_takes_sixteen_bytes_and_the_rest_waits() {
    let mut serial = open();

    assert_eq!(serial.receive(&[b'x'; 20]), 16);
    assert_eq!(serial.receive_space(), 0);
    serial.read(DATA);
    assert_eq!(serial.receive(&[b'y'; 20]), 1);
    assert_eq!(serial.read(LINE_STATUS) & Lsr::OVERRUN.bits(), 0);
}

#[test]
fn without_fifos_one_byte_is_held() {
    let mut serial = open();
    serial.write(IDENTIFICATION, 0);

    assert_eq!(serial.receive(b"ab"), 1);
}

#[test]
fn nothing_is_received_before_a_driver_listens() {
    let mut serial = Serial::new();
    assert_eq!(serial.receive(b"early"), 0);

    serial.write(INTERRUPT_ENABLE, 1);

    assert_eq!(serial.receive(b"e"), 1);
}

#[test]
fn clearing_the_receive_fifo_drops_its_bytes() {
    let mut serial = open();
    serial.receive(b"abc");

    serial.write(IDENTIFICATION, 0x83);

    assert_eq!(serial.read(LINE_STATUS) & 1, 0);
    assert!(!serial.interrupt());
}

#[test]
fn out2_gates_the_interrupt_line() {
    let mut serial = open();
    serial.receive(b"a");

    serial.write(MODEM_CONTROL, (Mcr::DTR | Mcr::RTS).bits());

    assert!(!serial.interrupt());
}

#[test]
fn loopback_returns_what_is_sent_and_overruns_when_full() {
    let mut serial = open();
    serial.write(MODEM_CONTROL, Mcr::LOOPBACK.bits());

    for byte in 0..16 {
        assert_eq!(serial.write(DATA, byte), None);
    }
    assert_eq!(serial.read(LINE_STATUS) & Lsr::OVERRUN.bits(), 0);
    serial.write(DATA, 16);

    assert_eq!(identification(&mut serial), 0x06);
    assert_ne!(serial.read(LINE_STATUS) & Lsr::OVERRUN.bits(), 0);
    assert_eq!(serial.read(LINE_STATUS) & Lsr::OVERRUN.bits(), 0);
    assert_eq!(serial.read(DATA), 0);
}

#[test]
fn modem_lines_that_change_are_reported_until_read() {
    let mut serial = Serial::new();
    serial.write(INTERRUPT_ENABLE, Ier::MODEM_STATUS.bits());

    serial.write(MODEM_CONTROL, Mcr::LOOPBACK.bits());
    serial.write(MODEM_CONTROL, Mcr::OUT2.bits());

    assert!(serial.interrupt());
    assert_eq!(identification(&mut serial), 0x00);
    assert_eq!(serial.read(MODEM_STATUS), 0xbb);
    assert_eq!(serial.read(MODEM_STATUS), 0xb0);
    assert!(!serial.interrupt());
}

#[test]
fn registers_past_the_eighth_are_harmless() {
    let mut serial = Serial::new();
    assert_eq!(serial.read(8), 0xff);
    assert_eq!(serial.write(255, 1), None);
}
