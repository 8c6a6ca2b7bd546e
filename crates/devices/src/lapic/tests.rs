use super::*;

/// A TSC of 2 GHz: two ticks a nanosecond.
const TSC_KHZ: u64 = 2_000_000;

const TIMER_PERIODIC: u64 = 1 << 17;
const TIMER_TSC_DEADLINE: u64 = 2 << 17;

fn msr(register: u32) -> u32 {
    MSR_X2APIC + (register >> 4)
}

fn x2apic() -> Lapic {
    let mut lapic = Lapic::new(3, true, TSC_KHZ);
    lapic
        .set_base(LAPIC_BASE | BASE_ENABLE | BASE_EXTD)
        .unwrap();
    lapic.msr_write(msr(offset::SVR), 0x1ff, 0).unwrap();
    lapic
}

fn xapic() -> Lapic {
    let mut lapic = Lapic::new(3, true, TSC_KHZ);
    write32(&mut lapic, offset::SVR, 0x1ff);
    lapic
}

fn write32(lapic: &mut Lapic, register: u32, value: u32) -> Action {
    lapic.mmio_write(u64::from(register), &value.to_le_bytes(), 0)
}

fn read32(lapic: &mut Lapic, register: u32) -> u32 {
    let mut data = [0; 4];
    lapic.mmio_read(u64::from(register), &mut data, 0);
    u32::from_le_bytes(data)
}

#[test]
fn only_legal_mode_changes_are_accepted() {
    let mut lapic = Lapic::new(0, true, TSC_KHZ);
    let modes = [0, BASE_ENABLE, BASE_EXTD, BASE_ENABLE | BASE_EXTD].map(|m| LAPIC_BASE | m);
    let [off, xapic, invalid, x2apic] = modes;

    assert_eq!(lapic.base(), xapic | BASE_BSP);
    assert_eq!(lapic.set_base(invalid), Err(GeneralProtection));
    assert_eq!(lapic.set_base(x2apic), Ok(()));
    assert_eq!(lapic.set_base(xapic), Err(GeneralProtection));
    assert_eq!(lapic.set_base(off), Ok(()));
    assert_eq!(lapic.set_base(x2apic), Err(GeneralProtection));
    assert_eq!(lapic.set_base(xapic), Ok(()));
    assert_eq!(lapic.set_base(xapic + 0x1000), Err(GeneralProtection));
    assert_eq!(lapic.base(), xapic | BASE_BSP);
}

#[test]
fn switching_the_apic_off_resets_all_but_its_id_its_bsp_bit_and_the_timers_clock() {
    let mut lapic = xapic();
    write32(&mut lapic, offset::TPR, 0x50);
    write32(&mut lapic, offset::LVT_TIMER, 0x31);
    lapic.accept(0x61, false);

    lapic.set_base(LAPIC_BASE).unwrap();
    lapic.set_base(LAPIC_BASE | BASE_ENABLE).unwrap();

    assert_eq!(lapic.base(), LAPIC_BASE | BASE_ENABLE | BASE_BSP);
    assert_eq!(read32(&mut lapic, offset::ID), 3 << 24);
    assert_eq!(read32(&mut lapic, offset::SVR), 0xff);
    assert_eq!(read32(&mut lapic, offset::TPR), 0);
    assert_eq!(read32(&mut lapic, offset::LVT_TIMER), Lvt::MASKED);
    write32(&mut lapic, offset::SVR, 0x1ff);
    assert_eq!(lapic.pending_vector(0), None);
    write32(&mut lapic, offset::LVT_TIMER, 0x31);
    write32(&mut lapic, offset::INITIAL_COUNT, 500);
    // 500 ns, divided by 2, at two ticks a nanosecond
    assert_eq!(lapic.next_timer(), Some(2000));
}

#[test]
fn x2apic_msrs_are_refused_in_xapic_mode_and_mmio_in_x2apic_mode() {
    let mut lapic = xapic();
    assert_eq!(lapic.msr_read(msr(offset::ID), 0), Err(GeneralProtection));
    assert!(lapic.decodes_mmio());

    assert!(!x2apic().decodes_mmio());
}

#[test]
fn the_id_is_in_the_top_byte_in_xapic_mode_and_whole_in_x2apic_mode() {
    assert_eq!(read32(&mut xapic(), offset::ID), 3 << 24);
    assert_eq!(x2apic().msr_read(msr(offset::ID), 0), Ok(3));
    assert_eq!(x2apic().msr_read(msr(offset::LDR), 0), Ok(1 << 3));
}

#[test]
fn reserved_registers_and_bits_raise_general_protection() {
    let mut lapic = x2apic();
    for register in [
        offset::DFR,
        offset::ICR_HIGH,
        offset::EOI,
        offset::SELF_IPI,
        0x2f0,
        0x90,
    ] {
        assert_eq!(
            lapic.msr_read(msr(register), 0),
            Err(GeneralProtection),
            "{register:#x}"
        );
    }
    for register in [
        offset::ID,
        offset::VERSION,
        offset::PPR,
        offset::LDR,
        offset::DFR,
        0x2f0,
    ] {
        assert_eq!(
            lapic.msr_write(msr(register), 0, 0),
            Err(GeneralProtection),
            "{register:#x}"
        );
    }
    let reserved = [
        (offset::TPR, 0x100),
        (offset::EOI, 1),
        (offset::ESR, 1),
        (offset::SVR, 1 << 9),
        (offset::LVT_TIMER, 1 << 12),
        (offset::LVT_TIMER, 1 << 32),
        (offset::DIVIDE, 4),
        (offset::ICR, 1 << 20),
        (offset::SELF_IPI, 0x100),
    ];
    for (register, value) in reserved {
        let result = lapic.msr_write(msr(register), value, 0);
        assert_eq!(result, Err(GeneralProtection), "{register:#x}");
    }
}

#[test]
fn no_register_access_of_any_width_panics() {
    for mut lapic in [xapic(), x2apic()] {
        for register in 0..0x1000 {
            for length in 0..=8 {
                lapic.mmio_read(register, &mut [0; 8][..length], 5);
                lapic.mmio_write(register, &[0xff; 8][..length], 5);
            }
            for value in [0, 1, u64::MAX] {
                let _ = lapic.msr_write(MSR_X2APIC + register as u32, value, 5);
                let _ = lapic.msr_read(MSR_X2APIC + register as u32, 5);
            }
        }
    }
}

#[test]
fn an_accepted_interrupt_moves_from_requested_to_in_service_to_done() {
    let mut lapic = x2apic();
    assert!(lapic.accept(0x51, false));
    assert_eq!(lapic.msr_read(msr(offset::IRR + 0x20), 0), Ok(1 << 0x11));

    assert_eq!(lapic.acknowledge(0), Some(0x51));
    assert_eq!(lapic.msr_read(msr(offset::IRR + 0x20), 0), Ok(0));
    assert_eq!(lapic.msr_read(msr(offset::ISR + 0x20), 0), Ok(1 << 0x11));
    assert_eq!(lapic.acknowledge(0), None);

    assert_eq!(lapic.msr_write(msr(offset::EOI), 0, 0), Ok(Action::None));
    assert_eq!(lapic.msr_read(msr(offset::ISR + 0x20), 0), Ok(0));
}

#[test]
fn a_higher_class_interrupts_a_lower_one_and_the_same_class_waits() {
    let mut lapic = x2apic();
    lapic.accept(0x41, false);
    assert_eq!(lapic.acknowledge(0), Some(0x41));

    lapic.accept(0x4f, false);
    assert_eq!(lapic.pending_vector(0), None);
    lapic.accept(0x50, false);
    assert_eq!(lapic.acknowledge(0), Some(0x50));

    lapic.msr_write(msr(offset::EOI), 0, 0).unwrap();
    assert_eq!(lapic.pending_vector(0), None);
    lapic.msr_write(msr(offset::EOI), 0, 0).unwrap();
    assert_eq!(lapic.pending_vector(0), Some(0x4f));
}

#[test]
fn the_task_priority_holds_back_its_class_and_below() {
    let mut lapic = x2apic();
    lapic.set_task_priority(0x50);
    lapic.accept(0x5f, false);
    assert_eq!(lapic.pending_vector(0), None);
    assert_eq!(lapic.msr_read(msr(offset::PPR), 0), Ok(0x50));

    lapic.set_task_priority(0x4f);

    assert_eq!(lapic.pending_vector(0), Some(0x5f));
}

#[test]
fn the_end_of_a_level_interrupt_is_broadcast_and_that_of_an_edge_is_not() {
    let mut lapic = x2apic();
    lapic.accept(0x61, true);
    lapic.acknowledge(0);
    assert_eq!(
        lapic.msr_write(msr(offset::EOI), 0, 0),
        Ok(Action::Eoi(0x61))
    );

    lapic.accept(0x61, false);
    lapic.acknowledge(0);
    assert_eq!(lapic.msr_write(msr(offset::EOI), 0, 0), Ok(Action::None));
}

#[test]
fn interrupts_are_dropped_while_the_apic_is_disabled_by_software() {
    let mut lapic = Lapic::new(0, true, TSC_KHZ);

    assert!(!lapic.accept(0x61, false));

    write32(&mut lapic, offset::SVR, 0x1ff);
    assert_eq!(lapic.pending_vector(0), None);
}

#[test]
fn disabling_by_software_masks_the_local_vector_table() {
    let mut lapic = xapic();
    write32(&mut lapic, offset::LVT_ERROR, 0x30);
    write32(&mut lapic, offset::SVR, 0xff);
    write32(&mut lapic, offset::LVT_TIMER, 0x31);

    assert_eq!(read32(&mut lapic, offset::LVT_ERROR), Lvt::MASKED | 0x30);
    assert_eq!(read32(&mut lapic, offset::LVT_TIMER), Lvt::MASKED | 0x31);
}

#[test]
fn an_illegal_vector_is_an_error_that_is_seen_after_a_write_to_the_status() {
    let mut lapic = xapic();
    write32(&mut lapic, offset::LVT_ERROR, 0xfe);

    assert_eq!(write32(&mut lapic, offset::ICR, 5), Action::None);

    assert_eq!(lapic.pending_vector(0), Some(0xfe));
    assert_eq!(read32(&mut lapic, offset::ESR), 0);
    write32(&mut lapic, offset::ESR, 0);
    assert_eq!(
        read32(&mut lapic, offset::ESR),
        Esr::SEND_ILLEGAL_VECTOR.bits()
    );
    write32(&mut lapic, offset::ESR, 0);
    assert_eq!(read32(&mut lapic, offset::ESR), 0);
}

#[test]
fn ipis_carry_their_shorthand_destination_and_mode() {
    let ipi = |target, delivery| Ok(Action::Ipi(Ipi { target, delivery }));
    let mut lapic = x2apic();
    let mut send = |icr: u64| lapic.msr_write(msr(offset::ICR), icr, 0);

    assert_eq!(
        send(7 << 32 | 0x40),
        ipi(Target::Physical(7), Delivery::Fixed(0x40))
    );
    assert_eq!(
        send(0x1_0003 << 32 | 1 << 11 | 0x40),
        ipi(Target::Logical(0x1_0003), Delivery::Fixed(0x40))
    );
    assert_eq!(
        send(0xffff_ffff << 32 | 0x40),
        ipi(Target::All, Delivery::Fixed(0x40))
    );
    assert_eq!(
        send(1 << 18 | 0x40),
        ipi(Target::Sender, Delivery::Fixed(0x40))
    );
    assert_eq!(
        send(2 << 18 | 0x40),
        ipi(Target::All, Delivery::Fixed(0x40))
    );
    assert_eq!(send(3 << 18 | 4 << 8), ipi(Target::Others, Delivery::Nmi));
    assert_eq!(
        send(5 << 32 | 1 << 14 | 5 << 8),
        ipi(Target::Physical(5), Delivery::Init)
    );
    assert_eq!(send(5 << 32 | 1 << 15 | 5 << 8), Ok(Action::None));
    assert_eq!(
        send(5 << 32 | 6 << 8 | 0x9a),
        ipi(Target::Physical(5), Delivery::Startup(0x9a))
    );
}

#[test]
fn a_self_ipi_goes_to_the_sender() {
    let action = x2apic().msr_write(msr(offset::SELF_IPI), 0x77, 0);

    let ipi = Ipi {
        target: Target::Sender,
        delivery: Delivery::Fixed(0x77),
    };
    assert_eq!(action, Ok(Action::Ipi(ipi)));
}

#[test]
fn logical_destinations_match_by_flat_cluster_and_x2apic_rules() {
    let mut flat = xapic();
    write32(&mut flat, offset::LDR, 0x04 << 24);
    assert!(flat.is_target(Target::Logical(0x0c)));
    assert!(!flat.is_target(Target::Logical(0x0b)));

    write32(&mut flat, offset::DFR, 0);
    write32(&mut flat, offset::LDR, 0x24 << 24);
    assert!(flat.is_target(Target::Logical(0x26)));
    assert!(!flat.is_target(Target::Logical(0x16)));

    assert!(x2apic().is_target(Target::Logical(0x0000_0008)));
    assert!(!x2apic().is_target(Target::Logical(0x0001_0008)));
    assert!(x2apic().is_target(Target::Physical(3)));
    assert!(!x2apic().is_target(Target::Physical(2)));
}

#[test]
fn a_tsc_deadline_fires_once_when_it_is_reached() {
    let mut lapic = x2apic();
    lapic
        .msr_write(msr(offset::LVT_TIMER), TIMER_TSC_DEADLINE | 0xec, 0)
        .unwrap();
    lapic.set_tsc_deadline(1000, 10);
    assert_eq!(lapic.next_timer(), Some(1000));
    assert_eq!(lapic.tsc_deadline(999), 1000);
    assert_eq!(lapic.pending_vector(999), None);

    assert_eq!(lapic.acknowledge(1000), Some(0xec));

    assert_eq!(lapic.tsc_deadline(1001), 0);
    assert_eq!(lapic.next_timer(), None);
    lapic.msr_write(msr(offset::EOI), 0, 1001).unwrap();
    assert_eq!(lapic.pending_vector(u64::MAX), None);
}

#[test]
fn a_tsc_deadline_in_the_past_fires_at_once() {
    let mut lapic = x2apic();
    lapic
        .msr_write(msr(offset::LVT_TIMER), TIMER_TSC_DEADLINE | 0xec, 0)
        .unwrap();

    lapic.set_tsc_deadline(5, 1000);

    assert_eq!(lapic.pending_vector(1000), Some(0xec));
}

#[test]
fn a_tsc_deadline_of_zero_disarms() {
    let mut lapic = x2apic();
    lapic
        .msr_write(msr(offset::LVT_TIMER), TIMER_TSC_DEADLINE | 0xec, 0)
        .unwrap();
    lapic.set_tsc_deadline(1000, 0);

    lapic.set_tsc_deadline(0, 1);

    assert_eq!(lapic.pending_vector(2000), None);
}

#[test]
fn a_masked_timer_drops_its_interrupt() {
    let mut lapic = x2apic();
    let lvt = TIMER_TSC_DEADLINE | 0xec;
    lapic
        .msr_write(msr(offset::LVT_TIMER), lvt | u64::from(Lvt::MASKED), 0)
        .unwrap();
    lapic.set_tsc_deadline(1000, 0);
    assert_eq!(lapic.next_timer(), None);
    assert_eq!(lapic.pending_vector(1001), None);

    lapic.msr_write(msr(offset::LVT_TIMER), lvt, 1002).unwrap();

    assert_eq!(lapic.pending_vector(1003), None);
}

#[test]
fn deadlines_are_ignored_outside_their_mode_and_counts_inside_it() {
    let mut lapic = x2apic();
    lapic.set_tsc_deadline(1000, 0);
    assert_eq!(lapic.next_timer(), None);
    assert_eq!(lapic.tsc_deadline(0), 0);

    lapic
        .msr_write(msr(offset::LVT_TIMER), TIMER_TSC_DEADLINE | 0xec, 0)
        .unwrap();
    lapic.msr_write(msr(offset::INITIAL_COUNT), 100, 0).unwrap();
    assert_eq!(lapic.next_timer(), None);
}

#[test]
fn a_one_shot_count_runs_at_one_gigahertz_over_the_divider() {
    let mut lapic = x2apic();
    lapic.msr_write(msr(offset::LVT_TIMER), 0xec, 0).unwrap();
    lapic.msr_write(msr(offset::DIVIDE), 0b0011, 0).unwrap();

    lapic
        .msr_write(msr(offset::INITIAL_COUNT), 100, 50)
        .unwrap();

    // Divided by 16, two TSC ticks a nanosecond: 3,200 ticks.
    assert_eq!(lapic.next_timer(), Some(3250));
    assert_eq!(lapic.msr_read(msr(offset::CURRENT_COUNT), 50 + 320), Ok(90));
    assert_eq!(lapic.pending_vector(3249), None);
    assert_eq!(lapic.acknowledge(3250), Some(0xec));
    assert_eq!(lapic.next_timer(), None);
    assert_eq!(lapic.msr_read(msr(offset::CURRENT_COUNT), 3251), Ok(0));
}

#[test]
fn dividers_are_encoded_as_in_the_manual() {
    let mut timer = Timer::new(TSC_KHZ);
    for (code, divisor) in [
        (0b0000, 2),
        (0b0011, 16),
        (0b1000, 32),
        (0b1010, 128),
        (0b1011, 1),
    ] {
        timer.set_divide(0, code, 0);
        timer.set_initial_count(0, 1, 0);
        assert_eq!(timer.deadline(), Some(2 * divisor), "{code:#b}");
    }
}

#[test]
fn a_periodic_count_fires_again_and_leaves_out_missed_periods() {
    let mut lapic = x2apic();
    lapic
        .msr_write(msr(offset::LVT_TIMER), TIMER_PERIODIC | 0xec, 0)
        .unwrap();
    lapic.msr_write(msr(offset::DIVIDE), 0b1011, 0).unwrap();
    lapic.msr_write(msr(offset::INITIAL_COUNT), 500, 0).unwrap();

    assert_eq!(lapic.acknowledge(1000), Some(0xec));
    assert_eq!(lapic.next_timer(), Some(2000));
    lapic.msr_write(msr(offset::EOI), 0, 1100).unwrap();

    assert_eq!(lapic.acknowledge(5500), Some(0xec));
    assert_eq!(lapic.next_timer(), Some(6000));
}
