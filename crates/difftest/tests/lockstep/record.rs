//! What one vCPU asked and was told, for another to ask and be told the same.
//!
//! [`Recorder`] stands between the leader and its machine, [`Replay`] stands for the machine of
//! the follower.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use strata_cpu::Bus;

use crate::state::Snapshot;

/// A question to the machine, with what is said in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Question {
    Clock,
    PortRead(u16, u8),
    PortWrite(u16, u8, u32),
    MmioRead(u64, usize),
    MmioWrite(u64, Vec<u8>),
    MsrRead(u32),
    MsrWrite(u32, u64),
    Pending,
    Acknowledge,
    Priority,
    SetPriority(u8),
}

/// A question and its answer: a number, or bytes.
#[derive(Clone, Debug)]
pub(crate) struct Event {
    question: Question,
    answer: Option<u64>,
    bytes: Vec<u8>,
}

/// One step of the leader: what it asked meanwhile, and the state it led to.
pub(crate) struct Record {
    pub(crate) events: Vec<Event>,
    pub(crate) after: Snapshot,
}

/// What was asked since it was last taken. Clones are the same.
#[derive(Clone, Default)]
pub(crate) struct Events(Arc<Mutex<Vec<Event>>>);

impl Events {
    pub(crate) fn take(&self) -> Vec<Event> {
        std::mem::take(&mut self.0.lock().unwrap())
    }

    pub(crate) fn note(&self, question: Question, answer: Option<u64>) {
        self.note_bytes(question, answer, Vec::new());
    }

    fn note_bytes(&self, question: Question, answer: Option<u64>, bytes: Vec<u8>) {
        self.0.lock().unwrap().push(Event {
            question,
            answer,
            bytes,
        });
    }
}

/// The leader's machine, with all that is asked of it written down.
pub(crate) struct Recorder<'a> {
    pub(crate) machine: &'a dyn Bus,
    pub(crate) events: Events,
}

impl Bus for Recorder<'_> {
    fn port_read(&self, port: u16, size: u8) -> u32 {
        let value = self.machine.port_read(port, size);
        self.events
            .note(Question::PortRead(port, size), Some(value.into()));
        value
    }

    fn port_write(&self, port: u16, size: u8, value: u32) {
        self.machine.port_write(port, size, value);
        self.events
            .note(Question::PortWrite(port, size, value), None);
    }

    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        self.machine.mmio_read(address, data);
        let question = Question::MmioRead(address, data.len());
        self.events.note_bytes(question, None, data.to_vec());
    }

    fn mmio_write(&self, address: u64, data: &[u8]) {
        self.machine.mmio_write(address, data);
        self.events
            .note(Question::MmioWrite(address, data.to_vec()), None);
    }

    fn msr_read(&self, msr: u32) -> Option<u64> {
        let value = self.machine.msr_read(msr);
        self.events.note(Question::MsrRead(msr), value);
        value
    }

    fn msr_write(&self, msr: u32, value: u64) -> Option<()> {
        let done = self.machine.msr_write(msr, value);
        self.events
            .note(Question::MsrWrite(msr, value), done.map(|()| 0));
        done
    }

    fn interrupt_pending(&self) -> bool {
        let pending = self.machine.interrupt_pending();
        self.events.note(Question::Pending, Some(pending.into()));
        pending
    }

    fn acknowledge_interrupt(&self) -> Option<u8> {
        // asked at every step, so only what is delivered is worth a note
        let vector = self.machine.acknowledge_interrupt()?;
        self.events.note(Question::Acknowledge, Some(vector.into()));
        Some(vector)
    }

    fn task_priority(&self) -> u8 {
        let priority = self.machine.task_priority();
        self.events.note(Question::Priority, Some(priority.into()));
        priority
    }

    fn set_task_priority(&self, priority: u8) {
        self.machine.set_task_priority(priority);
        self.events.note(Question::SetPriority(priority), None);
    }

    fn next_timer(&self) -> Option<u64> {
        None
    }
}

/// The machine of the follower: the leader's answers of one record. Clones are the same.
#[derive(Clone, Default)]
pub(crate) struct Replay(Arc<Mutex<Replaying>>);

#[derive(Default)]
struct Replaying {
    left: VecDeque<Event>,
    /// What was asked that the leader did not ask.
    wrong: Option<String>,
}

impl Replay {
    /// Goes on to the next record.
    pub(crate) fn load(&self, events: Vec<Event>) {
        self.0.lock().unwrap().left = events.into();
    }

    /// Whether all was asked that the leader asked.
    pub(crate) fn is_done(&self) -> bool {
        self.0.lock().unwrap().left.is_empty()
    }

    /// What was asked otherwise.
    pub(crate) fn wrong(&self) -> Option<String> {
        let replaying = self.0.lock().unwrap();
        let next = replaying.left.front();
        replaying.wrong.as_ref().map(|wrong| match next {
            Some(event) => format!("{wrong}, the leader {:?}", event.question),
            None => format!("{wrong}, the leader nothing more"),
        })
    }

    /// The leader's answer to `question`, or none if it asked something else.
    pub(crate) fn answer(&self, question: &Question) -> Option<Event> {
        let mut replaying = self.0.lock().unwrap();
        if replaying
            .left
            .front()
            .is_some_and(|e| e.question == *question)
        {
            return replaying.left.pop_front();
        }
        let wrong = &mut replaying.wrong;
        wrong.get_or_insert_with(|| format!("the follower asked the machine {question:?}"));
        None
    }

    /// The number that the leader got.
    pub(crate) fn number(&self, question: &Question) -> Option<u64> {
        self.answer(question)?.answer
    }
}

impl Bus for Replay {
    fn port_read(&self, port: u16, size: u8) -> u32 {
        let value = self.number(&Question::PortRead(port, size));
        value.unwrap_or(0) as u32
    }

    fn port_write(&self, port: u16, size: u8, value: u32) {
        self.answer(&Question::PortWrite(port, size, value));
    }

    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        if let Some(event) = self.answer(&Question::MmioRead(address, data.len())) {
            data.copy_from_slice(&event.bytes);
        }
    }

    fn mmio_write(&self, address: u64, data: &[u8]) {
        self.answer(&Question::MmioWrite(address, data.to_vec()));
    }

    fn msr_read(&self, msr: u32) -> Option<u64> {
        self.number(&Question::MsrRead(msr))
    }

    fn msr_write(&self, msr: u32, value: u64) -> Option<()> {
        self.number(&Question::MsrWrite(msr, value)).map(|_| ())
    }

    fn interrupt_pending(&self) -> bool {
        // whoever was halted and told no asks again until the record says yes
        self.number(&Question::Pending) != Some(0)
    }

    fn acknowledge_interrupt(&self) -> Option<u8> {
        let first = {
            let replaying = self.0.lock().unwrap();
            replaying.left.front().map(|e| e.question.clone())
        };
        // interrupts come at the end of blocks, where the leader was told of them
        (first == Some(Question::Acknowledge))
            .then(|| self.number(&Question::Acknowledge))?
            .map(|vector| vector as u8)
    }

    fn task_priority(&self) -> u8 {
        self.number(&Question::Priority).unwrap_or(0) as u8
    }

    fn set_task_priority(&self, priority: u8) {
        self.answer(&Question::SetPriority(priority));
    }

    fn next_timer(&self) -> Option<u64> {
        None
    }
}
