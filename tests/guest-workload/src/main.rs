//! What the test bed's Linux guest does while it moves.
//!
//! It reads files until its page cache holds as much as it was told to, fills memory of its own, and
//! says `ready`. From then on it serves requests (each reads and hashes a piece of a file and compares
//! it with what the piece was at first), writes memory at a set rate, and prints a beat some fifty
//! times a second. Told `check`, it compares every byte. It can be told to compute instead of serving, to have
//! its page cache read anew, and to have other processes walk through memory of their own at random ([`walk`]). With
//! `keep-clock` it plays a time daemon and ends ([`clock`]).
//!
//! It talks over its standard input and output, a serial line, a line at a time:
//!
//! | line | meaning |
//! |---|---|
//! | `ready files=N cached=BYTES memory=BYTES` | all is warm; work begins |
//! | `beat MS WORK DIRTIED` | its clock in ms, requests served and units computed, pages written |
//! | `bad WHAT` | a comparison failed |
//! | `check ok pieces=N pages=N` / `check bad …` | the answer to `check` |
//! | `said LINE`, then `ran STATUS` | the output of a command, and how it ended |
//! | `check`, `dirty MIB_PER_S`, `renew MIB_PER_S`, `run COMMAND`, `quit` | what it is told |
//!
//! Its settings are on the kernel's command line, as `testbed.KEY=VALUE`.

mod clock;
mod files;
mod memory;
mod settings;
mod walk;

use files::Files;
use memory::Memory;
use settings::Settings;
use std::io::{BufRead, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use walk::{Walker, Way};

/// Rounds of arithmetic in a unit of computation.
const UNIT: u64 = 2000;

/// Counters that every thread sees.
#[derive(Debug, Default)]
struct Counters {
    work: AtomicU64,
    dirtied: AtomicU64,
    dirty_rate: AtomicU64,
    renewal: AtomicU64,
}

fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    // Nobody is left to be told when the serial line is gone.
    let _ = out.write_all(format!("{line}\n").as_bytes());
    let _ = out.flush();
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("bad {error}"));
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    if std::env::args().nth(1).as_deref() == Some("keep-clock") {
        return clock::keep();
    }
    let settings = Settings::read()?;
    if let Some(way) = std::env::args().nth(1).as_deref().and_then(Way::named) {
        return walk::run(&settings, way);
    }
    raw_terminal();
    let files = Files::warm(&settings.folder, settings.cache)?;
    let memory = Mutex::new(Memory::fill(settings.memory)?);
    let ways = [
        (settings.walk, Way::Directly),
        (settings.call, Way::ByCalls),
    ];
    let walkers = ways
        .into_iter()
        .filter(|(size, _)| *size > 0)
        .map(|(_, way)| Walker::start(way))
        .collect::<Result<Vec<_>, _>>()?;
    let counters = Counters::default();
    counters.dirty_rate.store(settings.dirty, Ordering::Relaxed);
    say(&format!(
        "ready files={} cached={} memory={}",
        files.count(),
        files.bytes(),
        settings.memory
    ));
    std::thread::scope(|scope| {
        scope.spawn(|| beat(&counters, settings.beat));
        scope.spawn(|| dirty(&counters, &memory));
        for worker in 0..settings.workers {
            let (files, counters) = (&files, &counters);
            scope.spawn(move || serve(files, counters, worker, settings.think));
        }
        scope.spawn(|| files.renew(&counters.renewal));
        for thread in 0..settings.compute {
            let counters = &counters;
            scope.spawn(move || compute(counters, thread));
        }
        obey(&counters, &files, &memory, walkers);
        // The other threads never end; the guest does.
        std::process::exit(0);
    })
}

/// The serial line as it is: no echo, no translation.
fn raw_terminal() {
    use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
    let input = std::io::stdin();
    if let Ok(mut attributes) = tcgetattr(&input) {
        cfmakeraw(&mut attributes);
        let _ = tcsetattr(&input, SetArg::TCSANOW, &attributes);
    }
}

/// Ahead of all other threads, so that a gap between beats is a gap in the guest's life.
fn beat(counters: &Counters, every: Duration) {
    let priority = nix::libc::sched_param { sched_priority: 10 };
    // SAFETY: the call reads the structure, which outlives it; 0 is the calling thread.
    unsafe { nix::libc::sched_setscheduler(0, nix::libc::SCHED_FIFO, &raw const priority) };
    let start = Instant::now();
    loop {
        std::thread::sleep(every);
        say(&format!(
            "beat {} {} {}",
            start.elapsed().as_millis(),
            counters.work.load(Ordering::Relaxed),
            counters.dirtied.load(Ordering::Relaxed)
        ));
    }
}

fn dirty(counters: &Counters, memory: &Mutex<Memory>) {
    const STEP: Duration = Duration::from_millis(10);
    let mut last = Instant::now();
    let mut owed = 0.0;
    loop {
        std::thread::sleep(STEP);
        let now = Instant::now();
        #[expect(clippy::cast_precision_loss, reason = "a rate of pages")]
        let rate = counters.dirty_rate.load(Ordering::Relaxed) as f64 / memory::PAGE as f64;
        // What could not be done in half a second is given up: the rate is a limit, not a debt.
        owed = f64::min(
            owed + rate * now.duration_since(last).as_secs_f64(),
            rate / 2.0,
        );
        last = now;
        while owed >= 1.0 {
            // A few at a time, so that a check need not wait.
            let mut memory = memory.lock().unwrap_or_else(PoisonError::into_inner);
            for _ in 0..32 {
                if owed < 1.0 {
                    break;
                }
                memory.rewrite_next();
                counters.dirtied.fetch_add(1, Ordering::Relaxed);
                owed -= 1.0;
            }
        }
    }
}

fn serve(files: &Files, counters: &Counters, worker: u64, think: Duration) {
    let mut random = memory::Random::new(worker.wrapping_add(0x9e37));
    let mut buffer = Vec::new();
    loop {
        match files.check_piece(random.next(), &mut buffer) {
            Ok(()) => drop(counters.work.fetch_add(1, Ordering::Relaxed)),
            Err(error) => say(&format!("bad {error}")),
        }
        std::thread::sleep(think);
    }
}

/// Needs a CPU and next to no memory.
fn compute(counters: &Counters, thread: u64) {
    let mut random = memory::Random::new(thread);
    loop {
        for _ in 0..UNIT {
            std::hint::black_box(random.next());
        }
        counters.work.fetch_add(1, Ordering::Relaxed);
    }
}

fn obey(counters: &Counters, files: &Files, memory: &Mutex<Memory>, mut walkers: Vec<Walker>) {
    for line in std::io::stdin().lock().lines() {
        let Ok(line) = line else { return };
        let mut words = line.split_whitespace();
        match (words.next(), words.next()) {
            (Some("check"), _) => say(&check(files, memory, &mut walkers)),
            (Some("dirty"), Some(rate)) => {
                if let Ok(rate) = rate.parse::<u64>() {
                    counters.dirty_rate.store(rate << 20, Ordering::Relaxed);
                    say(&format!("dirty {rate}"));
                }
            }
            (Some("renew"), Some(rate)) => {
                if let Ok(rate) = rate.parse::<u64>() {
                    counters.renewal.store(rate << 20, Ordering::Relaxed);
                }
            }
            (Some("run"), Some(_)) => run_command(line.trim_start().trim_start_matches("run ")),
            (Some("quit"), _) => return,
            _ => {}
        }
    }
}

/// Runs a command in a shell, with what it prints passed on.
fn run_command(command: &str) {
    let output = std::process::Command::new("/bin/sh")
        .args(["-c", &format!("{command} 2>&1")])
        .stdin(std::process::Stdio::null())
        .output();
    match output {
        Err(error) => say(&format!("ran {error}")),
        Ok(output) => {
            for line in String::from_utf8_lossy(&output.stdout).lines() {
                say(&format!("said {line}"));
            }
            say(&format!("ran {}", output.status.code().unwrap_or(-1)));
        }
    }
}

fn check(files: &Files, memory: &Mutex<Memory>, walkers: &mut [Walker]) -> String {
    let pages = memory
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .check();
    let visited = walkers
        .iter_mut()
        .try_fold(0, |pages, walker| Ok(pages + walker.check()?));
    match (pages, visited, files.check_all()) {
        (Ok(pages), Ok(visited), Ok(pieces)) => {
            format!("check ok pieces={pieces} pages={}", pages + visited)
        }
        (Err(error), ..) | (_, Err(error), _) | (.., Err(error)) => format!("check bad {error}"),
    }
}
