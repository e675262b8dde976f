//! Messages of the agent channel. Integers are little-endian; texts are a length byte and UTF-8.

use super::classes::{ClassCounts, MemoryClass};
use super::fields::{Reader, Writer};
use super::frame::FrameError;
use super::frames::FrameRuns;
use super::ranges::Ranges;
use thiserror::Error;

/// Longest text (serial, name, error) in a message, in bytes.
pub const MAX_TEXT_LEN: usize = 200;

/// Why a frame's payload was not the message that its kind names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum MessageError {
    /// No message has this kind.
    #[error("message kind {0:#04x} is unknown to version {version} of the channel", version = super::VERSION)]
    UnknownKind(u8),
    /// The payload ends before the message does.
    #[error("the message ends early")]
    Short,
    /// Bytes follow the message.
    #[error("{0} bytes follow the message")]
    Trailing(usize),
    /// A text is no UTF-8 or is longer than [`MAX_TEXT_LEN`].
    #[error("a text is not UTF-8 or longer than {MAX_TEXT_LEN} bytes")]
    Text,
    /// A field has a value that its type does not allow.
    #[error("field `{0}` is out of bounds")]
    OutOfBounds(&'static str),
}

pub(super) mod kind {
    pub(super) const HOST_HELLO: u8 = 0x01;
    pub(super) const REPORT_START: u8 = 0x02;
    pub(super) const REPORT_STOP: u8 = 0x03;
    pub(super) const GATE_OPEN: u8 = 0x04;
    pub(in crate::agent) const GATE_ABSENT: u8 = 0x05;
    pub(super) const GATE_WALK: u8 = 0x06;
    pub(in crate::agent) const GATE_ARRIVED: u8 = 0x07;
    pub(super) const GATE_CLOSE: u8 = 0x08;
    pub(super) const WATCH: u8 = 0x09;
    pub(super) const CLASSES_WANTED: u8 = 0x0a;
    pub(super) const CLOCK_WANTED: u8 = 0x0b;
    pub(super) const CLOCK_ADJUST: u8 = 0x0c;
    pub(super) const AGENT_HELLO: u8 = 0x81;
    pub(super) const DISK: u8 = 0x82;
    pub(super) const EPOCH_BEGIN: u8 = 0x83;
    pub(in crate::agent) const RANGES: u8 = 0x84;
    pub(super) const EPOCH_END: u8 = 0x85;
    pub(super) const TROUBLE: u8 = 0x86;
    pub(super) const GATE_READY: u8 = 0x87;
    pub(super) const GATE_REFUSED: u8 = 0x88;
    pub(in crate::agent) const GATE_WANTED: u8 = 0x89;
    pub(super) const GATE_OVER: u8 = 0x8a;
    pub(in crate::agent) const CLASS: u8 = 0x8b;
    pub(super) const CLASSES_END: u8 = 0x8c;
    pub(super) const CLOCK: u8 = 0x8d;
    pub(super) const CLOCK_ADJUSTED: u8 = 0x8e;
}

/// What the host says to the agent. Runs of frames borrow from the frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostMessage<'a> {
    /// Opens a session; the agent forgets what an earlier host wanted.
    Hello {
        /// Lowest version of the channel that the host speaks.
        oldest: u16,
        /// Highest version of the channel that the host speaks.
        newest: u16,
        /// A number of the host's choice, returned by the agent, that tells sessions apart.
        session: u64,
    },
    /// Asks for reports of the page cache until [`Self::ReportStop`].
    ReportStart {
        /// Pause between two reports, in milliseconds.
        interval_ms: u32,
        /// Share of one CPU that reporting may use on average, in thousandths (1 to 1000).
        cpu_permille: u16,
    },
    /// Ends the reports.
    ReportStop,
    /// Part of the memory will be absent for a while: a process that touches it is to sleep, not a whole CPU.
    /// Answered by [`AgentMessage::GateReady`] or [`AgentMessage::GateRefused`], or by nothing if the agent does
    /// not know of it.
    GateOpen {
        /// No page frame number reaches this.
        frames: u64,
    },
    /// These frames are absent. Only before [`Self::GateWalk`].
    GateAbsent(FrameRuns<'a>),
    /// All that is absent was named.
    GateWalk,
    /// These frames are there now. Without runs it says that the host is still there, as it has to each second.
    GateArrived(FrameRuns<'a>),
    /// Nothing is absent any more, or nobody will tell. Answered by [`AgentMessage::GateOver`].
    GateClose,
    /// From now on it counts which memory processes touch. Not answered.
    Watch,
    /// Asks for classes of memory, and for what was touched since [`Self::Watch`]. Answered by
    /// [`AgentMessage::Class`] and [`AgentMessage::ClassesEnd`], or by nothing if the agent does not know of it.
    ClassesWanted {
        /// No page frame number reaches this.
        frames: u64,
    },
    /// Asks what the guest's clock shows. Answered at once by [`AgentMessage::Clock`], or by nothing if the agent does not
    /// know of it. One that comes before the answer takes its place.
    ClockWanted {
        /// A number of the host's choice, returned by the agent.
        number: u64,
    },
    /// The guest's clock stood still, and is to go forward by so much. Answered by [`AgentMessage::ClockAdjusted`].
    ClockAdjust {
        /// In nanoseconds; backward if it is negative.
        by_ns: i64,
    },
}

/// What an agent did when its clock was to be adjusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ClockOutcome {
    /// The clock was set, at once.
    Stepped = 1,
    /// The clock goes faster, or slower, until it is right.
    Slewed = 2,
    /// A time daemon keeps it, and will set it right.
    Kept = 3,
    /// The guest's administrator wants it left alone.
    LeftAlone = 4,
    /// The guest's kernel refused it.
    Failed = 5,
}

impl ClockOutcome {
    const ALL: [Self; 5] = [
        Self::Stepped,
        Self::Slewed,
        Self::Kept,
        Self::LeftAlone,
        Self::Failed,
    ];

    fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|outcome| *outcome as u8 == byte)
    }
}

/// How the agent learns what the page cache holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ReportSource {
    /// The kernel module.
    Module = 1,
    /// User space: mincore, pagemap and FIEMAP. Slower, and it misses files that are open but unlinked.
    UserSpace = 2,
    /// The test guest's own memory.
    BareMetal = 3,
}

/// What the agent says to the host. Texts and ranges borrow from the frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AgentMessage<'a> {
    /// Answers [`HostMessage::Hello`].
    Hello {
        /// The version that the agent speaks from now on.
        version: u16,
        /// The host's number.
        session: u64,
        /// Where reports come from.
        source: ReportSource,
        /// Binary logarithm of the guest's page size; page frame numbers count in this unit.
        page_shift: u8,
        /// Name and version of the agent, for people.
        agent: &'a str,
    },
    /// Names a disk before the first range that refers to it. Repeated in every epoch.
    Disk {
        /// The number that ranges use.
        index: u16,
        /// Size in sectors of 512 bytes.
        sectors: u64,
        /// The serial number that the hypervisor gave it; may be empty.
        serial: &'a str,
        /// The guest's name for it, for people.
        name: &'a str,
    },
    /// A new report begins; what it lists replaces the report before when it ends.
    EpochBegin {
        /// Counts the reports of a session, from 1.
        epoch: u32,
    },
    /// Part of a report.
    Ranges(Ranges<'a>),
    /// The report is whole.
    EpochEnd {
        /// The report's number.
        epoch: u32,
        /// Pages listed in it.
        pages: u64,
        /// CPU time that it took, in microseconds.
        cpu_us: u64,
    },
    /// Something that a person should know.
    Trouble {
        /// The text.
        text: &'a str,
    },
    /// Processes can be put to sleep: the absent frames may be named.
    GateReady,
    /// They cannot.
    GateRefused {
        /// Why, for people.
        text: &'a str,
    },
    /// Processes wait for these frames.
    GateWanted(FrameRuns<'a>),
    /// Everybody was let go.
    GateOver(GateCounts),
    /// These frames are of that class. A frame may be named more than once.
    Class(MemoryClass, FrameRuns<'a>),
    /// All was named; how much there is of each class.
    ClassesEnd(ClassCounts),
    /// The guest's clock.
    Clock {
        /// The number of the question.
        number: u64,
        /// Nanoseconds since 1970 that it showed when this was said, and what it is still on its way to go faster by.
        real_ns: u64,
    },
    /// What became of [`HostMessage::ClockAdjust`].
    ClockAdjusted(ClockOutcome),
}

/// What came of putting processes to sleep.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GateCounts {
    /// It was not asked for: nobody had told for a second what has arrived.
    pub expired: bool,
    /// Pages of processes that were absent.
    pub gated: u64,
    /// Times that a process went to sleep.
    pub waits: u64,
    /// Times that a signal woke it.
    pub interrupted: u64,
    /// Faults on absent pages that stopped a CPU all the same.
    pub passed: u64,
    /// How long processes slept in all, in microseconds.
    pub waited_us: u64,
    /// How long one slept at most, in microseconds.
    pub longest_us: u64,
    /// Page frames that were named absent.
    pub absent: u64,
    /// CPU time of the guest that all of it took, in microseconds: the agent's, calls of the module included, and what
    /// the module added to page faults.
    pub cpu_us: u64,
}

/// An encoded frame's length in bytes.
pub type Encoded = Result<usize, FrameError>;

impl<'a> HostMessage<'a> {
    /// Encodes the message as one frame at the start of `out`.
    pub fn encode(&self, out: &mut [u8]) -> Encoded {
        let writer = Writer::new(out);
        match *self {
            Self::Hello {
                oldest,
                newest,
                session,
            } => writer
                .bytes(&oldest.to_le_bytes())?
                .bytes(&newest.to_le_bytes())?
                .bytes(&session.to_le_bytes())?
                .seal(kind::HOST_HELLO),
            Self::ReportStart {
                interval_ms,
                cpu_permille,
            } => writer
                .bytes(&interval_ms.to_le_bytes())?
                .bytes(&cpu_permille.to_le_bytes())?
                .seal(kind::REPORT_START),
            Self::ReportStop => writer.seal(kind::REPORT_STOP),
            Self::GateOpen { frames } => writer.bytes(&frames.to_le_bytes())?.seal(kind::GATE_OPEN),
            Self::GateAbsent(FrameRuns { body }) => writer.bytes(body)?.seal(kind::GATE_ABSENT),
            Self::GateWalk => writer.seal(kind::GATE_WALK),
            Self::GateArrived(FrameRuns { body }) => writer.bytes(body)?.seal(kind::GATE_ARRIVED),
            Self::GateClose => writer.seal(kind::GATE_CLOSE),
            Self::Watch => writer.seal(kind::WATCH),
            Self::ClassesWanted { frames } => writer
                .bytes(&frames.to_le_bytes())?
                .seal(kind::CLASSES_WANTED),
            Self::ClockWanted { number } => writer
                .bytes(&number.to_le_bytes())?
                .seal(kind::CLOCK_WANTED),
            Self::ClockAdjust { by_ns } => {
                writer.bytes(&by_ns.to_le_bytes())?.seal(kind::CLOCK_ADJUST)
            }
        }
    }

    /// Decodes the payload of a frame of this kind. Runs of frames are checked as they are iterated.
    pub fn decode(kind: u8, payload: &'a [u8]) -> Result<Self, MessageError> {
        let mut reader = Reader { rest: payload };
        let message = match kind {
            kind::HOST_HELLO => Self::Hello {
                oldest: reader.u16()?,
                newest: reader.u16()?,
                session: reader.u64()?,
            },
            kind::REPORT_START => {
                let interval_ms = reader.u32()?;
                let cpu_permille = reader.u16()?;
                if !(1..=1000).contains(&cpu_permille) {
                    return Err(MessageError::OutOfBounds("cpu_permille"));
                }
                Self::ReportStart {
                    interval_ms,
                    cpu_permille,
                }
            }
            kind::REPORT_STOP => Self::ReportStop,
            kind::GATE_OPEN => Self::GateOpen {
                frames: reader.u64()?,
            },
            kind::GATE_ABSENT => return Ok(Self::GateAbsent(FrameRuns { body: payload })),
            kind::GATE_WALK => Self::GateWalk,
            kind::GATE_ARRIVED => return Ok(Self::GateArrived(FrameRuns { body: payload })),
            kind::GATE_CLOSE => Self::GateClose,
            kind::WATCH => Self::Watch,
            kind::CLASSES_WANTED => Self::ClassesWanted {
                frames: reader.u64()?,
            },
            kind::CLOCK_WANTED => Self::ClockWanted {
                number: reader.u64()?,
            },
            kind::CLOCK_ADJUST => Self::ClockAdjust {
                by_ns: reader.u64()?.cast_signed(),
            },
            other => return Err(MessageError::UnknownKind(other)),
        };
        reader.end(message)
    }
}

impl<'a> AgentMessage<'a> {
    /// Encodes the message as one frame at the start of `out`.
    pub fn encode(&self, out: &mut [u8]) -> Encoded {
        let writer = Writer::new(out);
        match *self {
            Self::Hello {
                version,
                session,
                source,
                page_shift,
                agent,
            } => writer
                .bytes(&version.to_le_bytes())?
                .bytes(&session.to_le_bytes())?
                .bytes(&[source as u8, page_shift])?
                .text(agent)?
                .seal(kind::AGENT_HELLO),
            Self::Disk {
                index,
                sectors,
                serial,
                name,
            } => writer
                .bytes(&index.to_le_bytes())?
                .bytes(&sectors.to_le_bytes())?
                .text(serial)?
                .text(name)?
                .seal(kind::DISK),
            Self::EpochBegin { epoch } => {
                writer.bytes(&epoch.to_le_bytes())?.seal(kind::EPOCH_BEGIN)
            }
            Self::Ranges(Ranges { disk, body }) => writer
                .bytes(&disk.to_le_bytes())?
                .bytes(body)?
                .seal(kind::RANGES),
            Self::EpochEnd {
                epoch,
                pages,
                cpu_us,
            } => writer
                .bytes(&epoch.to_le_bytes())?
                .bytes(&pages.to_le_bytes())?
                .bytes(&cpu_us.to_le_bytes())?
                .seal(kind::EPOCH_END),
            Self::Trouble { text } => writer.text(text)?.seal(kind::TROUBLE),
            Self::GateReady => writer.seal(kind::GATE_READY),
            Self::GateRefused { text } => writer.text(text)?.seal(kind::GATE_REFUSED),
            Self::GateWanted(FrameRuns { body }) => writer.bytes(body)?.seal(kind::GATE_WANTED),
            Self::GateOver(counts) => writer
                .bytes(&[u8::from(counts.expired)])?
                .bytes(&counts.gated.to_le_bytes())?
                .bytes(&counts.waits.to_le_bytes())?
                .bytes(&counts.interrupted.to_le_bytes())?
                .bytes(&counts.passed.to_le_bytes())?
                .bytes(&counts.waited_us.to_le_bytes())?
                .bytes(&counts.longest_us.to_le_bytes())?
                .bytes(&counts.absent.to_le_bytes())?
                .bytes(&counts.cpu_us.to_le_bytes())?
                .seal(kind::GATE_OVER),
            Self::Class(class, FrameRuns { body }) => writer
                .bytes(&[class.to_byte()])?
                .bytes(body)?
                .seal(kind::CLASS),
            Self::ClassesEnd(counts) => {
                let mut writer = writer;
                for count in counts.to_array() {
                    writer = writer.bytes(&count.to_le_bytes())?;
                }
                writer.seal(kind::CLASSES_END)
            }
            Self::Clock { number, real_ns } => writer
                .bytes(&number.to_le_bytes())?
                .bytes(&real_ns.to_le_bytes())?
                .seal(kind::CLOCK),
            Self::ClockAdjusted(outcome) => {
                writer.bytes(&[outcome as u8])?.seal(kind::CLOCK_ADJUSTED)
            }
        }
    }

    /// Decodes the payload of a frame of this kind. Ranges are checked as they are iterated.
    pub fn decode(kind: u8, payload: &'a [u8]) -> Result<Self, MessageError> {
        let mut reader = Reader { rest: payload };
        let message = match kind {
            kind::AGENT_HELLO => {
                let version = reader.u16()?;
                let session = reader.u64()?;
                let source = match reader.u8()? {
                    1 => ReportSource::Module,
                    2 => ReportSource::UserSpace,
                    3 => ReportSource::BareMetal,
                    _ => return Err(MessageError::OutOfBounds("source")),
                };
                let page_shift = reader.u8()?;
                if !(12..=30).contains(&page_shift) {
                    return Err(MessageError::OutOfBounds("page_shift"));
                }
                Self::Hello {
                    version,
                    session,
                    source,
                    page_shift,
                    agent: reader.text()?,
                }
            }
            kind::DISK => Self::Disk {
                index: reader.u16()?,
                sectors: reader.u64()?,
                serial: reader.text()?,
                name: reader.text()?,
            },
            kind::EPOCH_BEGIN => Self::EpochBegin {
                epoch: reader.u32()?,
            },
            kind::RANGES => {
                let disk = reader.u16()?;
                return Ok(Self::Ranges(Ranges {
                    disk,
                    body: reader.rest,
                }));
            }
            kind::EPOCH_END => Self::EpochEnd {
                epoch: reader.u32()?,
                pages: reader.u64()?,
                cpu_us: reader.u64()?,
            },
            kind::TROUBLE => Self::Trouble {
                text: reader.text()?,
            },
            kind::GATE_READY => Self::GateReady,
            kind::GATE_REFUSED => Self::GateRefused {
                text: reader.text()?,
            },
            kind::GATE_WANTED => return Ok(Self::GateWanted(FrameRuns { body: payload })),
            kind::GATE_OVER => Self::GateOver(GateCounts {
                expired: match reader.u8()? {
                    0 => false,
                    1 => true,
                    _ => return Err(MessageError::OutOfBounds("expired")),
                },
                gated: reader.u64()?,
                waits: reader.u64()?,
                interrupted: reader.u64()?,
                passed: reader.u64()?,
                waited_us: reader.u64()?,
                longest_us: reader.u64()?,
                absent: reader.u64()?,
                cpu_us: reader.u64()?,
            }),
            kind::CLASS => {
                let class = MemoryClass::from_byte(reader.u8()?)
                    .ok_or(MessageError::OutOfBounds("class"))?;
                return Ok(Self::Class(class, FrameRuns { body: reader.rest }));
            }
            kind::CLASSES_END => {
                let mut counts = [0; ClassCounts::LEN];
                for count in &mut counts {
                    *count = reader.u64()?;
                }
                Self::ClassesEnd(ClassCounts::from_array(counts))
            }
            kind::CLOCK => Self::Clock {
                number: reader.u64()?,
                real_ns: reader.u64()?,
            },
            kind::CLOCK_ADJUSTED => Self::ClockAdjusted(
                ClockOutcome::from_byte(reader.u8()?)
                    .ok_or(MessageError::OutOfBounds("outcome"))?,
            ),
            other => return Err(MessageError::UnknownKind(other)),
        };
        reader.end(message)
    }
}

#[cfg(test)]
#[path = "message_tests.rs"]
pub(super) mod tests;
