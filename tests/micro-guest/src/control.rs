//! The host's end of the guest's control channel: COM1 as a unix socket.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};
use thiserror::Error;

/// Longest line that the guest is believed to send, in bytes.
const MAX_LINE: u64 = 4096;
/// Most lines that are kept unread; an hour of heartbeats.
const MAX_UNREAD: usize = 1 << 16;

/// Why a command got no answer.
#[derive(Debug, Error)]
pub enum ControlError {
    /// The socket cannot be opened.
    #[error(
        "{path} cannot be opened: is QEMU running with -serial unix:{path},server=on,wait=off?"
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Reading or writing failed.
    #[error("the control channel broke")]
    Io(#[from] io::Error),
    /// The other end closed the socket.
    #[error("QEMU closed the control channel: look at its log")]
    Closed,
    /// Nothing came in time.
    #[error(
        "no answer to `{command}` within {waited:?}: the guest is stopped, or another reader has its serial port"
    )]
    Timeout {
        /// The command.
        command: String,
        /// How long was waited.
        waited: Duration,
    },
    /// The guest gave up.
    #[error("the guest stopped for good: {0}")]
    Failed(String),
    /// The answer is none to the command.
    #[error("the guest answered `{command}` with `{answer}`")]
    Answer {
        /// The command.
        command: String,
        /// The answer.
        answer: String,
    },
}

/// What the guest found when it checked its pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Checked {
    /// Every page holds what it must.
    Right {
        /// Pages that were checked.
        pages: u64,
    },
    /// Some pages are wrong.
    Wrong {
        /// How many.
        count: u64,
        /// Frame number of the first.
        first: u64,
        /// What the first should have held: `data`, `cache` or `zero`.
        kind: String,
        /// What the first holds: `old:N`, its content of N generations before; `part:N`, what it should hold in its first
        /// N words alone; `zero` or `unknown`.
        holds: String,
        /// Pages that were checked.
        pages: u64,
    },
}

/// Counters of the guest. Those of pages count since it booted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Status {
    /// Time that the guest has run, in milliseconds.
    pub ms: u64,
    /// Data pages written.
    pub dirtied: u64,
    /// Cache pages written.
    pub cache_dirtied: u64,
    /// Cache pages read again from another place of the disk.
    pub churned: u64,
    /// Reads of the disk that failed.
    pub read_errors: u64,
    /// Heartbeats sent.
    pub heartbeats: u64,
    /// Pings answered.
    pub pongs: u64,
    /// Frames sent on the agent's channel.
    pub frames: u64,
}

/// A heartbeat, and when its line was read.
#[derive(Debug, Clone, Copy)]
pub struct Heartbeat {
    /// The guest's counter: goes up by one, wherever the guest runs.
    pub number: u64,
    /// When it came.
    pub at: Instant,
}

/// A line and when it came, or why no more will come.
type Incoming = Result<(Instant, String), ControlError>;

/// A connection to one guest.
///
/// A thread reads all the time: the time of a heartbeat is when it came, and the guest's port never
/// fills up. (What waits in a full port when the guest moves is sent by both sides.)
pub struct Control {
    stream: UnixStream,
    /// Commands sent. Each carries a tag that its answer repeats, so that an answer that comes too
    /// late, or was meant for an earlier connection, is not taken for another's.
    sent: u64,
    lines: Receiver<Incoming>,
    heartbeats: Vec<Heartbeat>,
}

impl Control {
    /// Connects to the guest's serial port.
    pub fn connect(path: &Path) -> Result<Self, ControlError> {
        let stream = UnixStream::connect(path).map_err(|source| ControlError::Connect {
            path: path.into(),
            source,
        })?;
        Self::new(stream)
    }

    fn new(stream: UnixStream) -> Result<Self, ControlError> {
        let (sender, lines) = sync_channel(MAX_UNREAD);
        let reader = stream.try_clone()?;
        thread::spawn(move || read_lines(reader, &sender));
        Ok(Self {
            stream,
            sent: 0,
            lines,
            heartbeats: Vec::new(),
        })
    }

    /// Waits until the guest answers, however far its boot is. Returns the number of the pong.
    pub fn wait_ready(&mut self, timeout: Duration) -> Result<u64, ControlError> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            // What was sent before the guest set its port up may be lost.
            match self.ping(left.min(Duration::from_secs(1))) {
                Err(ControlError::Timeout { .. }) if !left.is_zero() => {}
                result => return result,
            }
        }
    }

    /// Sends a command and returns the line that answers it. Heartbeats that come in between are
    /// kept for [`Self::heartbeats`].
    pub fn command(&mut self, command: &str, timeout: Duration) -> Result<String, ControlError> {
        self.sent += 1;
        let tag = format!("#{}.{}", std::process::id(), self.sent);
        self.stream
            .write_all(format!("{tag} {command}\n").as_bytes())?;
        let deadline = Instant::now() + timeout;
        loop {
            let line = self.line(deadline)?.ok_or_else(|| ControlError::Timeout {
                command: command.into(),
                waited: timeout,
            })?;
            if let Some((answered, answer)) = line.split_once(' ')
                && answered == tag
            {
                return Ok(answer.into());
            }
        }
    }

    /// The answer's part after `prefix`.
    fn expect(
        &mut self,
        command: &str,
        prefix: &str,
        timeout: Duration,
    ) -> Result<String, ControlError> {
        let answer = self.command(command, timeout)?;
        match answer.strip_prefix(prefix) {
            Some(rest) => Ok(rest.trim_start().into()),
            None => Err(ControlError::Answer {
                command: command.into(),
                answer,
            }),
        }
    }

    /// Asks for a sign of life. The number goes up by one each time, wherever the guest runs: two
    /// copies of it would answer with the same number.
    pub fn ping(&mut self, timeout: Duration) -> Result<u64, ControlError> {
        let rest = self.expect("ping", "pong", timeout)?;
        rest.parse().map_err(|_| ControlError::Answer {
            command: "ping".into(),
            answer: rest,
        })
    }

    /// Sets how many bytes of data pages are written per second.
    pub fn dirty(&mut self, bytes_per_second: u64, timeout: Duration) -> Result<(), ControlError> {
        self.expect(&format!("dirty {bytes_per_second}"), "ok", timeout)
            .map(drop)
    }

    /// Sets how many bytes of data pages are written at all, spread over all of them; 0 for all.
    pub fn hot(&mut self, bytes: u64, timeout: Duration) -> Result<(), ControlError> {
        self.expect(&format!("hot {bytes}"), "ok", timeout)
            .map(drop)
    }

    /// Sets how many bytes of cache pages are written per second: hints about them go stale.
    pub fn dirty_cache(
        &mut self,
        bytes_per_second: u64,
        timeout: Duration,
    ) -> Result<(), ControlError> {
        self.expect(&format!("dirty-cache {bytes_per_second}"), "ok", timeout)
            .map(drop)
    }

    /// Sets how many bytes of cache pages are read again from another place of the disk per second.
    pub fn churn(&mut self, bytes_per_second: u64, timeout: Duration) -> Result<(), ControlError> {
        self.expect(&format!("churn {bytes_per_second}"), "ok", timeout)
            .map(drop)
    }

    /// Has the guest end by itself after so many milliseconds: by `poweroff`, `reset` or `panic`.
    pub fn end(&mut self, how: &str, after_ms: u64, timeout: Duration) -> Result<(), ControlError> {
        self.expect(&format!("{how} {after_ms}"), "ok", timeout)
            .map(drop)
    }

    /// Stops all changes of pages.
    pub fn stop(&mut self, timeout: Duration) -> Result<(), ControlError> {
        self.expect("stop", "ok", timeout).map(drop)
    }

    /// Asks for a heartbeat every 50 ms, or for none.
    pub fn heartbeat(&mut self, on: bool, timeout: Duration) -> Result<(), ControlError> {
        let command = if on { "heartbeat on" } else { "heartbeat off" };
        self.expect(command, "ok", timeout).map(drop)
    }

    /// Flips one bit of the managed page with this number, so that a check must find it. Returns the
    /// page's frame number.
    pub fn corrupt(&mut self, page: u64, timeout: Duration) -> Result<u64, ControlError> {
        let command = format!("corrupt {page}");
        let rest = self.expect(&command, "ok", timeout)?;
        field(&rest, "page").ok_or(ControlError::Answer {
            command,
            answer: rest,
        })
    }

    /// Reads the guest's counters.
    pub fn status(&mut self, timeout: Duration) -> Result<Status, ControlError> {
        let line = self.expect("status", "status", timeout)?;
        let parse = || {
            Some(Status {
                ms: field(&line, "ms")?,
                dirtied: field(&line, "dirtied")?,
                cache_dirtied: field(&line, "cache-dirtied")?,
                churned: field(&line, "churned")?,
                read_errors: field(&line, "read-errors")?,
                heartbeats: field(&line, "heartbeats")?,
                pongs: field(&line, "pongs")?,
                frames: field(&line, "frames")?,
            })
        };
        let status = parse();
        status.ok_or(ControlError::Answer {
            command: "status".into(),
            answer: line,
        })
    }

    /// Lets the guest check every page.
    pub fn check(&mut self, timeout: Duration) -> Result<Checked, ControlError> {
        let line = self.command("check", timeout)?;
        let parse = || {
            let pages = field(&line, "pages")?;
            if line.starts_with("ok ") {
                return Some(Checked::Right { pages });
            }
            line.starts_with("bad ").then_some(())?;
            let kind = word(&line, "kind")?.to_owned();
            let holds = word(&line, "holds")?.to_owned();
            Some(Checked::Wrong {
                count: field(&line, "count")?,
                first: field(&line, "page")?,
                kind,
                holds,
                pages,
            })
        };
        let checked = parse();
        checked.ok_or(ControlError::Answer {
            command: "check".into(),
            answer: line,
        })
    }

    /// Reads heartbeats for `time` and returns them with those that came before.
    pub fn heartbeats(&mut self, time: Duration) -> Result<Vec<Heartbeat>, ControlError> {
        self.drain(time)?;
        Ok(std::mem::take(&mut self.heartbeats))
    }

    /// Reads whatever comes within `time`.
    fn drain(&mut self, time: Duration) -> Result<(), ControlError> {
        let deadline = Instant::now() + time;
        while self.line(deadline)?.is_some() {}
        Ok(())
    }

    /// The next line that is no heartbeat; `None` at the deadline.
    fn line(&mut self, deadline: Instant) -> Result<Option<String>, ControlError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let (at, line) = match self.lines.recv_timeout(left) {
                Ok(incoming) => incoming?,
                Err(RecvTimeoutError::Timeout) => return Ok(None),
                Err(RecvTimeoutError::Disconnected) => return Err(ControlError::Closed),
            };
            let beat = line
                .strip_prefix("heartbeat ")
                .and_then(|number| number.parse().ok());
            if let Some(number) = beat {
                if self.heartbeats.len() < MAX_UNREAD {
                    self.heartbeats.push(Heartbeat { number, at });
                }
            } else if let Some(reason) = line.strip_prefix("failed ") {
                return Err(ControlError::Failed(reason.into()));
            } else if !line.is_empty() {
                return Ok(Some(line));
            }
        }
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // Ends the reader.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// Passes lines on until the channel breaks or nobody wants more.
fn read_lines(stream: UnixStream, sender: &SyncSender<Incoming>) {
    let mut input = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        let incoming = match input.by_ref().take(MAX_LINE).read_until(b'\n', &mut line) {
            Ok(0) => Err(ControlError::Closed),
            Ok(_) => Ok((
                Instant::now(),
                String::from_utf8_lossy(&line).trim().to_owned(),
            )),
            Err(error) => Err(ControlError::Io(error)),
        };
        let last = incoming.is_err();
        if sender.send(incoming).is_err() || last {
            return;
        }
    }
}

/// The word after `name=`.
fn word<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    line.split_ascii_whitespace()
        .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
}

fn field(line: &str, name: &str) -> Option<u64> {
    word(line, name)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(10);

    /// A control whose guest answers each line that it gets with the next of `answers`, where `#`
    /// stands for the line's tag.
    fn guest(answers: &'static [&'static str]) -> Control {
        let (ours, theirs) = UnixStream::pair().unwrap();
        thread::spawn(move || {
            let mut lines = BufReader::new(&theirs).lines();
            for answer in answers {
                let line = lines.next().unwrap().unwrap();
                let tag = line.split(' ').next().unwrap();
                (&theirs)
                    .write_all(answer.replace('#', tag).as_bytes())
                    .unwrap();
            }
            // Keeps the socket open until the control is gone.
            let _ = lines.next();
        });
        Control::new(ours).unwrap()
    }

    #[test]
    fn heartbeats_do_not_pass_for_answers() {
        let mut control = guest(&["heartbeat 4\nheart", "beat 5\n\n# ok pages=12\n"]);
        assert!(matches!(
            control.ping(Duration::from_millis(20)),
            Err(ControlError::Timeout { .. })
        ));
        assert_eq!(control.check(SECOND).unwrap(), Checked::Right { pages: 12 });
        let numbers: Vec<u64> = control.heartbeats.iter().map(|beat| beat.number).collect();
        assert_eq!(numbers, [4, 5]);
    }

    #[test]
    fn a_late_answer_is_not_the_next_ones() {
        let mut control = guest(&["heart", "beat 1\n#7.7 pong 3\n# pong 4\n"]);
        assert!(control.ping(Duration::from_millis(20)).is_err());
        assert_eq!(control.ping(SECOND).unwrap(), 4);
    }

    #[test]
    fn a_wrong_page_is_reported_in_full() {
        let mut control = guest(&["# bad page=300 kind=cache holds=old:7 count=2 pages=99\n"]);
        let wrong = Checked::Wrong {
            count: 2,
            first: 300,
            kind: "cache".into(),
            holds: "old:7".into(),
            pages: 99,
        };
        assert_eq!(control.check(SECOND).unwrap(), wrong);
    }

    #[test]
    fn last_words_are_an_error() {
        let mut control = guest(&["\nfailed exception 14\n"]);
        let error = control.status(SECOND).unwrap_err();
        assert!(matches!(error, ControlError::Failed(reason) if reason == "exception 14"));
    }

    #[test]
    fn an_answer_of_another_command_is_an_error() {
        let mut control = guest(&["# ok stopped\n"]);
        assert!(matches!(
            control.ping(SECOND),
            Err(ControlError::Answer { .. })
        ));
    }
}
