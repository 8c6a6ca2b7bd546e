//! Names of guests (RFC 1035): the gateway answers for them itself; all other questions go to the
//! host's name servers unread.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::config::DOMAIN;
use crate::wire::u16_at;

const HEADER: usize = 12;
const TYPE_A: u16 = 1;
const TYPE_AAAA: u16 = 28;
const CLASS_IN: u16 = 1;
/// Seconds for which an answer may be kept: guests come and go.
const TIME_TO_LIVE: u32 = 10;
/// Response, authoritative; recursion desired is taken over, recursion available set.
const RESPONSE: u16 = 0x8480;
const NO_SUCH_NAME: u16 = 3;
const NAME_LENGTH: usize = 255;

/// A question for one name.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Question<'a> {
    /// In lower case, labels joined by dots.
    pub(crate) name: String,
    kind: u16,
    /// The header's ID and flags, and the question as it came.
    id: u16,
    flags: u16,
    raw: &'a [u8],
}

impl<'a> Question<'a> {
    /// The one question of a query; `None` if it is anything else.
    pub(crate) fn parse(message: &'a [u8]) -> Option<Self> {
        let (id, flags) = (u16_at(message, 0)?, u16_at(message, 2)?);
        // A standard query with one question.
        if flags & 0xf800 != 0 || u16_at(message, 4)? != 1 {
            return None;
        }
        let mut name = String::new();
        let mut at = HEADER;
        loop {
            let length = usize::from(*message.get(at)?);
            at += 1;
            if length == 0 {
                break;
            }
            // Above are pointers, which a question does not need.
            if length > 63 || at - HEADER > NAME_LENGTH {
                return None;
            }
            let label = message.get(at..at + length)?;
            if !name.is_empty() {
                name.push('.');
            }
            name.extend(label.iter().map(|byte| byte.to_ascii_lowercase() as char));
            at += length;
        }
        let kind = u16_at(message, at)?;
        let class = u16_at(message, at + 2)?;
        (class == CLASS_IN).then_some(Self {
            name,
            kind,
            id,
            flags,
            raw: &message[HEADER..at + 4],
        })
    }

    /// The name of the guest that is asked for: a name of one label, or one in the network's
    /// domain.
    pub(crate) fn guest(&self) -> Option<&str> {
        let suffix = self.name.strip_suffix(DOMAIN);
        let inside = suffix.and_then(|name| name.strip_suffix('.'));
        let single = Some(&*self.name).filter(|name| !name.contains('.'));
        inside.or(single)
    }

    /// Whether the name can only be a guest's.
    pub(crate) fn is_inside(&self) -> bool {
        self.name
            .strip_suffix(DOMAIN)
            .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    }

    /// The answer: these addresses, as far as they were asked for.
    pub(crate) fn answer(&self, ipv4: Ipv4Addr, ipv6: Ipv6Addr) -> Vec<u8> {
        let data = match self.kind {
            TYPE_A => ipv4.octets().to_vec(),
            TYPE_AAAA => ipv6.octets().to_vec(),
            _ => Vec::new(),
        };
        let mut message = self.head(0, u16::from(!data.is_empty()));
        if !data.is_empty() {
            // The name is the question's, by a pointer.
            message.extend((0xc000 | HEADER as u16).to_be_bytes());
            message.extend(self.kind.to_be_bytes());
            message.extend(CLASS_IN.to_be_bytes());
            message.extend(TIME_TO_LIVE.to_be_bytes());
            message.extend((data.len() as u16).to_be_bytes());
            message.extend(data);
        }
        message
    }

    /// The answer that there is no such name.
    pub(crate) fn no_such_name(&self) -> Vec<u8> {
        self.head(NO_SUCH_NAME, 0)
    }

    fn head(&self, code: u16, answers: u16) -> Vec<u8> {
        let mut message = Vec::new();
        let flags = RESPONSE | self.flags & 0x0100 | code;
        for field in [self.id, flags, 1, answers, 0, 0] {
            message.extend(field.to_be_bytes());
        }
        message.extend(self.raw);
        message
    }
}

/// Whether `name` can be a guest's: letters, digits and inner hyphens (RFC 1123 §2.1).
pub fn is_host_name(name: &str) -> bool {
    let hyphen = |end: Option<char>| end == Some('-');
    (1..=63).contains(&name.len())
        && name
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
        && !hyphen(name.chars().next())
        && !hyphen(name.chars().last())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(name: &str, kind: u16) -> Vec<u8> {
        let mut message = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in name.split('.') {
            message.push(label.len() as u8);
            message.extend(label.bytes());
        }
        message.push(0);
        message.extend(kind.to_be_bytes());
        message.extend(CLASS_IN.to_be_bytes());
        message
    }

    #[test]
    fn a_guest_is_found_by_its_name_alone_and_in_the_domain() {
        for (name, guest) in [
            ("db", Some("db")),
            ("DB.internal", Some("db")),
            ("db.example.org", None),
            ("notinternal", Some("notinternal")),
        ] {
            let message = query(name, TYPE_A);
            assert_eq!(Question::parse(&message).unwrap().guest(), guest, "{name}");
        }
    }

    #[test]
    fn an_answer_has_the_question_and_the_address() {
        let message = query("db", TYPE_A);
        let question = Question::parse(&message).unwrap();
        let answer = question.answer(Ipv4Addr::new(10, 0, 2, 9), Ipv6Addr::LOCALHOST);

        assert_eq!(answer[..8], [0x12, 0x34, 0x85, 0x80, 0, 1, 0, 1]);
        assert_eq!(answer[12..message.len()], message[12..]);
        assert!(answer.ends_with(&[0, 4, 10, 0, 2, 9]));
    }

    #[test]
    fn a_kind_that_a_guest_does_not_have_gets_no_records() {
        let message = query("db", 15);
        let answer = Question::parse(&message)
            .unwrap()
            .answer(Ipv4Addr::LOCALHOST, PREFIX);
        assert_eq!(u16_at(&answer, 6), Some(0));
        assert_eq!(u16_at(&answer, 2).map(|flags| flags & 15), Some(0));
    }

    const PREFIX: Ipv6Addr = crate::config::PREFIX;

    #[test]
    fn broken_questions_are_no_questions() {
        let good = query("abc.internal", TYPE_A);
        for length in 0..good.len() {
            assert_eq!(Question::parse(&good[..length]), None, "{length}");
        }
        let mut pointer = good;
        pointer[12] = 0xc0;
        assert_eq!(Question::parse(&pointer), None);
    }

    #[test]
    fn host_names_are_letters_digits_and_inner_hyphens() {
        for good in ["a", "web-1", "9"] {
            assert!(is_host_name(good), "{good}");
        }
        for bad in ["", "-a", "a-", "a.b", "A", "a_b", &"a".repeat(64)] {
            assert!(!is_host_name(bad), "{bad}");
        }
    }
}
