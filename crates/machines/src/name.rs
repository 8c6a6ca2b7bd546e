//! Names and IDs of machines.

use rustix::rand::{GetRandomFlags, getrandom};

/// Longest name: that of a label in the DNS (RFC 1035 §2.3.4).
const MAX_NAME: usize = 63;

/// Bytes of an ID, which is written as hexadecimal digits.
const ID_BYTES: usize = 6;

const ADJECTIVES: [&str; 32] = [
    "able", "amber", "brave", "brisk", "calm", "clear", "deft", "eager", "early", "fair", "fond",
    "gentle", "grand", "happy", "keen", "kind", "lively", "lucky", "mellow", "merry", "neat",
    "plain", "proud", "quick", "quiet", "rapid", "sharp", "silver", "steady", "sunny", "warm",
    "wise",
];

const NOUNS: [&str; 32] = [
    "alder", "badger", "beacon", "birch", "brook", "cedar", "comet", "crane", "delta", "ember",
    "falcon", "fjord", "glade", "harbor", "heron", "island", "juniper", "lark", "maple", "meadow",
    "orchard", "otter", "pebble", "pine", "quarry", "raven", "ridge", "river", "summit", "thistle",
    "valley", "willow",
];

/// Names to try before one is made longer.
const ATTEMPTS: usize = 8;

/// Whether it can be the name of a machine: a label of a host name, of a-z, 0-9 and inner
/// hyphens, at most 63 (RFC 1123 §2.1, without capitals).
pub fn is_name(text: &str) -> bool {
    let is_inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=MAX_NAME).contains(&text.len())
        && text.bytes().all(is_inner)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

/// Whether it is an ID, as opposed to whatever else may be in a directory.
pub(crate) fn is_id(text: &str) -> bool {
    text.len() == 2 * ID_BYTES && is_hex(text)
}

/// Whether an ID may begin so.
pub(crate) fn is_hex(text: &str) -> bool {
    text.bytes()
        .all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// A new ID.
pub(crate) fn new_id() -> String {
    let random = random();
    let digits = random[..ID_BYTES].iter().map(|byte| format!("{byte:02x}"));
    digits.collect()
}

/// A new name that is not `taken`, of a machine with this ID.
pub(crate) fn new_name(id: &str, taken: impl Fn(&str) -> bool) -> String {
    let mut name = String::new();
    for _ in 0..ATTEMPTS {
        let [adjective, noun, ..] = random();
        name = format!(
            "{}-{}",
            ADJECTIVES[adjective as usize % ADJECTIVES.len()],
            NOUNS[noun as usize % NOUNS.len()],
        );
        if !taken(&name) {
            return name;
        }
    }
    format!("{name}-{id}")
}

/// Random bytes. The kernel never lacks them once it has booted.
pub(crate) fn random() -> [u8; 8] {
    let mut bytes = [0; 8];
    while getrandom(&mut bytes, GetRandomFlags::empty()) != Ok(bytes.len()) {}
    bytes
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn names_are_labels_of_host_names() {
        for good in ["a", "web", "web-1", "0", "a--b", &"a".repeat(63)] {
            assert!(is_name(good), "{good}");
        }
        let long = "a".repeat(64);
        for bad in ["", "-a", "a-", "a.b", "A", "a_b", "a b", "ä", "../x", &long] {
            assert!(!is_name(bad), "{bad}");
        }
    }

    #[test]
    fn ids_are_twelve_hexadecimal_digits_and_differ() {
        let ids: HashSet<String> = (0..1000).map(|_| new_id()).collect();
        assert_eq!(ids.len(), 1000);
        assert!(ids.iter().all(|id| is_id(id)));
        for other in ["", "123", "0123456789AB", "0123456789ag", "0123456789abc"] {
            assert!(!is_id(other), "{other}");
        }
    }

    #[test]
    fn every_generated_name_is_a_name() {
        for (adjective, noun) in ADJECTIVES.iter().zip(NOUNS) {
            assert!(is_name(&format!("{adjective}-{noun}")));
        }
        let adjectives: HashSet<&str> = ADJECTIVES.into();
        let nouns: HashSet<&str> = NOUNS.into();
        assert_eq!((adjectives.len(), nouns.len()), (32, 32));
    }

    #[test]
    fn a_generated_name_that_is_taken_gets_the_id() {
        let name = new_name("0123456789ab", |_| true);
        assert!(name.ends_with("-0123456789ab"), "{name}");
        assert!(is_name(&name));
        assert!(!new_name("0123456789ab", |_| false).contains("0123456789ab"));
    }
}
