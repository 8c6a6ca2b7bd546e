//! The serial console without a terminal.

use crate::guest::{feed, run};

#[test]
fn lines_on_stdin_are_typed_at_the_guests_shell() {
    let ended = feed(run(&[] as &[&str]), b"echo sum $((40 + 2))\npoweroff\n").expect(0);
    assert!(ended.text().contains("sum 42"), "{}", ended.text());
}

#[test]
fn the_end_of_input_does_not_stop_the_guest() {
    let ended = feed(run(&["--timeout", "20s"]), b"echo still $((1 + 1))\n").expect(124);
    assert!(ended.text().contains("still 2"), "{}", ended.text());
}
