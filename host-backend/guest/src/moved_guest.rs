//! What the agent is told when a migration is over: that no memory is absent, and by how much its clock is to go forward,
//! which stood still. The host that the VM left may have had it get ready for a move by post-copy.
//!
//! In post-copy whoever keeps the gate talks to the agent.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use transhume_protocol::agent::ClockOutcome;

use crate::{ClockNote, ClockSet, ClockSetter, Known, open, unusable};

/// How long the agent may take to answer.
const TIMEOUT: Duration = Duration::from_secs(2);
/// How long it may take to set its clock.
const CLOCK_TIMEOUT: Duration = Duration::from_secs(5);
/// Between two tries to set a clock right, and how many there are: a guest that has just arrived may be slow to answer, and
/// a migration that begins meanwhile speaks with the agent itself.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);
const MAX_TRIES: u32 = 60;
/// Those of them that end without a word about the clock: then the agent knows of none.
const MAX_WITHOUT_A_CLOCK: u32 = 5;

/// A guest that moves, as far as its agent hears of it afterwards.
#[derive(Clone)]
pub struct MovedGuest {
    /// The VM's name.
    pub vm: String,
    /// The host's end of the agent's channel, if there is one.
    pub socket: Option<PathBuf>,
    /// Where its clock is noted until it is right.
    pub note: PathBuf,
    /// Whether the VM is not here any more.
    pub is_gone: Arc<dyn Fn() -> bool + Send + Sync>,
}

impl MovedGuest {
    fn note(&self) -> ClockNote {
        ClockNote::new(self.note.clone())
    }

    /// Notes how far the guest's clock is to be ahead of this host's, before the guest stands still or runs here. It stays
    /// noted until the clock is right; [`MovedGuest::set_clock_right`] sees to that.
    pub fn note_clock(&self, clock: Option<Known>) {
        if let Some(clock) = clock
            && let Err(error) = self.note().write(clock)
        {
            tracing::warn!(vm = self.vm, %error, "the guest's clock cannot be noted: if transhumed ends now, the clock loses the pause");
        }
    }

    /// What is noted of a guest's clock that is not right yet.
    pub fn noted_clock(&self) -> Option<Known> {
        self.note().read()
    }

    /// Begins to tell it that no memory is absent, and to set its clock right, once the VM runs here. Nothing waits for it.
    /// `clock`: how far the guest's would be ahead of this host's, had it not stood still.
    pub fn greet(self, clock: Option<Known>) {
        self.note_clock(clock);
        spawn(move || {
            if self.noted_clock().is_some() {
                return self.until_right();
            }
            let told = self.socket.as_ref().map(|socket| tell(socket, None));
            if let Some(Err(reason)) = told {
                tracing::debug!(vm = self.vm, reason, "the agent was told nothing");
            }
        });
    }

    /// Begins to set a guest's clock right if that is still to be done, as where the daemon ended meanwhile.
    pub fn set_clock_right(self) {
        if self.noted_clock().is_some() {
            spawn(move || self.until_right());
        }
    }

    /// Tries until the clock is right, or somebody else has seen to it, or the VM is gone.
    fn until_right(&self) {
        let (note, vm) = (self.note(), &self.vm);
        let Some(socket) = &self.socket else {
            return note.forget();
        };
        let (mut why, mut without_a_clock) = (String::new(), 0);
        for _ in 0..MAX_TRIES {
            let Some(clock) = note.read() else {
                return;
            };
            if (self.is_gone)() {
                return;
            }
            match tell(socket, Some(clock)) {
                Ok(Some(set)) => return self.clock_was_set(set),
                Ok(None) if without_a_clock == MAX_WITHOUT_A_CLOCK => break,
                Ok(None) => {
                    without_a_clock += 1;
                    "the agent does not tell its clock".clone_into(&mut why);
                }
                Err(reason) => {
                    if reason != why {
                        tracing::info!(
                            vm,
                            reason,
                            "the guest's clock is not set right yet: it is tried again"
                        );
                    }
                    why = reason;
                }
            }
            std::thread::sleep(RETRY_INTERVAL);
        }
        tracing::warn!(
            vm,
            reason = why,
            "the guest's clock is not set right: it lost the time for which it stood still"
        );
        note.forget();
    }

    /// Logs what became of a guest's clock, about which nothing more is to be done.
    pub fn clock_was_set(&self, set: ClockSet) {
        self.note().forget();
        log(&self.vm, set);
    }
}

fn spawn(work: impl FnOnce() + Send + 'static) {
    if let Err(error) = transhume_base::task::thread("relay-greet", work) {
        tracing::warn!(%error, "a thread that speaks with a guest's agent cannot be started");
    }
}

fn log(vm: &str, set: ClockSet) {
    let ms = |ns: f64| (ns / 1e4).round() / 100.0;
    let (by_ms, within_ms) = (ms(set.by_ns as f64), ms(set.within_ns as f64));
    let became = match set.outcome {
        None => return tracing::debug!(vm, by_ms, within_ms, "the guest's clock is right"),
        Some(ClockOutcome::Stepped) => "the guest's clock stood still, and was set right",
        Some(ClockOutcome::Slewed) => {
            "the guest's clock stood still, and goes slowly to what is right"
        }
        Some(ClockOutcome::Kept) => {
            "the guest's clock stood still; a time daemon keeps it, and will set it right"
        }
        Some(ClockOutcome::LeftAlone) => {
            "the guest's clock stood still, and is left so, as the guest's administrator wants"
        }
        Some(ClockOutcome::Failed) => {
            "the guest's clock stood still, and its agent cannot set it: its log says why"
        }
    };
    tracing::info!(vm, by_ms, within_ms, "{became}");
}

/// Tells it, and returns what became of the clock, if there is something to be done about it.
fn tell(socket: &Path, clock: Option<Known>) -> Result<Option<ClockSet>, String> {
    let mut session = [0; 8];
    getrandom::fill(&mut session).map_err(|error| error.to_string())?;
    let opening = open(socket, u64::from_ne_bytes(session), TIMEOUT)?;
    opening.no_gate().map_err(unusable)?;
    // Its answer shows that it has read all that was said.
    let (mut agent, _) = opening.agreed(Vec::new(), TIMEOUT)?;
    let Some(clock) = clock else {
        return Ok(None);
    };
    agent.set_clock(ClockSetter::new(clock), CLOCK_TIMEOUT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Lead;
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::{UnixListener, UnixStream};
    use transhume_protocol::agent::{AgentMessage, Decoder, HostMessage, ReportSource, VERSION};

    fn say(stream: &mut UnixStream, message: &AgentMessage<'_>) {
        let mut out = [0; 256];
        let length = message.encode(&mut out).expect("it fits");
        stream.write_all(&out[..length]).expect("a host");
    }

    /// What an agent hears, and what becomes of its clock, which is 1,000 s ahead of the host's.
    fn told(clock: Option<Known>, has_clock: bool) -> (Vec<&'static str>, Option<ClockSet>) {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("agent");
        let listener = UnixListener::bind(&socket).expect("a socket");
        let agent = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a host");
            let (mut decoder, mut byte, mut heard) = (Decoder::new(), [0], Vec::new());
            while stream.read(&mut byte).expect("a host") == 1 {
                assert_eq!(decoder.push(&byte), 1);
                let Some((kind, payload)) = decoder.next_frame() else {
                    continue;
                };
                match HostMessage::decode(kind, payload).expect("a message") {
                    HostMessage::Hello { session, .. } => {
                        heard.push("hello");
                        let hello = AgentMessage::Hello {
                            version: VERSION,
                            session,
                            source: ReportSource::Module,
                            page_shift: 12,
                            agent: "fake",
                        };
                        say(&mut stream, &hello);
                    }
                    HostMessage::GateClose => heard.push("close"),
                    HostMessage::ClockWanted { .. } if !has_clock => {}
                    HostMessage::ClockWanted { number } => {
                        let real_ns = crate::monotonic_ns() + 1_000_000_000_000;
                        say(&mut stream, &AgentMessage::Clock { number, real_ns });
                    }
                    HostMessage::ClockAdjust { by_ns } => {
                        // Half a second, as well as it is known.
                        assert!(by_ns.abs_diff(500_000_000) < 400_000_000, "{by_ns}");
                        heard.push("clock");
                        let outcome = ClockOutcome::Slewed;
                        say(&mut stream, &AgentMessage::ClockAdjusted(outcome));
                    }
                    other => panic!("{other:?}"),
                }
            }
            heard
        });
        let set = tell(&socket, clock).expect("an agent");
        (agent.join().expect("no panic"), set)
    }

    #[test]
    fn an_agent_that_has_arrived_hears_that_nothing_is_absent() {
        assert_eq!(told(None, true), (vec!["hello", "close"], None));
    }

    #[test]
    fn a_clock_that_stood_still_is_set() {
        let expected = Lead {
            ahead_ns: 1_000_500_000_000,
            within_ns: 1000,
        };
        let (heard, set) = told(Some(Known::new(expected, crate::monotonic_ns())), true);
        assert_eq!(heard, ["hello", "close", "clock"]);
        let set = set.expect("what became of it");
        assert_eq!(set.outcome, Some(ClockOutcome::Slewed));
        assert!(set.by_ns.abs_diff(500_000_000) <= set.within_ns, "{set:?}");
    }

    #[test]
    fn an_agent_without_a_clock_is_let_go() {
        let lead = Lead {
            ahead_ns: 1,
            within_ns: 1,
        };
        let expected = Known::new(lead, crate::monotonic_ns());
        let (heard, set) = told(Some(expected), false);
        assert_eq!((heard, set), (vec!["hello", "close"], None));
    }
}
