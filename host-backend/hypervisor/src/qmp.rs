//! A client of QEMU's machine protocol: one JSON object a line, over a unix socket.

use super::event::Event;
use super::shutdown::Shutdown;
use super::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use transhume_base::lines::Lines;
use transhume_base::text;
use transhume_protocol::link::GuestEnd;

/// The longest line that QEMU may send; `query-qmp-schema`, the largest answer, has some 200 KiB.
const MAX_LINE: usize = 8 << 20;
/// Events kept for a slow listener, and the longest line whose event's data are kept: theirs are some hundred bytes.
const EVENTS: usize = 256;
const MAX_EVENT: usize = 16 << 10;
/// Requests that wait for a QEMU that does not read.
const REQUESTS: usize = 16;
/// How long a command may take, unless its caller says so. QEMU's main loop answers in milliseconds
/// when it is well; it can be busy for seconds while it loads devices on a loaded host.
const TIMEOUT: Duration = Duration::from_secs(30);

/// A connection to a QEMU. Clones share it.
#[derive(Debug, Clone)]
pub struct Qmp {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    writer: mpsc::Sender<Outgoing>,
    waiting: Arc<Waiting>,
    next_id: AtomicU64,
    events: broadcast::Sender<Event>,
    closed: watch::Receiver<Option<String>>,
    shutdown: watch::Receiver<Option<Shutdown>>,
    version: Version,
    package: String,
    out_of_band: bool,
    peer: Option<u32>,
    tasks: [tokio::task::AbortHandle; 2],
}

/// A line, and a descriptor that goes with it.
type Outgoing = (String, Option<OwnedFd>);

/// Bytes of QEMU's words in an answer that are kept.
pub(super) const MAX_SAID: usize = 4096;

type Waiting = Mutex<HashMap<u64, oneshot::Sender<Value>>>;

/// QEMU's version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Version {
    /// As in 7.
    pub major: u32,
    /// As in 2.
    pub minor: u32,
    /// As in 22.
    pub micro: u32,
}

impl From<[u32; 3]> for Version {
    fn from([major, minor, micro]: [u32; 3]) -> Self {
        Self {
            major,
            minor,
            micro,
        }
    }
}

impl From<Version> for [u32; 3] {
    fn from(version: Version) -> Self {
        [version.major, version.minor, version.micro]
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// QEMU's word on whether the VM runs.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Status {
    /// QEMU's run state, as in `paused`.
    pub status: String,
    /// Whether vCPUs run.
    pub running: bool,
}

/// A machine type that a QEMU knows.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Machine {
    /// Its full name, as in `pc-q35-7.2`.
    pub name: String,
    /// A short name for the newest of its kind, as in `q35`.
    pub alias: Option<String>,
    /// The most vCPUs it takes.
    #[serde(rename = "cpu-max", default)]
    pub cpu_max: u32,
}

#[derive(Deserialize)]
struct Greeting {
    #[serde(rename = "QMP")]
    qmp: GreetingBody,
}

#[derive(Deserialize)]
struct GreetingBody {
    version: GreetingVersion,
    #[serde(default)]
    capabilities: Vec<Value>,
}

#[derive(Deserialize)]
struct GreetingVersion {
    qemu: Version,
    #[serde(default)]
    package: String,
}

impl Qmp {
    /// Connects to the QEMU that listens at `path`, which must greet within `patience`.
    ///
    /// # Errors
    /// [`Error::Connect`], [`Error::NoGreeting`], [`Error::Protocol`], [`Error::Lost`].
    pub async fn connect(path: &Path, patience: Duration) -> Result<Self> {
        let connect_error = |source| Error::Connect {
            path: path.to_owned(),
            source,
        };
        let no_greeting = |_| Error::NoGreeting {
            path: path.to_owned(),
            waited: patience,
        };
        let connected = tokio::time::timeout(patience, UnixStream::connect(path));
        let stream = connected
            .await
            .map_err(no_greeting)?
            .map_err(connect_error)?;
        let peer = stream
            .peer_cred()
            .ok()
            .and_then(|credentials| credentials.pid())
            .and_then(|pid| u32::try_from(pid).ok());
        let (reader, writer) = stream.into_split();
        let mut lines = Lines::new(reader, MAX_LINE);
        let line = tokio::time::timeout(patience, lines.next())
            .await
            .map_err(no_greeting)?
            .map_err(|error| Error::Lost(error.to_string()))?
            .ok_or_else(|| Error::Lost("QEMU closed it at once".to_owned()))?;
        let greeting: Greeting = serde_json::from_slice(&line).map_err(|error| {
            Error::Protocol(format!(
                "{} did not greet as QMP does ({error}); is it the socket of `-qmp`?",
                path.display()
            ))
        })?;
        let out_of_band = greeting.qmp.capabilities.contains(&json!("oob"));
        let qmp = Self::start(lines, writer, greeting.qmp.version, out_of_band, peer);
        let enable: &[&str] = if out_of_band { &["oob"] } else { &[] };
        qmp.execute("qmp_capabilities", json!({ "enable": enable }))
            .await?;
        Ok(qmp)
    }

    fn start(
        lines: Lines<OwnedReadHalf>,
        writer: OwnedWriteHalf,
        version: GreetingVersion,
        out_of_band: bool,
        peer: Option<u32>,
    ) -> Self {
        let waiting = Arc::new(Waiting::default());
        let (events, _) = broadcast::channel(EVENTS);
        let (close, closed) = watch::channel(None);
        let (ends, shutdown) = watch::channel(None);
        let (requests, outgoing) = mpsc::channel(REQUESTS);
        let writer = transhume_base::task::spawn(write(outgoing, writer));
        let tell = Tell {
            waiting: waiting.clone(),
            events: events.clone(),
            shutdown: ends,
            closed: close,
        };
        let reader = transhume_base::task::spawn(read(lines, tell));
        Self {
            shared: Arc::new(Shared {
                writer: requests,
                waiting,
                next_id: AtomicU64::new(1),
                events,
                closed,
                shutdown,
                version: version.qemu,
                package: version.package,
                out_of_band,
                peer,
                tasks: [reader.abort_handle(), writer.abort_handle()],
            }),
        }
    }

    /// QEMU's version, from its greeting.
    pub fn version(&self) -> Version {
        self.shared.version
    }

    /// What its distribution says of this build, from its greeting, as in `Debian 1:10.0.2+ds-2`; may be empty.
    pub fn package(&self) -> &str {
        &self.shared.package
    }

    /// The process that listens on the socket.
    pub fn pid(&self) -> Option<u32> {
        self.shared.peer
    }

    /// QEMU's events from now on.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.shared.events.subscribe()
    }

    /// Why QEMU ends, or stands still for good, if it has said so.
    pub fn shutdown(&self) -> Option<Shutdown> {
        self.shared.shutdown.borrow().clone()
    }

    /// How the guest ended by itself, if QEMU has said that it did.
    pub fn guest_end(&self) -> Option<GuestEnd> {
        self.shutdown()?.guest()
    }

    /// Waits until QEMU says why it ends; for ever if it does not say.
    pub async fn shuts_down(&self) {
        let mut shutdown = self.shared.shutdown.clone();
        if shutdown.wait_for(Option::is_some).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Whether the connection has ended.
    pub fn is_closed(&self) -> bool {
        self.shared.closed.borrow().is_some()
    }

    /// Waits for the connection's end, and tells why.
    pub async fn closed(&self) -> String {
        let mut closed = self.shared.closed.clone();
        let reason = closed.wait_for(Option::is_some).await;
        reason
            .ok()
            .and_then(|reason| reason.clone())
            .unwrap_or_else(|| "closed".to_owned())
    }

    /// Runs a command and returns QEMU's answer. `Value::Null` for no arguments.
    ///
    /// # Errors
    /// [`Error::Refused`] with QEMU's words, [`Error::Timeout`], [`Error::Lost`].
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value> {
        self.execute_within(command, arguments, TIMEOUT).await
    }

    /// [`Qmp::execute`] with a time limit of the caller's.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub async fn execute_within(
        &self,
        command: &str,
        arguments: Value,
        patience: Duration,
    ) -> Result<Value> {
        self.send("execute", command, arguments, None, patience)
            .await
    }

    /// Gives QEMU a file descriptor under a name, for a command that takes one by name.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub async fn give(&self, name: &str, file: OwnedFd) -> Result<()> {
        let arguments = json!({ "fdname": name });
        self.send("execute", "getfd", arguments, Some(file), TIMEOUT)
            .await
            .map(drop)
    }

    /// Runs a command past QEMU's main loop, which may hang (`migrate-recover`, `migrate-pause`).
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub async fn execute_out_of_band(&self, command: &str, arguments: Value) -> Result<Value> {
        let kind = if self.shared.out_of_band {
            "exec-oob"
        } else {
            "execute"
        };
        self.send(kind, command, arguments, None, TIMEOUT).await
    }

    async fn send(
        &self,
        kind: &str,
        command: &str,
        arguments: Value,
        file: Option<OwnedFd>,
        patience: Duration,
    ) -> Result<Value> {
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        let mut request = Map::new();
        request.insert(kind.to_owned(), command.into());
        if !arguments.is_null() {
            request.insert("arguments".to_owned(), arguments);
        }
        request.insert("id".to_owned(), id.into());
        let mut line = Value::Object(request).to_string();
        line.push('\n');

        let (sender, receiver) = oneshot::channel();
        lock(&self.shared.waiting).insert(id, sender);
        let _forget = Forget {
            waiting: &self.shared.waiting,
            id,
        };
        let answer = async {
            // The reader sets `closed` before it empties the table, so an id put in too late is seen here.
            if self.is_closed() || self.shared.writer.send((line, file)).await.is_err() {
                return Err(Error::Lost(self.closed().await));
            }
            match receiver.await {
                Ok(answer) => Ok(answer),
                Err(_) => Err(Error::Lost(self.closed().await)),
            }
        };
        let mut answer = match tokio::time::timeout(patience, answer).await {
            Ok(answer) => answer?,
            Err(_) => {
                return Err(Error::Timeout {
                    command: command.to_owned(),
                    waited: patience,
                });
            }
        };
        if let Some(error) = answer.get("error") {
            let word = |key| {
                let said = error.get(key).and_then(Value::as_str).unwrap_or("?");
                text::line(said, MAX_SAID)
            };
            return Err(Error::Refused {
                command: command.to_owned(),
                class: word("class"),
                description: word("desc"),
            });
        }
        Ok(answer
            .get_mut("return")
            .map(Value::take)
            .unwrap_or_default())
    }

    /// Runs a command and reads its answer as a `T`.
    ///
    /// # Errors
    /// As [`Qmp::execute`], and [`Error::Protocol`] if the answer is not a `T`.
    pub async fn query<T: serde::de::DeserializeOwned>(
        &self,
        command: &str,
        arguments: Value,
    ) -> Result<T> {
        let answer = self.execute(command, arguments).await?;
        serde_json::from_value(answer)
            .map_err(|error| Error::Protocol(format!("{command}: {error}")))
    }
}

/// Gives a command's place in the table back, whoever gave up waiting.
struct Forget<'a> {
    waiting: &'a Waiting,
    id: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        lock(self.waiting).remove(&self.id);
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // They own the socket, which QEMU gives to one client at a time.
        for task in &self.tasks {
            task.abort();
        }
    }
}

fn lock(waiting: &Waiting) -> std::sync::MutexGuard<'_, HashMap<u64, oneshot::Sender<Value>>> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes whole lines: a caller that gives up in the middle of one must not tear it.
async fn write(mut requests: mpsc::Receiver<Outgoing>, mut socket: OwnedWriteHalf) {
    while let Some((line, file)) = requests.recv().await {
        let begun = match file {
            Some(file) => write_with(&socket, line.as_bytes(), &file).await,
            None => Ok(0),
        };
        let written = match begun {
            Ok(begun) => {
                socket
                    .write_all(line.as_bytes().get(begun..).unwrap_or_default())
                    .await
            }
            Err(error) => Err(error),
        };
        if written.is_err() {
            // The reader sees the same end, and knows its reason.
            break;
        }
    }
}

/// Writes the beginning of a line with a descriptor (`SCM_RIGHTS`, unix(7)); returns its length.
async fn write_with(
    socket: &OwnedWriteHalf,
    bytes: &[u8],
    file: &OwnedFd,
) -> std::io::Result<usize> {
    use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
    let stream: &UnixStream = socket.as_ref();
    stream
        .async_io(Interest::WRITABLE, || {
            let rights = [file.as_raw_fd()];
            sendmsg::<UnixAddr>(
                stream.as_raw_fd(),
                &[IoSlice::new(bytes)],
                &[ControlMessage::ScmRights(&rights)],
                MsgFlags::MSG_NOSIGNAL,
                None,
            )
            .map_err(std::io::Error::from)
        })
        .await
}

/// Who is told what QEMU says.
struct Tell {
    waiting: Arc<Waiting>,
    events: broadcast::Sender<Event>,
    shutdown: watch::Sender<Option<Shutdown>>,
    closed: watch::Sender<Option<String>>,
}

async fn read(mut lines: Lines<OwnedReadHalf>, tell: Tell) {
    let Tell {
        waiting,
        events,
        shutdown,
        closed,
    } = tell;
    let reason = loop {
        let line = match lines.next().await {
            Ok(Some(line)) => line,
            Ok(None) => break "QEMU closed it".to_owned(),
            Err(error) => break error.to_string(),
        };
        let Ok(message) = serde_json::from_slice::<Value>(&line) else {
            break "QEMU sent a line that is no JSON".to_owned();
        };
        if let Some(mut event) = parse_event(&message) {
            if line.len() > MAX_EVENT {
                event.data = Value::Null;
            }
            tracing::trace!(name = event.name, "QMP event");
            match event.name.as_str() {
                "SHUTDOWN" => drop(shutdown.send_replace(Some(Shutdown::of(&event)))),
                // One with `-no-shutdown` was reset, and runs again.
                "RESUME" => drop(shutdown.send_replace(None)),
                _ => {}
            }
            // Without listeners there is nobody to tell.
            let _ = events.send(event);
        } else if let Some(id) = message.get("id").and_then(Value::as_u64)
            && let Some(sender) = lock(&waiting).remove(&id)
        {
            // Whoever asked may have given up.
            let _ = sender.send(message);
        }
    };
    // First the reason, so that whoever is woken by the dropped senders finds it.
    closed.send_replace(Some(reason));
    lock(&waiting).clear();
}

fn parse_event(message: &Value) -> Option<Event> {
    let part = |key| message.get("timestamp")?.get(key)?.as_u64();
    let seconds = Duration::from_secs(part("seconds").unwrap_or(0));
    let micros = Duration::from_micros(part("microseconds").unwrap_or(0));
    Some(Event {
        name: message.get("event")?.as_str()?.to_owned(),
        data: message.get("data").cloned().unwrap_or_default(),
        at: seconds.checked_add(micros)?,
    })
}

#[cfg(test)]
#[path = "qmp_tests.rs"]
mod tests;
