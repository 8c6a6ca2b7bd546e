//! TEMPORARY stand-in for strata-vmm's API on top of QEMU, for development only.
#![allow(missing_docs, clippy::pedantic, dead_code, unreachable_pub)]
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

pub struct MachineConfig {
    pub cpus: u8,
    pub memory: u64,
    pub accel: Accel,
    pub kernel: PathBuf,
    pub initrd: Vec<InitrdPart>,
    pub command_line: String,
    pub disks: Vec<DiskConfig>,
    pub console: SerialConsole,
    pub ports: Vec<ConsolePort>,
}
#[derive(Debug, Clone, Copy)]
pub enum Accel {
    Auto,
    Soft,
}
pub enum InitrdPart {
    File(PathBuf),
    Bytes(Vec<u8>),
}
pub struct DiskConfig {
    pub path: PathBuf,
    pub read_only: bool,
}
pub struct SerialConsole {
    pub output: Box<dyn Write + Send>,
    pub input: Option<Box<dyn Read + Send>>,
}
pub struct ConsolePort {
    pub name: String,
    pub input: Option<Box<dyn Read + Send>>,
    pub output: Option<Box<dyn Write + Send>>,
}
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0}: no such file; name an existing kernel")]
    Missing(String),
    #[error("stub: {0}")]
    Io(#[from] std::io::Error),
}
#[derive(Debug)]
pub enum Outcome {
    PowerOff,
    Reset,
    Panic,
    TripleFault,
    Stopped,
    Failed(String),
}

#[derive(Clone)]
pub struct Control(Arc<Mutex<(Option<u32>, bool)>>);
impl Control {
    pub fn stop(&self) {
        let mut s = self.0.lock().unwrap();
        s.1 = true;
        if let Some(pid) = s.0 {
            let _ = Command::new("kill").arg(pid.to_string()).status();
        }
    }
}
pub struct Machine {
    config: MachineConfig,
    control: Control,
}
impl Machine {
    pub fn build(config: MachineConfig) -> Result<Self, Error> {
        if !config.kernel.exists() {
            return Err(Error::Missing(config.kernel.display().to_string()));
        }
        Ok(Self {
            config,
            control: Control(Arc::default()),
        })
    }
    pub fn control(&self) -> Control {
        self.control.clone()
    }
    pub fn run(self) -> Outcome {
        let c = self.config;
        let dir = format!("/tmp/cli/stub-{}", std::process::id());
        std::fs::create_dir_all(&dir).unwrap();
        let mut initrd = Vec::new();
        for p in c.initrd {
            match p {
                InitrdPart::File(f) => initrd.extend(std::fs::read(f).unwrap()),
                InitrdPart::Bytes(b) => initrd.extend(b),
            }
            while initrd.len() % 4 != 0 {
                initrd.push(0);
            }
        }
        std::fs::write(format!("{dir}/initrd"), &initrd).unwrap();
        let mut q = Command::new("qemu-system-x86_64");
        q.args([
            "-accel",
            "tcg",
            "-M",
            "q35",
            "-cpu",
            "max",
            "-display",
            "none",
            "-no-reboot",
            "-nodefaults",
            "-serial",
            "stdio",
            "-device",
            "pvpanic-pci",
        ])
        .args(["-m", &format!("{}M", c.memory >> 20)])
        .arg("-kernel")
        .arg(&c.kernel)
        .arg("-initrd")
        .arg(format!("{dir}/initrd"))
        .args(["-append", &c.command_line]);
        for d in &c.disks {
            q.arg("-drive").arg(format!(
                "if=virtio,format=raw,file={},readonly={}",
                d.path.display(),
                if d.read_only { "on" } else { "off" }
            ));
        }
        let mut writers = vec![];
        if !c.ports.is_empty() {
            q.args(["-device", "virtio-serial-pci"]);
        }
        for (i, p) in c.ports.into_iter().enumerate() {
            let path = format!("{dir}/p{i}");
            let l = UnixListener::bind(&path).unwrap();
            q.arg("-chardev")
                .arg(format!("socket,id=c{i},path={path}"))
                .arg("-device")
                .arg(format!("virtserialport,chardev=c{i},name={}", p.name));
            writers.push(thread::spawn(move || {
                let (mut s, _) = l.accept().unwrap();
                if let Some(mut i) = p.input {
                    let mut w = s.try_clone().unwrap();
                    thread::spawn(move || {
                        let _ = std::io::copy(&mut i, &mut w);
                        let _ = w.shutdown(std::net::Shutdown::Both);
                    });
                }
                if let Some(mut o) = p.output {
                    let mut b = [0; 65536];
                    while let Ok(n) = s.read(&mut b) {
                        if n == 0 {
                            break;
                        }
                        let _ = o.write_all(&b[..n]);
                        let _ = o.flush();
                    }
                }
            }));
        }
        let mut child = q
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        self.control.0.lock().unwrap().0 = Some(child.id());
        let mut cin = child.stdin.take().unwrap();
        if let Some(mut i) = c.console.input {
            thread::spawn(move || {
                let mut b = [0; 64];
                while let Ok(n) = i.read(&mut b) {
                    if n == 0 {
                        loop {
                            thread::park()
                        }
                    }
                    for x in &b[..n] {
                        let _ = cin.write_all(&[*x]);
                        let _ = cin.flush();
                    }
                }
            });
        } else {
            Box::leak(Box::new(cin));
        }
        let mut out = c.console.output;
        let mut cout = child.stdout.take().unwrap();
        let mut b = [0; 4096];
        let mut all = vec![];
        while let Ok(n) = cout.read(&mut b) {
            if n == 0 {
                break;
            }
            let _ = out.write_all(&b[..n]);
            all.extend_from_slice(&b[..n]);
        }
        let _ = child.wait();
        for w in writers {
            let _ = w.join();
        }
        let _ = std::fs::remove_dir_all(dir);
        if self.control.0.lock().unwrap().1 {
            return Outcome::Stopped;
        }
        let t = String::from_utf8_lossy(&all);
        if t.contains("Restarting system") {
            Outcome::Reset
        } else {
            Outcome::PowerOff
        }
    }
}
