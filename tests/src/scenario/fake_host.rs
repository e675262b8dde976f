//! The host's end of an agent's channel, for tests that say what a host would not.

use crate::{Error, Result};
use std::collections::VecDeque;
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};
use transhume_protocol::agent::{
    AgentMessage, Decoder, FrameList, FrameRun, FrameRunEncoder, GateCounts, HostMessage,
    MAX_FRAME_LEN, VERSION,
};

/// Bounds what is waited for: the guest may be behind its own gate.
const PATIENCE: Duration = Duration::from_secs(30);
const TICK: Duration = Duration::from_millis(5);

/// What an agent says of its gate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Said {
    Hello(u64),
    Ready,
    Refused(String),
    Wanted(Vec<FrameRun>),
    Over(GateCounts),
    /// The number of a question, and ns since 1970.
    Clock(u64, u64),
}

/// A host.
pub(super) struct FakeHost {
    stream: UnixStream,
    decoder: Box<Decoder>,
    said: VecDeque<Said>,
}

const CHANNEL: &str = "use the agent's channel";

/// A message as bytes.
pub(super) fn bytes(message: &HostMessage<'_>) -> Vec<u8> {
    let mut out = vec![0; MAX_FRAME_LEN];
    // Any message fits.
    let length = message.encode(&mut out).unwrap_or_default();
    out.truncate(length);
    out
}

/// Lists of runs, as many messages as it takes.
pub(super) fn lists(list: FrameList, runs: &[FrameRun]) -> Vec<Vec<u8>> {
    let mut messages = Vec::new();
    let mut runs = runs.iter().filter(|run| run.pages > 0).peekable();
    while runs.peek().is_some() {
        let mut out = vec![0; MAX_FRAME_LEN];
        let mut message = FrameRunEncoder::new(&mut out, list);
        while runs.next_if(|run| message.add(**run)).is_some() {}
        let length = message.finish().unwrap_or_default();
        out.truncate(length);
        messages.push(out);
    }
    messages
}

impl FakeHost {
    pub(super) fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).map_err(Error::system(CHANNEL))?;
        stream
            .set_read_timeout(Some(TICK))
            .map_err(Error::system(CHANNEL))?;
        stream
            .set_write_timeout(Some(PATIENCE))
            .map_err(Error::system(CHANNEL))?;
        Ok(Self {
            stream,
            decoder: Box::new(Decoder::new()),
            said: VecDeque::new(),
        })
    }

    /// Says that it is there, and waits until it is heard.
    pub(super) fn hello(&mut self, session: u64) -> Result<()> {
        self.say(&HostMessage::Hello {
            oldest: VERSION,
            newest: VERSION,
            session,
        })?;
        self.wait_for("a hello", |said| *said == Said::Hello(session))
            .map(drop)
    }

    /// Opens a gate; whether there is one.
    pub(super) fn open_gate(&mut self, frames: u64) -> Result<bool> {
        self.say(&HostMessage::GateOpen { frames })?;
        let is_answer = |said: &Said| matches!(said, Said::Ready | Said::Refused(_));
        let what = format!("an answer to a gate for {frames} frames");
        let said = self.wait_for(&what, is_answer)?;
        Ok(said == Said::Ready)
    }

    pub(super) fn say(&mut self, message: &HostMessage<'_>) -> Result<()> {
        self.write(&bytes(message))
    }

    pub(super) fn list(&mut self, list: FrameList, runs: &[FrameRun]) -> Result<()> {
        for message in lists(list, runs) {
            self.write(&message)?;
        }
        Ok(())
    }

    /// Any bytes.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).map_err(Error::system(CHANNEL))
    }

    /// What was said since, waited for a moment at most.
    pub(super) fn hear(&mut self) -> Result<Vec<Said>> {
        self.read()?;
        Ok(self.said.drain(..).collect())
    }

    /// Waits for a word; those before it are dropped.
    pub(super) fn wait_for(&mut self, what: &str, is: impl Fn(&Said) -> bool) -> Result<Said> {
        let begun = Instant::now();
        loop {
            while let Some(said) = self.said.pop_front() {
                if is(&said) {
                    return Ok(said);
                }
            }
            if begun.elapsed() > PATIENCE {
                return Err(Error::Late {
                    what: format!("{what} from the agent"),
                    seconds: PATIENCE.as_secs(),
                    hint: "Look at serial.log in the run's folder".into(),
                });
            }
            crate::cleanup::still_time()?;
            self.read()?;
        }
    }

    fn read(&mut self) -> Result<()> {
        let mut buffer = [0; 4096];
        let read = match self.stream.read(&mut buffer) {
            Ok(0) => return Err(Error::system(CHANNEL)(ErrorKind::UnexpectedEof)),
            Ok(read) => read,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                return Ok(());
            }
            Err(error) => return Err(Error::system(CHANNEL)(error)),
        };
        let mut rest = &buffer[..read];
        while !rest.is_empty() {
            let taken = self.decoder.push(rest);
            rest = &rest[taken..];
            while let Some((kind, payload)) = self.decoder.next_frame() {
                let said = match AgentMessage::decode(kind, payload) {
                    Ok(AgentMessage::Hello { session, .. }) => Said::Hello(session),
                    Ok(AgentMessage::GateReady) => Said::Ready,
                    Ok(AgentMessage::GateRefused { text }) => Said::Refused(text.to_owned()),
                    Ok(AgentMessage::GateWanted(runs)) => {
                        Said::Wanted(runs.iter().map_while(Result::ok).collect())
                    }
                    Ok(AgentMessage::GateOver(counts)) => Said::Over(counts),
                    Ok(AgentMessage::Clock { number, real_ns }) => Said::Clock(number, real_ns),
                    _ => continue,
                };
                self.said.push_back(said);
            }
        }
        Ok(())
    }
}
