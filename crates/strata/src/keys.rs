//! The keys that are for Strata and not for the guest, as a pure state machine. Fed by `console` and
//! `machines::attach` with what is typed.

/// Ctrl-A, which begins a command to the console.
const ESCAPE: u8 = 0x01;

/// What the keys are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Subject {
    /// The console of a machine, which ends with it.
    Console,
    /// A command in the background, which stays.
    Attached,
}

impl Subject {
    /// What `Ctrl-A h` shows.
    pub(crate) fn help(self) -> &'static str {
        match self {
            Self::Console => {
                "\r\n\
                Ctrl-A x       quit: stop the machine at once\r\n\
                Ctrl-A h       show these keys\r\n\
                Ctrl-A Ctrl-A  send Ctrl-A to the guest (also Ctrl-A a)\r\n"
            }
            Self::Attached => {
                "\r\n\
                Ctrl-A d       detach: the machine goes on\r\n\
                Ctrl-A h       show these keys\r\n\
                Ctrl-A Ctrl-A  send Ctrl-A to the guest (also Ctrl-A a)\r\n"
            }
        }
    }

    /// The letter that leaves.
    fn leaves(self, byte: u8) -> bool {
        match self {
            Self::Console => byte == b'x' || byte == b'X',
            Self::Attached => byte == b'd' || byte == b'D',
        }
    }
}

/// What a typed byte means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Key {
    /// This byte goes to the guest.
    Send(u8),
    /// The user wants to leave.
    Leave,
    /// The user wants to see the keys.
    Help,
    /// Nothing yet, or nothing at all.
    Nothing,
}

/// Remembers whether Ctrl-A was the last key.
#[derive(Debug)]
pub(crate) struct Keys {
    subject: Subject,
    escaped: bool,
}

impl Keys {
    pub(crate) fn new(subject: Subject) -> Self {
        Self {
            subject,
            escaped: false,
        }
    }

    /// Takes the next byte typed.
    pub(crate) fn feed(&mut self, byte: u8) -> Key {
        if !self.escaped {
            self.escaped = byte == ESCAPE;
            return if self.escaped {
                Key::Nothing
            } else {
                Key::Send(byte)
            };
        }
        self.escaped = false;
        match byte {
            byte if self.subject.leaves(byte) => Key::Leave,
            b'h' | b'H' | b'?' => Key::Help,
            ESCAPE | b'a' => Key::Send(ESCAPE),
            _ => Key::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a typed text does, less the keys that do nothing.
    fn typed(text: &[u8]) -> Vec<Key> {
        typed_to(Subject::Console, text)
    }

    fn typed_to(subject: Subject, text: &[u8]) -> Vec<Key> {
        let mut keys = Keys::new(subject);
        text.iter()
            .map(|byte| keys.feed(*byte))
            .filter(|key| *key != Key::Nothing)
            .collect()
    }

    #[test]
    fn what_is_typed_goes_to_the_guest_unchanged() {
        let all: Vec<u8> = (0..=255).filter(|byte| *byte != ESCAPE).collect();
        let expected: Vec<Key> = all.iter().map(|byte| Key::Send(*byte)).collect();
        assert_eq!(typed(&all), expected);
    }

    #[test]
    fn ctrl_a_x_quits() {
        assert_eq!(typed(b"\x01x"), [Key::Leave]);
        assert_eq!(typed(b"\x01X"), [Key::Leave]);
    }

    #[test]
    fn ctrl_a_d_leaves_what_stays() {
        assert_eq!(typed_to(Subject::Attached, b"\x01d"), [Key::Leave]);
        assert_eq!(typed_to(Subject::Attached, b"\x01x"), []);
        assert_eq!(typed(b"\x01d"), []);
    }

    #[test]
    fn ctrl_a_h_shows_the_keys() {
        assert_eq!(typed(b"\x01h"), [Key::Help]);
    }

    #[test]
    fn ctrl_a_twice_sends_one_ctrl_a() {
        assert_eq!(typed(b"\x01\x01"), [Key::Send(ESCAPE)]);
        assert_eq!(typed(b"\x01a"), [Key::Send(ESCAPE)]);
    }

    #[test]
    fn a_command_is_one_key_long() {
        assert_eq!(typed(b"\x01\x01x"), [Key::Send(ESCAPE), Key::Send(b'x')]);
        assert_eq!(typed(b"\x01qx"), [Key::Send(b'x')]);
    }
}
