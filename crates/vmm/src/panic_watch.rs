//! Looks for a kernel's panic report in what it sends to its console, for panics that
//! come before the guest has loaded its pvpanic driver.

/// Begins a panic report.
const BEGIN: &[u8] = b"Kernel panic - not syncing";
/// Ends it, where the kernel then stays and does not reboot.
const END: &[u8] = b"---[ end Kernel panic";
/// As much of a line as can matter: a time stamp and either of the above.
const LINE_MAX: usize = 80;

/// What was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sight {
    Nothing,
    /// A panic report begins.
    Begun,
    /// A panic report is complete, and nothing will follow.
    Ended,
}

/// The console's current line, as far as it matters.
#[derive(Clone, Debug, Default)]
pub(crate) struct PanicWatch {
    line: Vec<u8>,
}

impl PanicWatch {
    /// The guest sent `byte`.
    pub(crate) fn see(&mut self, byte: u8) -> Sight {
        if byte == b'\n' {
            self.line.clear();
            return Sight::Nothing;
        }
        if self.line.len() >= LINE_MAX {
            return Sight::Nothing;
        }
        self.line.push(byte);
        match without_time_stamp(&self.line) {
            BEGIN => Sight::Begun,
            END => Sight::Ended,
            _ => Sight::Nothing,
        }
    }
}

/// What follows `[   12.345678] `, if that is how the line begins.
fn without_time_stamp(line: &[u8]) -> &[u8] {
    let line = line.strip_prefix(b"\r").unwrap_or(line);
    let stamp = |byte: &u8| byte.is_ascii_digit() || matches!(byte, b' ' | b'.');
    let Some(rest) = line.strip_prefix(b"[") else {
        return line;
    };
    let digits = rest.iter().take_while(|byte| stamp(byte)).count();
    rest[digits..].strip_prefix(b"] ").unwrap_or(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sights(text: &str) -> Vec<Sight> {
        let mut watch = PanicWatch::default();
        text.bytes()
            .map(|b| watch.see(b))
            .filter(|s| *s != Sight::Nothing)
            .collect()
    }

    #[test]
    fn a_panic_report_is_seen_with_and_without_time_stamps() {
        let stamped = "[    1.23] x\r\n[   12.345678] Kernel panic - not syncing: VFS\r\n\
                       [   12.4] ---[ end Kernel panic - not syncing: VFS ]---\r\n";
        assert_eq!(sights(stamped), [Sight::Begun, Sight::Ended]);
        assert_eq!(sights("Kernel panic - not syncing: x\n"), [Sight::Begun]);
    }

    #[test]
    fn the_words_elsewhere_in_a_line_are_no_panic() {
        assert_eq!(sights("$ grep 'Kernel panic - not syncing' log\n"), []);
        assert_eq!(
            sights("[x] Kernel panic - not syncing\n[1.0]Kernel panic - not syncing"),
            []
        );
        assert_eq!(sights(&format!("{}\n", "x".repeat(10_000))), []);
    }
}
