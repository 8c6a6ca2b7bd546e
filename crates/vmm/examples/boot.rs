//! Boots a kernel with its serial port on standard input and output.
//!
//! `boot KERNEL INITRD COMMAND-LINE [MEMORY-MIB] [DISK]...`; `-` as INITRD means none.

use std::io;
use std::process::ExitCode;
use std::time::Instant;

use strata_vmm::{
    Accel, DiskConfig, InitrdPart, Machine, MachineConfig, Opened, Outcome, SerialConsole,
};

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let (Some(kernel), Some(initrd), Some(command_line)) = (args.next(), args.next(), args.next())
    else {
        eprintln!("usage: boot KERNEL INITRD|- COMMAND-LINE [MEMORY-MIB] [DISK]...");
        return ExitCode::FAILURE;
    };
    let memory: u64 = args
        .next()
        .and_then(|text| text.parse().ok())
        .unwrap_or(512);
    let disk = |path: String| DiskConfig::image(path, None, false);
    let initrd = match initrd.as_str() {
        "-" => Vec::new(),
        path => vec![InitrdPart::File(path.into())],
    };
    let config = MachineConfig {
        cpus: 1,
        memory: memory << 20,
        accel: Accel::Soft,
        kernel: kernel.into(),
        initrd,
        modules: Vec::new(),
        command_line: Some(command_line),
        debug_exit: None,
        disks: args.map(disk).collect(),
        console: SerialConsole {
            output: Box::new(io::stdout()),
            input: Some(Box::new(io::stdin())),
        },
        networks: Vec::new(),
        ports: Vec::new(),
    };
    let start = Instant::now();
    let machine = match Machine::open(config).and_then(Opened::build) {
        Ok(machine) => machine,
        Err(error) => {
            eprintln!("boot: {error}");
            let mut next = std::error::Error::source(&error);
            while let Some(cause) = next {
                eprintln!("  because: {cause}");
                next = cause.source();
            }
            return ExitCode::FAILURE;
        }
    };
    eprintln!("boot: built in {:?}", start.elapsed());
    let start = Instant::now();
    let outcome = machine.run();
    eprintln!("boot: {outcome:?} after {:?}", start.elapsed());
    if outcome == Outcome::PowerOff {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
