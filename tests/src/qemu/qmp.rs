//! QMP: JSON lines over a unix socket.

use crate::cleanup::still_time;
use crate::{Error, Result};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant, SystemTime};

const PATIENCE: Duration = Duration::from_secs(30);
const TICK: Duration = Duration::from_millis(200);

/// Something that QEMU said by itself.
#[derive(Debug, Clone)]
pub struct Event {
    /// "STOP", "RESUME", "MIGRATION", …
    pub name: String,
    /// By QEMU's clock, which is this machine's.
    pub at: SystemTime,
    /// What comes with it.
    pub data: Value,
}

/// A connection to a QEMU.
#[derive(Debug)]
pub struct Qmp {
    name: String,
    stream: UnixStream,
    lines: Receiver<Value>,
    events: VecDeque<Event>,
}

impl Qmp {
    /// Connects once the socket is there, and agrees capabilities.
    pub fn connect(name: &str, path: &Path, alive: impl Fn() -> Result<()>) -> Result<Self> {
        let stream = connect(path, alive)?;
        let reader = stream.try_clone().map_err(Error::system("copy a socket"))?;
        let (sink, lines) = channel();
        std::thread::Builder::new()
            .name("qmp".into())
            .spawn(move || {
                for line in BufReader::new(reader).lines() {
                    let Ok(line) = line else { return };
                    if let Ok(value) = serde_json::from_str(&line)
                        && sink.send(value).is_err()
                    {
                        return;
                    }
                }
            })
            .map_err(Error::system("start a thread"))?;
        let mut qmp = Self {
            name: name.to_owned(),
            stream,
            lines,
            events: VecDeque::new(),
        };
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    fn failed(&self, what: impl Into<String>) -> Error {
        Error::Qemu {
            name: self.name.clone(),
            what: what.into(),
        }
    }

    /// Runs a command and returns what it answers.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let mut request = json!({ "execute": command });
        if arguments
            .as_object()
            .is_some_and(|object| !object.is_empty())
        {
            request["arguments"] = arguments;
        }
        self.stream
            .write_all(format!("{request}\n").as_bytes())
            .map_err(|error| self.failed(format!("{command}: the connection is gone ({error})")))?;
        let start = Instant::now();
        loop {
            let Some(value) = self.receive(TICK)? else {
                if start.elapsed() > PATIENCE {
                    return Err(
                        self.failed(format!("{command}: no answer in {} s", PATIENCE.as_secs()))
                    );
                }
                continue;
            };
            if let Some(answer) = value.get("return") {
                return Ok(answer.clone());
            }
            if let Some(error) = value.get("error") {
                return Err(self.failed(format!(
                    "{command}: {}",
                    error["desc"].as_str().unwrap_or("an error")
                )));
            }
        }
    }

    /// The next message that is no event, if one comes in time. Events are kept.
    fn receive(&mut self, wait: Duration) -> Result<Option<Value>> {
        still_time()?;
        match self.lines.recv_timeout(wait) {
            Ok(value) => match value.get("event").and_then(Value::as_str) {
                Some(name) => {
                    self.events.push_back(Event {
                        name: name.to_owned(),
                        at: timestamp(&value["timestamp"]),
                        data: value["data"].clone(),
                    });
                    Ok(None)
                }
                None => Ok(Some(value)),
            },
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => {
                Err(self.failed("it has ended; see its qemu.log"))
            }
        }
    }

    /// Waits for an event that a test accepts, and passes over the others before it.
    pub fn event(
        &mut self,
        what: &str,
        limit: Duration,
        wanted: impl Fn(&Event) -> bool,
    ) -> Result<Event> {
        let start = Instant::now();
        loop {
            while let Some(event) = self.events.pop_front() {
                if wanted(&event) {
                    return Ok(event);
                }
            }
            if start.elapsed() > limit {
                return Err(Error::Late {
                    what: format!("{what} ({})", self.name),
                    seconds: limit.as_secs(),
                    hint: "Look at qemu.log and serial.log in the run's folder".into(),
                });
            }
            self.receive(TICK)?;
        }
    }
}

fn timestamp(value: &Value) -> SystemTime {
    let part = |name: &str| value[name].as_u64().unwrap_or(0);
    SystemTime::UNIX_EPOCH
        + Duration::from_secs(part("seconds"))
        + Duration::from_micros(part("microseconds"))
}

/// Connects to a unix socket that is about to be made, as long as its owner lives.
pub(super) fn connect(path: &Path, alive: impl Fn() -> Result<()>) -> Result<UnixStream> {
    let start = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return Ok(stream),
            Err(error) if start.elapsed() > PATIENCE => {
                return Err(Error::File {
                    action: "connect to",
                    path: path.to_owned(),
                    source: error,
                });
            }
            Err(_) => {
                still_time()?;
                alive()?;
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}
