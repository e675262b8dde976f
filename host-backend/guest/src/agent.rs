//! Talks to the agent over the socket of the VM's virtio-serial port.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use transhume_protocol::agent::{
    AgentMessage, Decoder, HostMessage, MAX_FRAME_LEN, ReportSource, VERSION,
};

use crate::clock::{ClockReader, ClockSet, ClockSetter, Known, monotonic_ns};
use crate::memory_order::{MemoryOrder, OrderCollector};
use crate::page_cache_report::{Collector, DiskName, GuestRange, Report};
use crate::turn::Turn;

/// How long whoever speaks with the agent may go on: a gate closes, and a clock is set.
const TURN_TIMEOUT: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 20 });
/// How often a waiting read looks whether it should end.
const TICK: Duration = Duration::from_millis(100);

/// What the agent said of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Greeting {
    /// Its name and version.
    pub agent: String,
    /// Where its reports come from.
    pub source: ReportSource,
}

/// What came of a report.
#[derive(Debug, PartialEq, Eq)]
pub enum Reported<'a> {
    /// All ranges so far of a report that goes on.
    Part(&'a [GuestRange]),
    /// A report's end, and all of it.
    Whole(Report),
    /// In which order the memory is wanted; see [`crate::Questions`].
    Order(MemoryOrder),
    /// How far the guest's clock is ahead of this host's.
    Clock(Known),
}

/// A session with an agent.
pub struct Agent {
    pub(super) stream: UnixStream,
    pub(super) decoder: Box<Decoder>,
    session: u64,
    collector: Collector,
    order: OrderCollector,
    clock: ClockReader,
    pub(super) setter: Option<ClockSetter>,
    pub(super) clock_set: Option<ClockSet>,
    /// Given up when the stream is closed.
    _turn: Turn,
}

/// A session that the agent was asked for, and has not agreed to.
pub struct Opening {
    pub(super) stream: UnixStream,
    session: u64,
    turn: Turn,
}

/// Asks the agent behind this socket for a session, when the one before has ended. Each write may take `patience`.
///
/// An error is for people: it says why there will be no session.
pub fn open(socket: &Path, session: u64, patience: Duration) -> Result<Opening, String> {
    let turn = Turn::take(socket, TURN_TIMEOUT)
        .ok_or("the guest's agent is still spoken to by this host, after the last migration")?;
    let stream = UnixStream::connect(socket).map_err(unusable)?;
    stream.set_read_timeout(Some(TICK)).map_err(unusable)?;
    stream.set_write_timeout(Some(patience)).map_err(unusable)?;
    let hello = HostMessage::Hello {
        oldest: VERSION,
        newest: VERSION,
        session,
    };
    send(&stream, &hello).map_err(unusable)?;
    Ok(Opening {
        stream,
        session,
        turn,
    })
}

/// Opens a session with the agent behind this socket. Blocks for `patience` at most.
///
/// An error is for people: it says why there will be no reports.
pub fn connect(
    socket: &Path,
    disks: Vec<DiskName>,
    session: u64,
    patience: Duration,
) -> Result<(Agent, Greeting), String> {
    open(socket, session, patience)?.agreed(disks, patience)
}

/// Why there is nothing to be had from an agent, for people.
#[expect(clippy::needless_pass_by_value, reason = "for `map_err`")]
pub fn unusable(error: io::Error) -> String {
    format!("the agent's channel cannot be used: {error}")
}

impl Opening {
    /// Waits for the agent's word for `patience` at most.
    ///
    /// # Errors
    /// Why there is no session, for people.
    pub fn agreed(
        self,
        disks: Vec<DiskName>,
        patience: Duration,
    ) -> Result<(Agent, Greeting), String> {
        let deadline = Instant::now() + patience;
        let Self {
            stream,
            session,
            turn,
        } = self;
        let mut decoder = Box::new(Decoder::new());
        let mut buffer = vec![0; MAX_FRAME_LEN];
        loop {
            if Instant::now() >= deadline {
                return Err(
                    "the guest's agent does not answer; is it installed and running?".to_owned(),
                );
            }
            let read = match read(&stream, &mut buffer) {
                Ok(Some(0)) => return Err("the agent's channel was closed".to_owned()),
                Ok(Some(read)) => read,
                Ok(None) => continue,
                Err(error) => return Err(unusable(error)),
            };
            let mut rest = &buffer[..read];
            while !rest.is_empty() {
                let taken = decoder.push(rest);
                rest = &rest[taken..];
                while let Some((kind, payload)) = decoder.next_frame() {
                    match AgentMessage::decode(kind, payload) {
                        Ok(AgentMessage::Hello {
                            version,
                            session: theirs,
                            source,
                            page_shift,
                            agent,
                        }) if theirs == session => {
                            let agent = printable(agent);
                            let greeting = Greeting {
                                agent: agent.clone(),
                                source,
                            };
                            if version != VERSION {
                                return Err(format!(
                                    "the guest's agent ({agent}) wants version {version} of the channel, \
                                     which it was not offered; install the agent of this release"
                                ));
                            }
                            let collector = Collector::new(disks, page_shift).ok_or_else(|| {
                                format!(
                                    "the guest's pages are of 2^{page_shift} bytes, not of 4 KiB"
                                )
                            })?;
                            return Ok((
                                Agent {
                                    stream,
                                    decoder,
                                    session,
                                    collector,
                                    order: OrderCollector::default(),
                                    clock: ClockReader::default(),
                                    setter: None,
                                    clock_set: None,
                                    _turn: turn,
                                },
                                greeting,
                            ));
                        }
                        Ok(AgentMessage::Trouble { text }) => {
                            return Err(format!("the guest's agent says: {}", printable(text)));
                        }
                        // What an earlier session left in the channel.
                        _ => {}
                    }
                }
            }
        }
    }
}

/// Bytes of a guest's text; the channel's are no longer.
const MAX_TEXT: usize = 256;

/// A guest's text, made safe for terminals and logs.
pub(super) fn printable(text: &str) -> String {
    transhume_base::text::line(text, MAX_TEXT)
}

pub(super) fn send(mut stream: &UnixStream, message: &HostMessage<'_>) -> io::Result<()> {
    let mut out = [0; 64];
    let length = message.encode(&mut out).map_err(io::Error::other)?;
    stream.write_all(&out[..length])
}

/// `None` when nothing came within the tick.
pub(super) fn read(mut stream: &UnixStream, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    match stream.read(buffer) {
        Ok(read) => Ok(Some(read)),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

impl Agent {
    /// Asks for reports, with a pause between them and a share of one CPU in thousandths.
    pub fn start_reports(&mut self, interval: Duration, cpu_permille: u16) -> io::Result<()> {
        let interval_ms = u32::try_from(interval.as_millis()).unwrap_or(u32::MAX);
        send(
            &self.stream,
            &HostMessage::ReportStart {
                interval_ms,
                cpu_permille,
            },
        )
    }

    /// Ends the reports.
    pub fn stop_reports(&mut self) -> io::Result<()> {
        send(&self.stream, &HostMessage::ReportStop)
    }

    /// Reads what the agent sends for as long as `go_on` says, and hands reports to `report`, as they grow
    /// and whole, what the guest's clock shows, which is asked for, and each text for people to `trouble`. A channel that
    /// closes ends it, too.
    pub fn listen(
        &mut self,
        mut go_on: impl FnMut() -> bool,
        mut report: impl FnMut(Reported<'_>),
        mut trouble: impl FnMut(String),
    ) -> io::Result<()> {
        let mut buffer = vec![0; 64 * 1024];
        while go_on() {
            if let Some(question) = self.clock.poll(monotonic_ns()) {
                send(&self.stream, &question)?;
            }
            let Some(read) = read(&self.stream, &mut buffer)? else {
                continue;
            };
            if read == 0 {
                return Ok(());
            }
            let mut rest = &buffer[..read];
            while !rest.is_empty() {
                let taken = self.decoder.push(rest);
                rest = &rest[taken..];
                while let Some((kind, payload)) = self.decoder.next_frame() {
                    match AgentMessage::decode(kind, payload) {
                        Ok(AgentMessage::Trouble { text } | AgentMessage::GateRefused { text }) => {
                            trouble(printable(text));
                        }
                        Ok(message) => {
                            if let Some(whole) = self.collector.take(&message) {
                                report(Reported::Whole(whole));
                            }
                            if let Some(order) = self.order.take(&message) {
                                report(Reported::Order(order));
                            }
                            if self.clock.take(&message, monotonic_ns()) {
                                report(Reported::Clock(self.clock.known()));
                            }
                        }
                        Err(error) => {
                            tracing::debug!(session = self.session, %error, "agent's message");
                        }
                    }
                }
            }
            report(Reported::Part(&self.collector.report().ranges));
        }
        Ok(())
    }
}
