//! Runs of page frames: what is absent, has arrived, is waited for, or is of one class.

use super::classes::MemoryClass;
use super::frame::{FrameError, HEADER_LEN, MAX_PAYLOAD_LEN, seal};
use super::message::{Encoded, MessageError, kind};
use crate::varint;

/// Page frames that follow one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct FrameRun {
    /// First page frame number (guest-physical address divided by the page size).
    pub pfn: u64,
    /// How many; at least 1.
    pub pages: u64,
}

/// What a list of frames says of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameList {
    /// They are absent.
    Absent,
    /// They have arrived.
    Arrived,
    /// A process waits for them.
    Wanted,
    /// They are of that class.
    Class(MemoryClass),
}

/// The runs of one message, decoded as they are iterated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameRuns<'a> {
    pub(super) body: &'a [u8],
}

impl FrameRuns<'_> {
    /// No runs: a sign of life.
    pub const NONE: FrameRuns<'static> = FrameRuns { body: &[] };
}

impl<'a> FrameRuns<'a> {
    /// Iterates over the runs; the first error ends the iteration.
    pub fn iter(&self) -> impl Iterator<Item = Result<FrameRun, MessageError>> + use<'a> {
        let body = self.body;
        let mut at = 0;
        let mut last = 0;
        core::iter::from_fn(move || {
            if at >= body.len() {
                return None;
            }
            match decode_run(body, at, last) {
                Ok((run, next)) => {
                    at = next;
                    last = run.pfn.wrapping_add(run.pages);
                    Some(Ok(run))
                }
                Err(error) => {
                    at = body.len();
                    Some(Err(error))
                }
            }
        })
    }
}

fn decode_run(body: &[u8], at: usize, last: u64) -> Result<(FrameRun, usize), MessageError> {
    let (pfn, at) = varint::get(body, at).ok_or(MessageError::Short)?;
    let (pages, at) = varint::get(body, at).ok_or(MessageError::Short)?;
    if pages == 0 {
        return Err(MessageError::OutOfBounds("pages"));
    }
    let pfn = last.wrapping_add_signed(varint::unzigzag(pfn));
    Ok((FrameRun { pfn, pages }, at))
}

/// Packs runs of frames into one message.
///
/// A run is two LEB128 integers: the zigzag difference of its first frame to where the run before ended, and
/// its length; mostly 2 to 4 bytes.
pub struct FrameRunEncoder<'a> {
    out: &'a mut [u8],
    at: usize,
    /// Where the runs begin.
    start: usize,
    last: u64,
    kind: u8,
}

impl<'a> FrameRunEncoder<'a> {
    /// Starts a message in `out`.
    pub fn new(out: &'a mut [u8], list: FrameList) -> Self {
        let kind = match list {
            FrameList::Absent => kind::GATE_ABSENT,
            FrameList::Arrived => kind::GATE_ARRIVED,
            FrameList::Wanted => kind::GATE_WANTED,
            FrameList::Class(_) => kind::CLASS,
        };
        let mut start = HEADER_LEN;
        if let FrameList::Class(class) = list {
            // Without room for it there is none for a run either.
            if let Some(byte) = out.get_mut(start) {
                *byte = class.to_byte();
            }
            start += 1;
        }
        Self {
            out,
            at: start,
            start,
            last: 0,
            kind,
        }
    }

    /// Adds a run; `false` when the message is full and the run was not taken.
    #[must_use]
    pub fn add(&mut self, run: FrameRun) -> bool {
        let pfn = run.pfn.wrapping_sub(self.last).cast_signed();
        let end = self.out.len().min(HEADER_LEN + MAX_PAYLOAD_LEN);
        let Some(out) = self.out.get_mut(..end) else {
            return false;
        };
        let put = varint::put(out, self.at, varint::zigzag(pfn))
            .and_then(|at| varint::put(out, at, run.pages));
        let Some(at) = put else { return false };
        self.at = at;
        self.last = run.pfn.wrapping_add(run.pages);
        true
    }

    /// Whether no run was added.
    pub fn is_empty(&self) -> bool {
        self.at == self.start
    }

    /// Seals the frame and returns its length in bytes.
    ///
    /// # Errors
    /// [`FrameError::NoRoom`] if the buffer has no room for what comes before the runs.
    pub fn finish(self) -> Encoded {
        if self.out.len() < self.start {
            let room = self.out.len();
            return Err(FrameError::NoRoom {
                needed: self.start,
                room,
            });
        }
        seal(self.out, self.kind, self.at - HEADER_LEN)
    }
}

#[cfg(test)]
mod tests {
    use super::super::classes::RANKS;
    use super::super::frame::{Decoder, MAX_FRAME_LEN};
    use super::super::message::{AgentMessage, HostMessage};
    use super::*;
    use proptest::prelude::*;

    fn encoded(list: FrameList, runs: &[FrameRun]) -> (u8, Vec<u8>) {
        let mut out = [0; MAX_FRAME_LEN];
        let mut encoder = FrameRunEncoder::new(&mut out, list);
        for &run in runs {
            assert!(encoder.add(run));
        }
        let length = encoder.finish().unwrap();
        let mut decoder = Decoder::new();
        assert_eq!(decoder.push(&out[..length]), length);
        let (kind, payload) = decoder.next_frame().expect("a whole frame");
        (kind, payload.to_vec())
    }

    proptest! {
        #[test]
        fn runs_round_trip(
            sent in prop::collection::vec((any::<u64>(), 1_u64..), 0..300), rank in 0..RANKS,
        ) {
            let sent: Vec<_> = sent.into_iter().map(|(pfn, pages)| FrameRun { pfn, pages }).collect();
            let classes = [MemoryClass::Kernel, MemoryClass::WorkingSet(0), MemoryClass::WorkingSet(rank)];
            let lists = [FrameList::Absent, FrameList::Arrived, FrameList::Wanted];
            for list in lists.into_iter().chain(classes.map(FrameList::Class)) {
                let (kind, payload) = encoded(list, &sent);
                let runs = match list {
                    FrameList::Wanted => match AgentMessage::decode(kind, &payload) {
                        Ok(AgentMessage::GateWanted(runs)) => runs,
                        other => panic!("{other:?}"),
                    },
                    FrameList::Class(class) => match AgentMessage::decode(kind, &payload) {
                        Ok(AgentMessage::Class(same, runs)) if same == class => runs,
                        other => panic!("{other:?}"),
                    },
                    _ => match HostMessage::decode(kind, &payload) {
                        Ok(HostMessage::GateAbsent(runs)) if list == FrameList::Absent => runs,
                        Ok(HostMessage::GateArrived(runs)) if list == FrameList::Arrived => runs,
                        other => panic!("{other:?}"),
                    },
                };
                let got: Result<Vec<_>, _> = runs.iter().collect();
                prop_assert_eq!(got.as_ref(), Ok(&sent));
            }
        }

        #[test]
        fn no_body_panics(body in prop::collection::vec(any::<u8>(), 0..400)) {
            let runs = FrameRuns { body: &body };
            prop_assert!(runs.iter().flatten().all(|run| run.pages > 0));
            prop_assert!(runs.iter().count() <= body.len());
        }
    }

    #[test]
    fn a_full_message_refuses_the_next_run() {
        let mut out = [0; HEADER_LEN + 4];
        let mut encoder = FrameRunEncoder::new(&mut out, FrameList::Arrived);
        assert!(encoder.is_empty());
        assert!(encoder.add(FrameRun { pfn: 1, pages: 1 }));
        assert!(!encoder.add(FrameRun {
            pfn: 1 << 40,
            pages: 1
        }));
        assert!(encoder.add(FrameRun { pfn: 3, pages: 1 }));
        assert_eq!(encoder.finish(), Ok(HEADER_LEN + 4));
        let short = FrameRunEncoder::new(&mut [], FrameList::Arrived);
        assert!(matches!(short.finish(), Err(FrameError::NoRoom { .. })));
        let mut out = [0; HEADER_LEN];
        let mut short = FrameRunEncoder::new(&mut out, FrameList::Class(MemoryClass::Kernel));
        assert!(!short.add(FrameRun { pfn: 1, pages: 1 }) && short.is_empty());
        assert!(matches!(short.finish(), Err(FrameError::NoRoom { .. })));
    }
}
