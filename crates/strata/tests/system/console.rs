//! The serial console without a terminal, and kernels of the user's own.

use strata_image::{Archive, Cache, Silent};

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

#[test]
fn a_kernel_and_initrd_of_ones_own_boot_with_their_command_line() {
    let appliance = Cache::of_user().unwrap().appliance(&mut Silent).unwrap();
    let mut bytes = std::fs::read(&appliance.initramfs).unwrap();
    let mut archive = Archive::new();
    let script = "#!/bin/busybox sh\n\
        /bin/busybox mount -t proc proc /proc\n\
        echo own init, $word, $(/bin/busybox cat /proc/cmdline)\n\
        exec /bin/busybox poweroff -f\n";
    archive.file("own", 0o755, script.as_bytes());
    bytes.extend(archive.finish());
    let directory = tempfile::tempdir().unwrap();
    let initrd = directory.path().join("initrd");
    std::fs::write(&initrd, bytes).unwrap();

    let mut command = run(&["--memory", "256M"]);
    command.arg("--kernel").arg(&appliance.kernel);
    command.arg("--initrd").arg(&initrd);
    command.args([
        "--append",
        "console=ttyS0 quiet panic=-1 rdinit=/own word=hello",
    ]);
    let ended = feed(command, b"").expect(0);

    let text = ended.text();
    assert!(text.contains("own init, hello, console=ttyS0"), "{text}");
}
