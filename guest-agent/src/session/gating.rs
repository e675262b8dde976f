//! The part of a session that is about absent memory.

use super::{Action, sent};
use crate::gate::Gate;
use crate::text::Text;
use core::fmt::Write as _;
use core::time::Duration;
use transhume_protocol::agent::{AgentMessage, FrameList, FrameRun, FrameRunEncoder, HostMessage};

/// How long a gate behind which nobody sleeps stays open without a word of the host, which says several times a second
/// that it is there. The guest's clock stands still while it moves, so the pause of a move is no silence.
const UNUSED_TIMEOUT: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Off,
    /// Open for a host that is there no more, and that had named nothing: the next one goes on with it, as when
    /// the guest was prepared for its move by the host that it left.
    Left,
    /// The host is to be told why not.
    Refused,
    /// Nothing was named yet.
    Prepared,
    /// Absent frames are being named.
    Naming,
    Walking,
    /// Frames arrive.
    Open,
    /// The host wants an end.
    Closing,
}

impl Stage {
    /// A gate is open, and nobody sleeps behind it: no process was walked.
    const fn is_unused(self) -> bool {
        matches!(self, Self::Left | Self::Prepared | Self::Naming)
    }
}

/// How far it is.
pub(super) struct Gating {
    stage: Stage,
    /// The host is to be told that it is open. It may go on before it knows.
    announces: bool,
    reason: Text,
    /// Frames that are wanted and did not go into the last message.
    held: Option<FrameRun>,
    /// When the host was heard last; `None` if that was since the last poll.
    heard_at: Option<Duration>,
}

impl Gating {
    pub(super) const fn new() -> Self {
        Self {
            stage: Stage::Off,
            announces: false,
            reason: Text::new(),
            held: None,
            heard_at: None,
        }
    }

    /// The host, or the channel, is another one.
    pub(super) fn forget(&mut self, gate: &mut impl Gate) {
        if self.stage != Stage::Off {
            gate.close();
        }
        self.stage = Stage::Off;
        self.announces = false;
        self.held = None;
    }

    /// The host has left, or takes nothing: a gate behind which nobody sleeps is closed. Any other ends by the
    /// module's rule.
    pub(super) fn give_up_unused(&mut self, gate: &mut impl Gate) {
        if self.stage.is_unused() {
            self.forget(gate);
        }
    }

    /// When a gate behind which nobody sleeps is to be closed for want of a word.
    pub(super) fn silent_at(&self) -> Option<Duration> {
        let heard_at = self.heard_at.filter(|_| self.stage.is_unused())?;
        Some(heard_at.saturating_add(UNUSED_TIMEOUT))
    }

    /// Another host has come.
    pub(super) fn change_host(&mut self, gate: &mut impl Gate) {
        self.heard_at = None;
        if matches!(self.stage, Stage::Left | Stage::Prepared) {
            self.stage = Stage::Left;
            self.announces = false;
        } else {
            self.forget(gate);
        }
    }

    /// Lets everybody go who waits, and tells the host.
    pub(super) fn end(&mut self) {
        if matches!(self.stage, Stage::Naming | Stage::Walking | Stage::Open) {
            self.stage = Stage::Closing;
        }
    }

    /// Takes a message of a host with an open session, if it is about this.
    pub(super) fn obey(&mut self, message: HostMessage<'_>, gate: &mut impl Gate) {
        self.heard_at = None;
        match (message, self.stage) {
            (HostMessage::GateOpen { frames }, _) => {
                self.held = None;
                let opened = gate.open(frames);
                self.announces = opened.is_ok();
                self.stage = match opened {
                    Ok(()) => Stage::Prepared,
                    Err(error) => {
                        self.reason.clear();
                        let _ = write!(self.reason, "{error}");
                        Stage::Refused
                    }
                };
            }
            (HostMessage::GateAbsent(runs), Stage::Prepared | Stage::Naming) => {
                self.stage = Stage::Naming;
                gate.absent(runs);
            }
            (HostMessage::GateWalk, Stage::Prepared | Stage::Naming) => {
                self.stage = Stage::Walking;
            }
            (
                HostMessage::GateArrived(runs),
                Stage::Prepared | Stage::Naming | Stage::Walking | Stage::Open,
            ) => gate.arrived(runs),
            (HostMessage::GateClose, stage) if stage != Stage::Off => self.stage = Stage::Closing,
            _ => {}
        }
    }

    /// What there is to say or to do; `None` if nothing.
    pub(super) fn poll(
        &mut self,
        gate: &mut impl Gate,
        now: Duration,
        out: &mut [u8],
    ) -> Option<Action> {
        self.heard_at.get_or_insert(now);
        if self.silent_at().is_some_and(|at| now >= at) {
            self.give_up_unused(gate);
        }
        if core::mem::take(&mut self.announces) {
            return Some(sent(AgentMessage::GateReady.encode(out)));
        }
        match self.stage {
            Stage::Off => None,
            Stage::Left => {
                if !gate.is_open() {
                    self.forget(gate);
                }
                None
            }
            Stage::Refused => {
                self.stage = Stage::Off;
                let text = self.reason.as_str();
                Some(sent(AgentMessage::GateRefused { text }.encode(out)))
            }
            Stage::Prepared | Stage::Naming | Stage::Walking | Stage::Open if gate.is_open() => {
                if let Some(action) = self.tell_wanted(gate, out) {
                    return Some(action);
                }
                if self.stage != Stage::Walking {
                    return None;
                }
                if !gate.walk() {
                    self.stage = Stage::Open;
                }
                // Somebody may wait already, and frames may have arrived.
                Some(Action::Wait(Duration::ZERO))
            }
            Stage::Prepared | Stage::Naming | Stage::Walking | Stage::Open | Stage::Closing => {
                self.stage = Stage::Off;
                self.held = None;
                let counts = gate.close();
                Some(sent(AgentMessage::GateOver(counts).encode(out)))
            }
        }
    }

    fn tell_wanted(&mut self, gate: &mut impl Gate, out: &mut [u8]) -> Option<Action> {
        let mut run = self.held.take().or_else(|| gate.wanted())?;
        let mut message = FrameRunEncoder::new(out, FrameList::Wanted);
        loop {
            if run.pages > 0 && !message.add(run) {
                self.held = (!message.is_empty()).then_some(run);
                break;
            }
            match gate.wanted() {
                Some(next) => run = next,
                None => break,
            }
        }
        Some(sent(message.finish()))
    }
}

#[cfg(test)]
mod tests;
