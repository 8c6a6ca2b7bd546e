//! What one run asks of the appliance, as a second initramfs segment.
//!
//! The segment holds Strata's program for guests, which is process 1 there, and the file that
//! tells it what to do. Linux unpacks segments in order, so this one only has to come after the
//! appliance's own. Called by the `strata` binary.

use strata_protocol::{SESSION_PATH, Session};

use crate::cpio::Archive;

/// Strata's program for guests; the build script makes it.
const PROGRAM: &[u8] = include_bytes!(env!("STRATA_GUEST"));

/// The initramfs segment for a session, a multiple of 4 bytes long.
///
/// # Panics
/// Does not: what is in a session can be written.
#[must_use]
pub fn segment(session: &Session) -> Vec<u8> {
    let bytes = strata_protocol::write_session(session).expect("a session can be written");
    let mut archive = Archive::new();
    archive.file("init", 0o755, PROGRAM);
    archive.directory("strata", 0o700);
    archive.file(SESSION_PATH, 0o600, &bytes);
    archive.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpio::tests::read;

    #[test]
    fn the_segment_holds_process_1_and_what_it_is_to_do() {
        let session = Session {
            name: Some("web".to_owned()),
            ..Session::default()
        };
        let entries = read(&segment(&session));
        let names: Vec<&str> = entries.iter().map(|entry| entry.0.as_str()).collect();
        assert_eq!(names, ["init", "strata", SESSION_PATH]);
        assert_eq!(entries[0].1 & 0o777, 0o755);
        assert_eq!(entries[2].1 & 0o777, 0o600);
    }

    #[test]
    fn the_program_needs_no_other_files() {
        use object::{Object, ObjectSegment};
        let program = object::File::parse(PROGRAM).unwrap();
        assert!(
            program
                .segments()
                .all(|segment| segment.name() != Ok(Some(".interp")))
        );
        assert!(program.section_by_name(".interp").is_none());
        assert!(program.section_by_name(".dynamic").is_none());
    }
}
