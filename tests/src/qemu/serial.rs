//! The guest's serial line, at the source and at the destination: what it says, and when it said it.

use crate::cleanup::still_time;
use crate::{Error, Result};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// Where a line came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The host that the guest starts on.
    Source,
    /// The host that it moves to.
    Destination,
}

/// A beat of the guest's workload.
#[derive(Debug, Clone, Copy)]
pub struct Beat {
    /// When it reached this machine.
    pub at: SystemTime,
    /// From which host.
    pub side: Side,
    /// The guest's clock, in ms since its work began.
    pub clock_ms: u64,
    /// Requests served.
    pub work: u64,
    /// Pages written.
    pub dirtied: u64,
}

#[derive(Debug, Default)]
struct Log {
    beats: Vec<Beat>,
    lines: Vec<(Side, String)>,
    writers: Vec<(Side, UnixStream)>,
}

impl Log {
    /// What the guest said last; if its kernel complained, all from there on.
    fn last_words(&self) -> String {
        let complaint = self.lines.iter().position(|(_, line)| {
            [
                "rcu: ",
                "lockup",
                "hung task",
                "blocked for more than",
                "BUG: ",
            ]
            .iter()
            .any(|word| line.contains(word))
        });
        let from = complaint.unwrap_or(self.lines.len().saturating_sub(1));
        let words = self.lines[from..].iter().take(COMPLAINT_LINES);
        let words: Vec<&str> = words.map(|(_, line)| line.as_str()).collect();
        if words.is_empty() {
            return "nothing".into();
        }
        words.join("\n")
    }

    /// How long ago the guest showed that it works, and where.
    fn last_beat(&self) -> String {
        self.beats.last().map_or_else(
            || "; it gave no sign of life".into(),
            |beat| {
                let ago = beat.at.elapsed().unwrap_or_default().as_secs_f64();
                format!(
                    "; its last sign of life came {ago:.1} s ago from its {:?}",
                    beat.side
                )
            },
        )
    }
}

/// What a guest said over its life, on whichever host.
#[derive(Debug, Clone)]
pub struct Console {
    name: String,
    shared: Arc<(Mutex<Log>, Condvar)>,
}

/// Lines before a guest's panic that are shown with it: its registers and the calls that led to it.
const PANIC_LINES: usize = 60;
/// Lines from a kernel's first complaint on that are shown of a guest that is late.
const COMPLAINT_LINES: usize = 120;

impl Console {
    /// Of a guest by this name.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            shared: Arc::default(),
        }
    }

    /// Forgets what a guest said that has ended, and is started once more.
    pub(crate) fn begin_anew(&self) {
        *self.log() = Log::default();
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Listens to the guest on one host.
    pub fn attach(&self, side: Side, path: &Path, alive: impl Fn() -> Result<()>) -> Result<()> {
        let stream = super::qmp::connect(path, alive)?;
        let reader = stream.try_clone().map_err(Error::system("copy a socket"))?;
        self.log().writers.push((side, stream));
        let shared = Arc::clone(&self.shared);
        std::thread::Builder::new()
            .name("serial".into())
            .spawn(move || {
                let mut reader = BufReader::new(reader);
                let mut line = Vec::new();
                while reader
                    .read_until(b'\n', &mut line)
                    .is_ok_and(|length| length > 0)
                {
                    let at = SystemTime::now();
                    let text = String::from_utf8_lossy(&line).trim().to_owned();
                    line.clear();
                    let mut log = shared.0.lock().unwrap_or_else(PoisonError::into_inner);
                    match beat(&text, at, side) {
                        Some(beat) => log.beats.push(beat),
                        None => log.lines.push((side, text)),
                    }
                    shared.1.notify_all();
                }
            })
            .map_err(Error::system("start a thread"))?;
        Ok(())
    }

    /// Says a line to the guest on one host.
    pub fn tell(&self, side: Side, line: &str) -> Result<()> {
        let log = self.log();
        let writer = log.writers.iter().rev().find(|(at, _)| *at == side);
        let Some((_, writer)) = writer else {
            return Err(self.wrong("nobody listens to its serial line"));
        };
        let mut writer = writer;
        writer
            .write_all(format!("{line}\n").as_bytes())
            .map_err(Error::system("write to the serial line"))
    }

    fn wrong(&self, what: impl Into<String>) -> Error {
        Error::Guest {
            name: self.name.clone(),
            what: what.into(),
        }
    }

    /// Waits for a line that begins so, from here on. A line that begins with `bad` is an error.
    pub fn wait_for(
        &self,
        prefix: &str,
        from: usize,
        limit: Duration,
        alive: impl Fn() -> Result<()>,
    ) -> Result<String> {
        let start = Instant::now();
        let mut log = self.log();
        let mut next = from;
        loop {
            while let Some((_, line)) = log.lines.get(next) {
                if line.starts_with(prefix) {
                    return Ok(line.clone());
                }
                if line.starts_with("bad ") {
                    return Err(self.wrong(line.clone()));
                }
                if line.contains("Kernel panic") {
                    // What comes before it tells why.
                    let before = &log.lines[next.saturating_sub(PANIC_LINES)..=next];
                    let lines: Vec<&str> = before.iter().map(|(_, line)| line.as_str()).collect();
                    return Err(self.wrong(lines.join("\n")));
                }
                next += 1;
            }
            if start.elapsed() > limit {
                return Err(Error::Late {
                    what: format!("\"{prefix}\" from the guest {}", self.name),
                    seconds: limit.as_secs(),
                    hint: format!("It said last: {}{}", log.last_words(), log.last_beat()),
                });
            }
            log = self
                .shared
                .1
                .wait_timeout(log, Duration::from_millis(200))
                .map_or_else(|error| error.into_inner().0, |(log, _)| log);
            still_time()?;
            alive()?;
        }
    }

    /// How many lines there are, for [`Self::wait_for`].
    pub fn mark(&self) -> usize {
        self.log().lines.len()
    }

    /// All beats so far.
    pub fn beats(&self) -> Vec<Beat> {
        self.log().beats.clone()
    }

    /// Whether a beat came from a host.
    pub fn beats_at(&self, side: Side) -> bool {
        self.log()
            .beats
            .last()
            .is_some_and(|beat| beat.side == side)
    }

    /// Fails if the guest has found something wrong with its data.
    pub fn nothing_bad(&self) -> Result<()> {
        match self
            .log()
            .lines
            .iter()
            .find(|(_, line)| line.starts_with("bad "))
        {
            Some((_, line)) => Err(self.wrong(line.clone())),
            None => Ok(()),
        }
    }

    /// Has the guest run a command, and returns what it prints. A failed command is an error.
    pub fn run(
        &self,
        side: Side,
        command: &str,
        limit: Duration,
        alive: impl Fn() -> Result<()>,
    ) -> Result<String> {
        let mark = self.mark();
        self.tell(side, &format!("run {command}"))?;
        let answer = self.wait_for("ran ", mark, limit, alive)?;
        let log = self.log();
        let said = log.lines[mark..]
            .iter()
            .filter_map(|(_, line)| line.strip_prefix("said "));
        let said = said.collect::<Vec<_>>().join("\n");
        drop(log);
        if answer == "ran 0" {
            Ok(said)
        } else {
            Err(self.wrong(format!("`{command}`: {answer}: {said}")))
        }
    }

    /// Has the guest compare all its data; returns its answer when all is well.
    pub fn check(
        &self,
        side: Side,
        limit: Duration,
        alive: impl Fn() -> Result<()>,
    ) -> Result<String> {
        let mark = self.mark();
        self.tell(side, "check")?;
        let answer = self.wait_for("check ", mark, limit, alive)?;
        self.nothing_bad()?;
        if answer.starts_with("check ok") {
            Ok(answer)
        } else {
            Err(self.wrong(answer))
        }
    }
}

/// `beat MS WORK DIRTIED`
fn beat(line: &str, at: SystemTime, side: Side) -> Option<Beat> {
    let mut words = line
        .strip_prefix("beat ")?
        .split_whitespace()
        .map(|word| word.parse().ok());
    let mut number = || words.next().flatten();
    Some(Beat {
        at,
        side,
        clock_ms: number()?,
        work: number()?,
        dirtied: number()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beats_are_read_and_other_lines_are_not() {
        let now = SystemTime::now();
        let read = beat("beat 20 3 4", now, Side::Source).expect("a beat");
        assert_eq!((read.clock_ms, read.work, read.dirtied), (20, 3, 4));
        assert!(beat("beat 20 3", now, Side::Source).is_none());
        assert!(beat("ready", now, Side::Source).is_none());
    }

    #[test]
    fn a_late_guest_shows_what_its_kernel_complained_of() {
        let mut log = Log::default();
        assert_eq!(log.last_words(), "nothing");
        let mut say = |line: &str| log.lines.push((Side::Source, line.to_owned()));
        say("init: begins");
        say("mounted");
        say("rcu: INFO: rcu_sched detected stalls");
        say("task:insmod state:R");
        let words = log.last_words();
        assert_eq!(
            words,
            "rcu: INFO: rcu_sched detected stalls\ntask:insmod state:R"
        );
        log.lines.truncate(2);
        assert_eq!(log.last_words(), "mounted");
    }
}
