//! Tells the agent what of the guest's memory is absent and what arrives, so that processes sleep and not CPUs.

use std::io::{self, Write as _};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use transhume_protocol::agent::{
    AgentMessage, FrameList, FrameRun, FrameRunEncoder, FrameRuns, GateCounts, HostMessage,
    MAX_FRAME_LEN,
};

use crate::agent::{Agent, Opening, printable, read, send, unusable};
use crate::clock::{ClockSet, ClockSetter, monotonic_ns};

/// How long the agent may leave its channel full.
const WRITE_TIMEOUT: Duration = Duration::from_millis(500);
/// How often it is said that somebody is here.
const ALIVE: Duration = Duration::from_millis(150);
/// How long an agent may take to say what its clock shows. A migration that begins waits no longer for its hello.
const FIRST_ANSWER: Duration = Duration::from_millis(1200);
/// Runs that a guest waits for and that are looked at, of one read.
const MAX_WANTED: usize = 1024;

/// What the agent says of it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct GateNews {
    /// Frames that processes wait for. Nothing a guest says is believed.
    pub wanted: Vec<FrameRun>,
    /// It is over, and that came of it.
    pub over: Option<GateCounts>,
    /// It can be begun: `Ok`, or why not.
    ready: Option<Result<(), String>>,
}

/// Has a guest get ready for a move by post-copy, while its memory is all there: later that takes far longer.
/// The host that it moves to goes on with it.
pub struct Preparation {
    stream: UnixStream,
    frames: u64,
    told: Option<Instant>,
}

impl Preparation {
    /// Says what is to be said now: first that the gate is to be opened, then, a few times a second, that
    /// somebody is here. What cannot be said is left: then the guest is not ready.
    pub fn go_on(&mut self) {
        let said = match self.told {
            None => send(
                &self.stream,
                &HostMessage::GateOpen {
                    frames: self.frames,
                },
            ),
            Some(told) if told.elapsed() < ALIVE => return,
            Some(_) => send(&self.stream, &HostMessage::GateArrived(FrameRuns::NONE)),
        };
        self.told = Some(Instant::now());
        if let Err(error) = said {
            tracing::debug!(%error, "agent's channel");
        }
    }
}

impl Drop for Preparation {
    /// A guest that did not move needs it no more; one that moved is told by its new host. If neither can be said,
    /// silence ends it.
    fn drop(&mut self) {
        if self.told.is_some() {
            let _ = send(&self.stream, &HostMessage::GateClose);
        }
    }
}

impl Opening {
    /// Asks for a gate below a page frame number, names absent frames, and has the agent put whoever touches them
    /// to sleep. It need not run yet: it finds all of it when it does.
    ///
    /// # Errors
    /// If the agent does not read its channel.
    pub fn gate(&self, frames: u64, absent: &[FrameRun]) -> io::Result<()> {
        ask(&self.stream, frames, absent)
    }

    /// Says that nothing is absent: a gate that another host has had it prepare is over. An agent without one says
    /// nothing.
    ///
    /// # Errors
    /// If the agent does not read its channel.
    pub fn no_gate(&self) -> io::Result<()> {
        send(&self.stream, &HostMessage::GateClose)
    }
}

fn ask(stream: &UnixStream, frames: u64, absent: &[FrameRun]) -> io::Result<()> {
    send(stream, &HostMessage::GateOpen { frames })?;
    send_frames(stream, FrameList::Absent, absent)?;
    send(stream, &HostMessage::GateWalk)
}

fn send_frames(mut stream: &UnixStream, list: FrameList, runs: &[FrameRun]) -> io::Result<()> {
    let mut out = vec![0; MAX_FRAME_LEN];
    let mut runs = runs.iter().peekable();
    while runs.peek().is_some() {
        let mut message = FrameRunEncoder::new(&mut out, list);
        // An empty message has room for any run.
        while let Some(run) = runs.next_if(|run| message.add(**run)) {
            debug_assert!(run.pages > 0, "a run without pages");
        }
        let length = message.finish().map_err(io::Error::other)?;
        stream.write_all(&out[..length])?;
    }
    Ok(())
}

impl Agent {
    /// Begins to have the guest get ready; see [`Preparation`].
    ///
    /// # Errors
    /// If the channel cannot be used.
    pub fn prepare_gate(&self, frames: u64) -> io::Result<Preparation> {
        Ok(Preparation {
            stream: self.stream.try_clone()?,
            frames,
            told: None,
        })
    }

    /// The same as [`Opening::gate`], after a gate that is over.
    ///
    /// # Errors
    /// If the agent does not read its channel.
    pub fn gate(&self, frames: u64, absent: &[FrameRun]) -> io::Result<()> {
        ask(&self.stream, frames, absent)
    }

    /// Waits for the gate that was asked for, for `patience` at most.
    ///
    /// # Errors
    /// Why there is none, for people.
    pub fn gate_opened(&mut self, patience: Duration) -> Result<(), String> {
        let deadline = Instant::now() + patience;
        self.stream
            .set_write_timeout(Some(WRITE_TIMEOUT))
            .map_err(unusable)?;
        while Instant::now() < deadline {
            if let Some(ready) = self.gate_news().map_err(unusable)?.ready {
                return ready;
            }
        }
        Err("the guest's agent does not answer; it may be an older one".to_owned())
    }

    /// From now on sets the guest's clock right while the agent is listened to; see [`Self::take_clock_set`].
    pub fn begin_clock(&mut self, setter: ClockSetter) {
        self.setter = Some(setter);
    }

    /// Sets the guest's clock right; what became of it, or `None` if the agent knows of no clock.
    ///
    /// # Errors
    /// If the channel cannot be used, for people.
    pub fn set_clock(
        &mut self,
        setter: ClockSetter,
        patience: Duration,
    ) -> Result<Option<ClockSet>, String> {
        let begun = Instant::now();
        self.begin_clock(setter);
        while self.clock_set.is_none() {
            self.gate_news().map_err(unusable)?;
            // Others want the channel, and an agent that knows of no clock never answers.
            let has_heard = self.setter.as_ref().is_some_and(ClockSetter::has_heard);
            let bearable = if has_heard { patience } else { FIRST_ANSWER };
            if begun.elapsed() > bearable {
                break;
            }
        }
        Ok(self.take_clock_set())
    }

    /// What became of the guest's clock, once.
    pub fn take_clock_set(&mut self) -> Option<ClockSet> {
        self.clock_set.take()
    }

    /// Says what has arrived.
    ///
    /// # Errors
    /// If the agent does not read its channel.
    pub fn name_arrived(&mut self, runs: &[FrameRun]) -> io::Result<()> {
        send_frames(&self.stream, FrameList::Arrived, runs)
    }

    /// Says that somebody is here, as has to be said each second.
    ///
    /// # Errors
    /// If the agent does not read its channel.
    pub fn stay(&mut self) -> io::Result<()> {
        send(&self.stream, &HostMessage::GateArrived(FrameRuns::NONE))
    }

    /// Ends it; what came of it, if the agent says so in time.
    ///
    /// # Errors
    /// If the channel cannot be used.
    pub fn close_gate(&mut self, patience: Duration) -> io::Result<Option<GateCounts>> {
        let deadline = Instant::now() + patience;
        send(&self.stream, &HostMessage::GateClose)?;
        while Instant::now() < deadline {
            let news = self.gate_news()?;
            if news.over.is_some() {
                return Ok(news.over);
            }
        }
        Ok(None)
    }

    /// Waits this long for news at most.
    ///
    /// # Errors
    /// If the channel cannot be used.
    pub fn set_tick(&mut self, tick: Duration) -> io::Result<()> {
        self.stream.set_read_timeout(Some(tick))
    }

    /// What the agent has said, or nothing when a tick has passed.
    ///
    /// # Errors
    /// If the channel cannot be used, or was closed.
    pub fn gate_news(&mut self) -> io::Result<GateNews> {
        let mut news = GateNews::default();
        if let Some(said) = self
            .setter
            .as_mut()
            .and_then(|setter| setter.poll(monotonic_ns()))
        {
            send(&self.stream, &said)?;
        }
        // It may have come with the session.
        self.take_news(&mut news);
        if news != GateNews::default() {
            return Ok(news);
        }
        let mut buffer = [0; 4096];
        let Some(read) = read(&self.stream, &mut buffer)? else {
            return Ok(news);
        };
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut rest = &buffer[..read];
        while !rest.is_empty() {
            let taken = self.decoder.push(rest);
            rest = &rest[taken..];
            self.take_news(&mut news);
        }
        Ok(news)
    }

    fn take_news(&mut self, news: &mut GateNews) {
        while let Some((kind, payload)) = self.decoder.next_frame() {
            match AgentMessage::decode(kind, payload) {
                Ok(AgentMessage::GateReady) => news.ready = Some(Ok(())),
                Ok(AgentMessage::GateRefused { text }) => {
                    let text = format!("the guest's agent says: {}", printable(text));
                    news.ready = Some(Err(text));
                }
                Ok(AgentMessage::GateWanted(runs)) => {
                    let room = MAX_WANTED.saturating_sub(news.wanted.len());
                    let runs = runs.iter().map_while(Result::ok);
                    news.wanted.extend(runs.take(room));
                }
                Ok(AgentMessage::GateOver(counts)) => news.over = Some(counts),
                Ok(message) => {
                    if let Some(setter) = &mut self.setter {
                        setter.take(&message, monotonic_ns());
                    }
                }
                Err(_) => {}
            }
        }
        let set = self.setter.as_mut().and_then(ClockSetter::take_done);
        self.clock_set = self.clock_set.or(set);
    }
}
