//! The console's own keys, as a pure state machine. Fed by `console` with what is typed.

/// Ctrl-A, which begins a command to the console.
const ESCAPE: u8 = 0x01;

/// What `Ctrl-A h` shows.
pub(crate) const HELP: &str = "\r\n\
    Ctrl-A x       quit: stop the machine at once\r\n\
    Ctrl-A h       show these keys\r\n\
    Ctrl-A Ctrl-A  send Ctrl-A to the guest (also Ctrl-A a)\r\n";

/// What a typed byte means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Key {
    /// This byte goes to the guest.
    Send(u8),
    /// The user wants to quit.
    Quit,
    /// The user wants to see the keys.
    Help,
    /// Nothing yet, or nothing at all.
    Nothing,
}

/// Remembers whether Ctrl-A was the last key.
#[derive(Debug, Default)]
pub(crate) struct Keys {
    escaped: bool,
}

impl Keys {
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
            b'x' | b'X' => Key::Quit,
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
        let mut keys = Keys::default();
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
        assert_eq!(typed(b"\x01x"), [Key::Quit]);
        assert_eq!(typed(b"\x01X"), [Key::Quit]);
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
