//! The agent's side of the channel, without I/O.

use crate::cache::{PageCache, Step};
use crate::classes::{Classes, NoClasses};
use crate::clock::{Clock, NoClock};
use crate::gate::{Gate, NoGate};
use crate::pace::Pace;
use crate::text::Text;
use core::fmt::Write as _;
use core::time::Duration;
use gating::Gating;
use naming::Naming;
use timing::Timing;
use transhume_protocol::agent::{
    AgentMessage, Decoder, Encoded, HostMessage, Range, RangeEncoder, VERSION,
};

mod gating;
mod naming;
mod timing;

/// Pause after a walk that failed, before the next try.
const AFTER_FAILURE: Duration = Duration::from_secs(1);

/// Steps that find nothing, before input is looked at again.
const TIMEOUT: u32 = 64;

/// What the caller of [`Session::poll`] does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Write this many bytes from the start of the buffer, then poll again.
    Send(usize),
    /// Poll again after this time, or when input comes.
    Wait(Duration),
    /// Poll again when input comes.
    Idle,
}

impl Action {
    fn no_later_than(self, rest: Duration) -> Self {
        match self {
            Self::Send(length) => Self::Send(length),
            Self::Wait(pause) => Self::Wait(pause.min(rest)),
            Self::Idle => Self::Wait(rest),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Channel {
    /// No host has opened a session, or its versions were refused.
    Closed,
    /// The host's hello is to be answered.
    Greeting { session: u64 },
    /// The host's versions are to be refused.
    Refusing { oldest: u16, newest: u16 },
    /// Open.
    Open,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Report {
    Off,
    /// The next report begins at this time, if one is given, or else now.
    Due(Option<Duration>),
    /// Disks are being named, from this number on.
    Disks(u16),
    Opening,
    Walking,
    Closing,
}

/// Cost of the report that is being made.
#[derive(Debug, Clone, Copy)]
struct Cost {
    began: Duration,
    cpu: Duration,
    pages: u64,
}

impl Cost {
    const NONE: Self = Self {
        began: Duration::ZERO,
        cpu: Duration::ZERO,
        pages: 0,
    };
}

/// A session with a host, for as long as the channel exists.
///
/// [`Self::receive`] takes what the host sends, cut anyhow; [`Self::poll`] gives one frame at a
/// time. A host that opens a new session replaces the one before.
pub struct Session {
    agent: &'static str,
    decoder: Decoder,
    channel: Channel,
    report: Report,
    pace: Pace,
    /// Number of the report that is being made, or of the last.
    epoch: u32,
    cost: Cost,
    /// A range that did not go into the last frame: it was full, or of another disk.
    held: Option<(u16, Range)>,
    /// A walk is open that nobody waits for any more.
    abandoned: bool,
    trouble: Text,
    gating: Gating,
    naming: Naming,
    timing: Timing,
}

impl Session {
    /// A session that waits for a host. `agent` is the agent's name and version, for people.
    pub const fn new(agent: &'static str) -> Self {
        Self {
            agent,
            decoder: Decoder::new(),
            channel: Channel::Closed,
            report: Report::Off,
            pace: Pace::NONE,
            epoch: 0,
            cost: Cost::NONE,
            held: None,
            abandoned: false,
            trouble: Text::new(),
            gating: Gating::new(),
            naming: Naming::new(),
            timing: Timing::new(),
        }
    }

    /// Forgets the host, as when the channel was closed.
    pub fn reset(&mut self, gate: &mut impl Gate) {
        self.gating.forget(gate);
        self.naming.forget();
        self.timing.forget();
        self.decoder.reset();
        self.channel = Channel::Closed;
        self.stop();
        self.epoch = 0;
        self.trouble.clear();
    }

    /// Gives up the walk that is under way, as when the host has not taken anything for long: a walk
    /// may hold something of the guest's, and so does a gate behind which nobody sleeps. The report begins anew with the next
    /// [`Self::poll`].
    pub fn interrupt<C: PageCache>(&mut self, cache: &mut C, gate: &mut impl Gate) {
        self.gating.give_up_unused(gate);
        let was_reporting = self.is_reporting();
        self.stop();
        if was_reporting {
            self.report = Report::Due(None);
        }
        self.abandoned = false;
        cache.end();
    }

    /// Whether the host wants reports.
    pub fn is_reporting(&self) -> bool {
        self.report != Report::Off
    }

    /// Takes bytes from the host of a guest that cannot put its processes to sleep.
    pub fn receive(&mut self, bytes: &[u8]) {
        self.receive_for(&mut NoGate, bytes);
    }

    /// Takes bytes from the host. What is no frame or no message is ignored.
    pub fn receive_for(&mut self, gate: &mut impl Gate, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let taken = self.decoder.push(bytes);
            bytes = &bytes[taken..];
            self.take_frames(gate);
        }
    }

    /// Whether the host stopped in the midst of a frame, so far.
    pub fn is_mid_frame(&self) -> bool {
        self.decoder.is_mid_frame()
    }

    /// The frame that the host began will never end. What it said of absent memory may be lost with it, so nobody
    /// waits any longer for memory to arrive. What was received behind its beginning counts.
    pub fn give_up_frame(&mut self, gate: &mut impl Gate) {
        self.gating.end();
        self.decoder.give_up_frame();
        self.take_frames(gate);
    }

    fn take_frames(&mut self, gate: &mut impl Gate) {
        while let Some((kind, payload)) = self.decoder.next_frame() {
            let Ok(message) = HostMessage::decode(kind, payload) else {
                continue;
            };
            if matches!(message, HostMessage::Hello { .. }) {
                self.gating.change_host(gate);
                self.naming.forget();
                self.timing.forget();
            } else if matches!(self.channel, Channel::Open | Channel::Greeting { .. }) {
                self.gating.obey(message, gate);
                self.naming.obey(message);
                self.timing.obey(message);
            }
            if let Some(message) = without_runs(message) {
                self.obey(message);
            }
        }
    }

    fn obey(&mut self, message: HostMessage<'static>) {
        match message {
            HostMessage::Hello {
                oldest,
                newest,
                session,
            } => {
                self.stop();
                self.epoch = 0;
                self.trouble.clear();
                self.channel = if (oldest..=newest).contains(&VERSION) {
                    Channel::Greeting { session }
                } else {
                    Channel::Refusing { oldest, newest }
                };
            }
            HostMessage::ReportStart {
                interval_ms,
                cpu_permille,
            } if matches!(self.channel, Channel::Open | Channel::Greeting { .. }) => {
                self.pace = Pace::new(interval_ms, cpu_permille);
                // A report that is under way goes on at the new pace.
                if matches!(self.report, Report::Off | Report::Due(_)) {
                    self.report = Report::Due(None);
                }
            }
            HostMessage::ReportStop => self.stop(),
            _ => {}
        }
    }

    fn stop(&mut self) {
        if !matches!(self.report, Report::Off | Report::Due(_)) {
            self.abandoned = true;
        }
        self.report = Report::Off;
        self.held = None;
    }

    /// [`Self::poll_for`] a guest that can neither put its processes to sleep nor tell classes of its memory, and has no
    /// clock.
    pub fn poll<C: PageCache>(&mut self, cache: &mut C, now: Duration, out: &mut [u8]) -> Action {
        self.poll_for(cache, &mut NoGate, &mut NoClasses, &mut NoClock, now, out)
    }

    /// What to do now. `now` is the time since a moment that stays the same; `out` should hold
    /// [`MAX_FRAME_LEN`](transhume_protocol::agent::MAX_FRAME_LEN) bytes.
    pub fn poll_for<C: PageCache>(
        &mut self,
        cache: &mut C,
        gate: &mut impl Gate,
        classes: &mut impl Classes,
        clock: &mut impl Clock,
        now: Duration,
        out: &mut [u8],
    ) -> Action {
        if core::mem::take(&mut self.abandoned) {
            cache.end();
        }
        let message = match self.channel {
            Channel::Closed => return Action::Idle,
            Channel::Refusing { oldest, newest } => {
                self.gating.forget(gate);
                self.channel = Channel::Closed;
                let _ = write!(
                    self.trouble,
                    "the host speaks versions {oldest} to {newest} of the agent channel, {} only \
                     version {VERSION}: update the older of the two",
                    self.agent
                );
                return self.tell(out);
            }
            Channel::Greeting { session } => {
                self.channel = Channel::Open;
                AgentMessage::Hello {
                    version: VERSION,
                    session,
                    source: cache.source(),
                    page_shift: cache.page_shift(),
                    agent: self.agent,
                }
            }
            Channel::Open => {
                if !self.trouble.is_empty() || cache.notice(&mut self.trouble) {
                    return self.tell(out);
                }
                // Each moment that it takes makes the answer worse.
                if let Some(action) = self.timing.poll(clock, out) {
                    return action;
                }
                if let Some(action) = self.gating.poll(gate, now, out) {
                    return action;
                }
                if let Some(action) = self.naming.poll(classes, out) {
                    return action;
                }
                let action = self.go_on(cache, now, out);
                return match self.gating.silent_at() {
                    Some(at) => action.no_later_than(at.saturating_sub(now)),
                    None => action,
                };
            }
        };
        sent(message.encode(out))
    }

    fn tell(&mut self, out: &mut [u8]) -> Action {
        let text = self.trouble.as_str();
        let action = sent(AgentMessage::Trouble { text }.encode(out));
        self.trouble.clear();
        action
    }

    /// Goes on with the report.
    fn go_on<C: PageCache>(&mut self, cache: &mut C, now: Duration, out: &mut [u8]) -> Action {
        match self.report {
            Report::Off => return Action::Idle,
            Report::Due(Some(at)) if at > now => return Action::Wait(at.saturating_sub(now)),
            Report::Walking => {
                let elapsed = now.saturating_sub(self.cost.began);
                if let Some(rest) = self.pace.rest(self.cost.cpu, elapsed) {
                    return Action::Wait(rest);
                }
            }
            _ => {}
        }
        let before = cache.cpu_time();
        let worked = self.work(cache, now, out);
        self.cost.cpu += cache.cpu_time().saturating_sub(before);
        match worked {
            Ok(action) => action,
            Err(error) => {
                cache.end();
                self.held = None;
                self.report = Report::Due(Some(now.saturating_add(AFTER_FAILURE)));
                let _ = write!(
                    self.trouble,
                    "the page cache could not be reported: {error}"
                );
                self.tell(out)
            }
        }
    }

    fn work<C: PageCache>(
        &mut self,
        cache: &mut C,
        now: Duration,
        out: &mut [u8],
    ) -> Result<Action, C::Error> {
        match self.report {
            Report::Off => Ok(Action::Idle),
            Report::Due(_) => {
                self.cost = Cost {
                    began: now,
                    ..Cost::NONE
                };
                cache.begin()?;
                self.epoch = self.epoch.wrapping_add(1).max(1);
                self.report = Report::Disks(0);
                Ok(Action::Wait(Duration::ZERO))
            }
            Report::Disks(index) => {
                let Some(disk) = cache.disk(index) else {
                    self.report = Report::Opening;
                    return Ok(Action::Wait(Duration::ZERO));
                };
                let action = sent(
                    AgentMessage::Disk {
                        index,
                        sectors: disk.sectors,
                        serial: disk.serial,
                        name: disk.name,
                    }
                    .encode(out),
                );
                self.report = index.checked_add(1).map_or(Report::Opening, Report::Disks);
                Ok(action)
            }
            Report::Opening => {
                self.report = Report::Walking;
                let epoch = self.epoch;
                Ok(sent(AgentMessage::EpochBegin { epoch }.encode(out)))
            }
            Report::Walking => self.walk(cache, out),
            Report::Closing => {
                cache.end();
                let elapsed = now.saturating_sub(self.cost.began);
                let pause = self.pace.pause(self.cost.cpu, elapsed);
                self.report = Report::Due(Some(now.saturating_add(pause)));
                Ok(sent(
                    AgentMessage::EpochEnd {
                        epoch: self.epoch,
                        pages: self.cost.pages,
                        cpu_us: u64::try_from(self.cost.cpu.as_micros()).unwrap_or(u64::MAX),
                    }
                    .encode(out),
                ))
            }
        }
    }

    /// Fills one frame with ranges of one disk.
    fn walk<C: PageCache>(&mut self, cache: &mut C, out: &mut [u8]) -> Result<Action, C::Error> {
        let sectors_per_page = 1_u64 << cache.page_shift().saturating_sub(9).min(54);
        let mut patience = TIMEOUT;
        let (disk, first) = loop {
            if let Some(held) = self.held.take() {
                break held;
            }
            match cache.step()? {
                Step::Found { range, .. } if range.pages == 0 => {}
                Step::Found { disk, range } => break (disk, range),
                Step::Pending if patience == 0 => return Ok(Action::Wait(Duration::ZERO)),
                Step::Pending => {}
                Step::Done => {
                    self.report = Report::Closing;
                    return Ok(Action::Wait(Duration::ZERO));
                }
            }
            patience = patience.saturating_sub(1);
        };
        let Ok(mut frame) = RangeEncoder::new(out, disk, sectors_per_page) else {
            return Ok(Action::Idle);
        };
        let mut next = Some(first);
        while let Some(range) = next {
            if !frame.add(range) {
                // An empty frame has room for any range, so this one is not lost in a loop unless
                // the caller's buffer is too short for any.
                if frame.is_empty() {
                    return Ok(Action::Idle);
                }
                self.held = Some((disk, range));
                break;
            }
            self.cost.pages += u64::from(range.pages);
            next = match cache.step()? {
                Step::Found { range, .. } if range.pages == 0 => None,
                Step::Found { disk: same, range } if same == disk => Some(range),
                Step::Found { disk: other, range } => {
                    self.held = Some((other, range));
                    None
                }
                Step::Pending => None,
                Step::Done => {
                    self.report = Report::Closing;
                    None
                }
            };
        }
        Ok(sent(frame.finish()))
    }
}

/// A message that borrows nothing from its frame.
fn without_runs(message: HostMessage<'_>) -> Option<HostMessage<'static>> {
    match message {
        HostMessage::Hello {
            oldest,
            newest,
            session,
        } => Some(HostMessage::Hello {
            oldest,
            newest,
            session,
        }),
        HostMessage::ReportStart {
            interval_ms,
            cpu_permille,
        } => Some(HostMessage::ReportStart {
            interval_ms,
            cpu_permille,
        }),
        HostMessage::ReportStop => Some(HostMessage::ReportStop),
        _ => None,
    }
}

/// A frame that does not fit in the caller's buffer is dropped: the buffer is documented to be
/// long enough, and a session that cannot speak has nothing better to do than to listen.
fn sent(encoded: Encoded) -> Action {
    encoded.map_or(Action::Idle, Action::Send)
}

#[cfg(test)]
mod tests;
