//! Hostile guests do the host no harm.
//!
//! `STRATA_HOSTILE_SEED` and `STRATA_HOSTILE_SECONDS` choose others; `STRATA_HOSTILE_SCENE`
//! runs one that a report names. Scenes run in a process of their own, which may be lost.
//! What once did harm is in `hostile.seeds` and is run first.

use std::env;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use strata_difftest::hostile::{self, SceneError};
use strata_difftest::rng::Rng;

/// Scenes begin at this one unless the environment says otherwise.
const SEED: u64 = 0x5eed_0003;
/// How long to go on.
const SECONDS: u64 = 5;
/// How long one may take in all before it counts as hanging.
const PATIENCE: Duration = Duration::from_secs(40);
/// How much harm is enough.
const ENOUGH: usize = 5;
/// Tells the worker what to run: a seed, and the first scene.
const WORK: &str = "STRATA_HOSTILE_WORK";

fn number(name: &str) -> Option<u64> {
    let text = env::var(name).ok()?;
    let parsed = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    Some(parsed.unwrap_or_else(|_| panic!("{name} is not a number: {text}")))
}

/// Seeds and scenes that once did harm.
fn corpus() -> Vec<(u64, u64)> {
    include_str!("hostile.seeds")
        .lines()
        .filter(|line| !line.starts_with('#') && !line.trim().is_empty())
        .map(|line| {
            let mut words = line.split_whitespace();
            let seed = words.next().and_then(|w| w.strip_prefix("0x"));
            let seed = seed.and_then(|w| u64::from_str_radix(w, 16).ok());
            let scene = words.next().and_then(|w| w.parse().ok());
            seed.zip(scene).expect("a line has a seed and a scene")
        })
        .collect()
}

#[test]
fn hostile_guests_do_the_host_no_harm() {
    let seed = number("STRATA_HOSTILE_SEED").unwrap_or(SEED);
    let seconds = number("STRATA_HOSTILE_SECONDS").unwrap_or(SECONDS);
    let only = number("STRATA_HOSTILE_SCENE");
    eprintln!("seed {seed:#x}, for {seconds} s");
    let mut harm = Vec::new();
    if only.is_none() {
        for (seed, scene) in corpus() {
            let worker = Worker::start(seed, scene);
            harm.extend(worker.watch(Some(scene), Instant::now() + PATIENCE).harm);
        }
    }
    let end = Instant::now() + Duration::from_secs(seconds);
    let (mut next, mut blocks) = (only.unwrap_or(0), 0);
    while harm.len() < ENOUGH && Instant::now() < end {
        let watched = Worker::start(seed, next).watch(only, end);
        next = watched.last + 1;
        blocks += watched.blocks;
        harm.extend(watched.harm);
        if only.is_some() {
            break;
        }
    }

    eprintln!("up to scene {next}, {blocks} blocks");
    assert!(harm.is_empty(), "the host was harmed:\n{}", harm.join("\n"));
    assert!(
        only.is_some() || blocks > 100 * seconds,
        "guests got nowhere"
    );
}

/// Runs scenes until it is killed. Not a test of its own.
#[test]
#[ignore = "the other process of the test above"]
fn worker() {
    let Ok(work) = env::var(WORK) else { return };
    let (seed, first) = work.split_once(' ').expect("two numbers");
    let (seed, first) = (seed.parse().unwrap(), first.parse::<u64>().unwrap());
    let mut out = std::io::stdout();
    for scene in first.. {
        writeln!(out, "scene {scene}").unwrap();
        let outcome = match hostile::run(&mut Rng::new(seed, scene)) {
            // where the host put guest RAM there was no room beside it: the next may do better
            Err(SceneError::Fences) => continue,
            outcome => outcome.unwrap(),
        };
        writeln!(out, "blocks {}", outcome.blocks).unwrap();
        if let Some(harm) = outcome.harm {
            writeln!(out, "harm {harm}").unwrap();
        }
    }
}

/// What a process did.
struct Watched {
    /// The last scene that ran.
    last: u64,
    /// Blocks translated in all scenes.
    blocks: u64,
    harm: Option<String>,
}

/// The process that runs scenes.
struct Worker {
    child: Child,
    lines: Receiver<String>,
    seed: u64,
    scene: u64,
    blocks: u64,
}

impl Worker {
    fn start(seed: u64, scene: u64) -> Self {
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "worker", "--ignored", "--nocapture"])
            .env(WORK, format!("{seed} {scene}"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = channel();
        thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Self {
            child,
            lines,
            seed,
            scene,
            blocks: 0,
        }
    }

    /// Waits for harm, or for the `end`, or until scene `only` is over.
    fn watch(mut self, only: Option<u64>, end: Instant) -> Watched {
        while Instant::now() < end {
            let what = match self.lines.recv_timeout(PATIENCE) {
                Ok(line) => match line.split_once(' ') {
                    Some(("scene", scene)) => {
                        let scene = scene.parse().unwrap();
                        if only.is_some_and(|only| scene > only) {
                            break;
                        }
                        self.scene = scene;
                        continue;
                    }
                    Some(("blocks", blocks)) => {
                        self.blocks += blocks.parse::<u64>().unwrap();
                        continue;
                    }
                    Some(("harm", harm)) => harm.to_owned(),
                    _ => continue,
                },
                Err(RecvTimeoutError::Timeout) => "it hangs".to_owned(),
                Err(RecvTimeoutError::Disconnected) => match self.child.wait() {
                    Ok(status) => format!("the process ended: {status}"),
                    Err(error) => format!("the process ended: {error}"),
                },
            };
            let harm = format!("seed {:#x} scene {}: {what}", self.seed, self.scene);
            eprintln!("{harm}");
            return self.watched(Some(harm));
        }
        self.watched(None)
    }

    fn watched(&self, harm: Option<String>) -> Watched {
        Watched {
            last: self.scene,
            blocks: self.blocks,
            harm,
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
