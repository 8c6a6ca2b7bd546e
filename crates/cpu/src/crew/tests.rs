use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use strata_memory::{Bytes, GuestAddress};

use super::*;
use crate::engine::Cpu;

const CODE: u64 = 0x1000;
const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(30);

/// The vCPUs of a crew. All rest until they are told to resume.
fn cpus<const N: usize>() -> (GuestMemory, [Cpu; N]) {
    let memory = GuestMemory::new(1 << 20).unwrap();
    let crew = Crew::new(memory.clone(), N as u32);
    let cpu = |index| Cpu::new(&crew, index as u32, 1_000_000).unwrap();
    (memory, std::array::from_fn(cpu))
}

/// Runs `f` on a thread of its own and tells when it is done.
fn apart(
    mut cpu: Cpu,
    f: impl FnOnce(&mut Core) + Send + 'static,
) -> (mpsc::Receiver<()>, thread::JoinHandle<Cpu>) {
    let (done, finished) = mpsc::channel();
    let thread = thread::spawn(move || {
        f(&mut cpu.core);
        let _ = done.send(());
        cpu
    });
    (finished, thread)
}

fn attention(cpu: &Cpu) -> bool {
    cpu.core.state.block().attention.0.load(Ordering::SeqCst) != 0
}

#[test]
fn a_store_into_code_reaches_those_who_translated_it_and_nobody_else() {
    let (_, [mut writer, mut holder, mut other]) = cpus();
    holder.core.resume();
    other.core.resume();
    holder.core.mark_code(CODE, 64);
    other.core.mark_code(CODE + 64, 64);

    writer.core.note_store(CODE + 8, 4);
    writer.core.seat.end_store();

    assert!(attention(&holder) && !attention(&other));
    holder.core.meet_crew();
    other.core.meet_crew();
    assert_eq!(holder.core.stale, [(CODE + 8, 4)]);
    assert!(writer.core.stale.is_empty() && other.core.stale.is_empty());
}

#[test]
fn a_vcpu_that_rested_reads_of_stores_before_it_goes_on() {
    let (_, [mut writer, mut holder]) = cpus();
    holder.core.mark_code(CODE, 64);

    writer.core.note_store(CODE, 1);

    assert!(!attention(&holder));
    holder.core.resume();
    assert_eq!(holder.core.stale, [(CODE, 1)]);
}

#[test]
fn more_letters_than_are_kept_throw_all_code_away() {
    let (_, [mut writer, mut holder]) = cpus();
    holder.core.mark_code(CODE, 64);

    for _ in 0..=MOST_LETTERS {
        writer.core.note_store(CODE, 1);
    }

    holder.core.resume();
    assert!(holder.core.all_stale && holder.core.stale.len() == MOST_LETTERS);
}

#[test]
fn a_device_write_reaches_every_vcpu_that_translated_it() {
    let (memory, [mut first, mut second]) = cpus();
    first.core.mark_code(CODE, 64);
    second.core.mark_code(CODE, 64);

    let bytes = memory.ram().write_slice(&[0x90; 4], GuestAddress(CODE + 4));

    bytes.unwrap();
    for cpu in [&mut first, &mut second] {
        cpu.core.resume();
        assert_eq!(cpu.core.stale, [(CODE + 4, 4)]);
    }
}

#[test]
fn who_translates_waits_for_those_who_may_store_without_asking() {
    let (memory, [translator, mut storer]) = cpus();
    storer.core.resume();
    assert!(memory.code().claim_stores(1, CODE));

    let (marked, thread) = apart(translator, |core| core.mark_code(CODE, 16));

    assert!(marked.recv_timeout(SHORT).is_err());
    storer.core.meet_crew();
    assert_eq!(marked.recv_timeout(LONG), Ok(()));
    assert!(!memory.code().claims_stores(1, CODE));
    thread.join().unwrap();
}

#[test]
fn who_translates_waits_for_a_store_that_is_being_done() {
    let (_, [translator, mut storer]) = cpus();
    storer.core.resume();
    storer.core.note_store(CODE + 128, 8);

    let (marked, thread) = apart(translator, |core| core.mark_code(CODE, 16));

    assert!(marked.recv_timeout(SHORT).is_err());
    storer.core.seat.end_store();
    assert_eq!(marked.recv_timeout(LONG), Ok(()));
    thread.join().unwrap();
}

#[test]
fn nobody_waits_for_a_vcpu_that_rests() {
    let (memory, [mut translator, storer]) = cpus();
    assert!(memory.code().claim_stores(1, CODE));

    translator.core.resume();
    translator.core.mark_code(CODE, 16);
    translator.core.begin_exclusive();
    translator.core.seat.end_exclusive();

    assert!(memory.code().claims_stores(1, CODE));
    let mut storer = storer;
    storer.core.resume();
    assert!(!memory.code().claims_stores(1, CODE));
}

#[test]
fn one_vcpu_runs_alone_once_all_others_have_stopped() {
    let (_, [mut alone, mut other]) = cpus();
    other.core.resume();
    alone.core.resume();

    let (begun, thread) = apart(alone, Core::begin_exclusive);
    assert!(begun.recv_timeout(SHORT).is_err());
    let (gone_on, other) = apart(other, Core::meet_crew);
    assert_eq!(begun.recv_timeout(LONG), Ok(()));
    assert!(gone_on.recv_timeout(SHORT).is_err());

    thread.join().unwrap().core.seat.end_exclusive();
    assert_eq!(gone_on.recv_timeout(LONG), Ok(()));
    other.join().unwrap();
}

#[test]
fn vcpus_that_want_to_run_alone_take_turns() {
    let (_, [mut first, mut second]) = cpus();
    first.core.resume();
    second.core.resume();
    let turns = |core: &mut Core| {
        for _ in 0..1000 {
            core.begin_exclusive();
            core.seat.end_exclusive();
        }
        core.seat.rest();
    };

    let (a, one) = apart(first, turns);
    let (b, two) = apart(second, turns);

    assert_eq!(
        (a.recv_timeout(LONG), b.recv_timeout(LONG)),
        (Ok(()), Ok(()))
    );
    one.join().unwrap();
    two.join().unwrap();
}
