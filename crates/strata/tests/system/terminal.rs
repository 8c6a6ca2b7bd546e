//! `strata run` as a person meets it: on a terminal, which is always given back as it was.

use rustix::process::Signal;

use crate::guest::run;
use crate::pty::{COLUMNS, ROWS, Session};

const PROMPT: &str = "~ # ";
const QUIT: &str = "\x01x";
const CTRL_C: &str = "\x03";

/// A shell in the guest, at its first prompt.
fn shell() -> Session {
    let mut session = Session::start(run(&[] as &[&str]));
    session.wait_for(PROMPT);
    session
}

/// A guest that has begun to boot, and says so.
fn booting() -> Session {
    let mut session = Session::start(run(&["--verbose"]));
    session.wait_for("Linux version");
    session
}

#[test]
fn a_line_typed_at_the_prompt_is_run_and_its_output_shown() {
    let mut session = shell();
    session.wait_until_raw();
    session.type_keys("echo sum $((40 + 2))\r");
    session.wait_for("sum 42\r\n");
    session.wait_for(PROMPT);
    session.type_keys(QUIT);
    assert_eq!(session.end(), 0);
}

#[test]
fn the_shell_knows_the_terminals_size_and_type() {
    let mut session = shell();
    session.type_keys("echo \"<$(stty size) $TERM>\"\r");
    session.wait_for(&format!("<{ROWS} {COLUMNS} vt220>\r\n"));
    session.type_keys(QUIT);
    assert_eq!(session.end(), 0);
}

#[test]
fn the_guests_terminal_follows_the_size_of_ours() {
    let mut session = shell();
    session.resize(44, 90);
    session
        .type_keys("until [ \"$(stty size)\" = '44 90' ]; do sleep 0.1; done; echo so\"\"it is\r");
    session.wait_for("soit is");
    session.type_keys(QUIT);
    assert_eq!(session.end(), 0);
}

#[test]
fn the_status_of_what_was_on_the_terminal_is_the_runs() {
    let mut session = shell();
    session.type_keys("exit 3\r");
    assert_eq!(session.end(), 3);
    let mut command = run(&["-t"]);
    command.args(["--", "sh", "-c", "tty; read line; exit 9"]);
    let mut session = Session::start(command);
    session.wait_for("/dev/ttyS0");
    session.type_keys("\r");
    assert_eq!(session.end(), 9);
}

#[test]
fn ctrl_c_is_for_the_command_where_it_has_no_terminal() {
    let mut command = run(&[] as &[&str]);
    let line = "trap 'echo heard; exit 8' INT; echo up; while :; do sleep 0.1; done";
    command.args(["--", "sh", "-c", line]);
    let mut session = Session::start(command);
    session.wait_for("up");
    session.signal(Signal::INT);
    session.wait_for("heard");
    assert_eq!(session.end(), 8);
}

#[test]
fn powering_off_ends_the_run_with_0_and_the_terminal_restored() {
    let mut session = shell();
    session.wait_until_raw();
    session.kill_guard();
    session.type_keys("poweroff\r");
    assert_eq!(session.end(), 0);
}

#[test]
fn ctrl_c_interrupts_the_guests_program_and_not_the_run() {
    let mut session = shell();
    // said by the program itself: before it there is only the shell to be interrupted
    session.type_keys("sh -c 'echo begun; exec sleep 100000'\r");
    session.wait_for("begun\r\n");
    session.type_keys(CTRL_C);
    session.wait_for(PROMPT);
    session.type_keys(QUIT);
    assert_eq!(session.end(), 0);
}

#[test]
fn ctrl_a_x_ends_the_run_with_0_and_the_terminal_restored() {
    let mut session = booting();
    session.wait_until_raw();
    session.kill_guard();
    session.type_keys(QUIT);
    assert_eq!(session.end(), 0);
}

#[test]
fn ctrl_a_h_lists_the_keys() {
    let mut session = booting();
    session.type_keys("\x01h");
    session.wait_for("Ctrl-A x       quit");
    session.wait_for("Ctrl-A h       show these keys");
    session.wait_for("Ctrl-A Ctrl-A  send Ctrl-A to the guest");
    session.type_keys(QUIT);
    assert_eq!(session.end(), 0);
}

#[test]
fn a_signal_ends_the_run_with_its_status_and_the_terminal_restored() {
    for signal in [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT] {
        let session = booting();
        session.wait_until_raw();
        session.kill_guard();
        session.signal(signal);
        assert_eq!(session.end(), 128 + signal.as_raw(), "{signal:?}");
    }
}

#[test]
fn the_terminal_is_restored_though_the_run_was_killed() {
    let session = booting();
    session.wait_until_raw();
    session.signal(Signal::KILL);
    assert_eq!(
        session.end_and_restored_later(),
        128 + Signal::KILL.as_raw()
    );
}

#[test]
fn the_terminal_is_restored_while_the_run_is_suspended() {
    let mut session = booting();
    session.wait_until_raw();
    session.signal(Signal::TSTP);
    session.wait_until_stopped();
    session.wait_until_restored();
    session.signal(Signal::CONT);
    session.wait_until_raw();
    session.type_keys(QUIT);
    assert_eq!(session.end(), 0);
}

#[test]
fn the_terminal_is_restored_when_the_time_is_over() {
    let mut session = Session::start(run(&["--timeout", "1s"]));
    session.wait_for("--timeout are over");
    assert_eq!(session.end(), 124);
}

#[test]
fn the_terminal_is_restored_when_the_kernel_panics() {
    let mut session = Session::start(run(&["--append", "rdinit=/nowhere init=/nowhere"]));
    session.wait_for("the guest's kernel panicked");
    assert_eq!(session.end(), 240);
}

#[test]
fn a_command_leaves_the_terminal_as_it_is() {
    let mut command = run(&["--verbose"]);
    command.args(["--", "sh", "-c", "read line; echo \"<$line>\""]);
    let mut session = Session::start(command);
    session.wait_for("Linux version");
    session.wait_until_restored();
    session.type_keys("typed\n");
    session.wait_for("<typed>");
    assert_eq!(session.end(), 0);
}
