//! Collects what the agent says of the order in which the guest's memory is wanted.

use transhume_protocol::agent::{AgentMessage, ClassCounts, FrameRun, MemoryClass};

/// Most runs of an answer; what a guest names beyond them is left out.
const MAX_RUNS: usize = 1 << 18;

/// What the guest says of its memory. Nothing of it is believed: it only decides what goes first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemoryOrder {
    /// Runs of frames, from what is wanted first to what is wanted last. Some may be named twice.
    pub runs: Vec<(MemoryClass, FrameRun)>,
    /// How much there is of each class.
    pub counts: ClassCounts,
}

/// Collects the messages of an answer.
#[derive(Debug, Default)]
pub(super) struct OrderCollector {
    runs: Vec<(MemoryClass, FrameRun)>,
}

impl OrderCollector {
    /// Takes a message. Returns the order when this message completes it.
    pub(super) fn take(&mut self, message: &AgentMessage<'_>) -> Option<MemoryOrder> {
        match *message {
            AgentMessage::Class(class, runs) => {
                let room = MAX_RUNS.saturating_sub(self.runs.len());
                // A run that cannot be read ends its message; the others count.
                let runs = runs.iter().map_while(Result::ok).take(room);
                self.runs.extend(runs.map(|run| (class, run)));
                None
            }
            AgentMessage::ClassesEnd(counts) => {
                let mut runs = std::mem::take(&mut self.runs);
                runs.sort_unstable();
                Some(MemoryOrder { runs, counts })
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use transhume_protocol::agent::{Decoder, FrameList, FrameRunEncoder, MAX_FRAME_LEN};

    fn give(
        collector: &mut OrderCollector,
        class: MemoryClass,
        runs: impl IntoIterator<Item = (u64, u64)>,
    ) {
        let mut out = vec![0; MAX_FRAME_LEN];
        let mut encoder = FrameRunEncoder::new(&mut out, FrameList::Class(class));
        for (pfn, pages) in runs {
            assert!(encoder.add(FrameRun { pfn, pages }));
        }
        let length = encoder.finish().expect("room");
        let mut decoder = Decoder::new();
        decoder.push(&out[..length]);
        let (kind, payload) = decoder.next_frame().expect("a frame");
        let message = AgentMessage::decode(kind, payload).expect("a message");
        assert_eq!(collector.take(&message), None);
    }

    #[test]
    fn an_order_is_whole_at_its_end_and_sorted_by_class() {
        let mut collector = OrderCollector::default();
        give(&mut collector, MemoryClass::WorkingSet(1), [(5, 1)]);
        give(&mut collector, MemoryClass::Kernel, [(90, 2), (7, 1)]);
        give(&mut collector, MemoryClass::WorkingSet(0), [(50, 1)]);
        let counts = ClassCounts {
            kernel: 3,
            ..ClassCounts::default()
        };
        let order = collector.take(&AgentMessage::ClassesEnd(counts));
        let order = order.expect("it is whole");
        let pfns: Vec<_> = order.runs.iter().map(|(_, run)| run.pfn).collect();
        assert_eq!((pfns, order.counts), (vec![7, 90, 50, 5], counts));
        let next = collector.take(&AgentMessage::ClassesEnd(counts));
        assert_eq!(next.expect("another one").runs, []);
    }

    #[test]
    fn a_guest_that_names_without_an_end_fills_no_memory() {
        let mut collector = OrderCollector::default();
        for _ in 0..MAX_RUNS / 4096 + 2 {
            give(
                &mut collector,
                MemoryClass::Kernel,
                (0..4096).map(|n| (n * 2, 1)),
            );
        }
        assert_eq!(collector.runs.len(), MAX_RUNS);
    }
}
