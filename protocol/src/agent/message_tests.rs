use super::*;
use crate::agent::frame::{Decoder, MAX_FRAME_LEN};
use proptest::prelude::*;

/// A frame's kind and payload.
pub(in crate::agent) fn reframe(out: &[u8]) -> (u8, Vec<u8>) {
    let mut decoder = Decoder::new();
    assert_eq!(decoder.push(out), out.len());
    let (kind, payload) = decoder.next_frame().expect("a whole frame");
    (kind, payload.to_vec())
}

fn text() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9 /ä-]{0,60}"
}

proptest! {
    #[test]
    fn host_messages_round_trip(
        oldest: u16, newest: u16, session: u64, interval_ms: u32, cpu_permille in 1_u16..=1000,
    ) {
        for message in [
            HostMessage::Hello { oldest, newest, session },
            HostMessage::ReportStart { interval_ms, cpu_permille },
            HostMessage::ReportStop,
            HostMessage::GateOpen { frames: session },
            HostMessage::GateArrived(FrameRuns::NONE),
            HostMessage::GateWalk,
            HostMessage::GateClose,
            HostMessage::Watch,
            HostMessage::ClassesWanted { frames: session },
            HostMessage::ClockWanted { number: session },
            HostMessage::ClockAdjust { by_ns: session.cast_signed() },
        ] {
            let mut out = [0; MAX_FRAME_LEN];
            let length = message.encode(&mut out).unwrap();
            let (kind, payload) = reframe(&out[..length]);
            prop_assert_eq!(HostMessage::decode(kind, &payload), Ok(message));
        }
    }

    #[test]
    fn agent_messages_round_trip(
        version: u16, session: u64, page_shift in 12_u8..=30, first in text(), second in text(),
        index: u16, sectors: u64, epoch: u32, pages: u64, cpu_us: u64,
    ) {
        for message in [
            AgentMessage::Hello {
                version, session, source: ReportSource::UserSpace, page_shift, agent: &first,
            },
            AgentMessage::Disk { index, sectors, serial: &first, name: &second },
            AgentMessage::EpochBegin { epoch },
            AgentMessage::EpochEnd { epoch, pages, cpu_us },
            AgentMessage::Trouble { text: &second },
            AgentMessage::GateReady,
            AgentMessage::GateRefused { text: &first },
            AgentMessage::GateOver(GateCounts {
                expired: index % 2 == 0, gated: sectors, waits: pages, interrupted: cpu_us,
                passed: session, waited_us: sectors, longest_us: pages, absent: session, cpu_us,
            }),
            AgentMessage::Class(MemoryClass::Kernel, FrameRuns::NONE),
            AgentMessage::ClassesEnd(ClassCounts::from_array([
                session, sectors, pages, cpu_us, 0, u64::MAX, 1, session,
            ])),
            AgentMessage::Clock { number: session, real_ns: sectors },
            AgentMessage::ClockAdjusted(ClockOutcome::ALL[usize::from(index) % 5]),
        ] {
            let mut out = [0; MAX_FRAME_LEN];
            let length = message.encode(&mut out).unwrap();
            let (kind, payload) = reframe(&out[..length]);
            prop_assert_eq!(AgentMessage::decode(kind, &payload), Ok(message));
        }
    }

    #[test]
    fn no_payload_panics(kind: u8, payload in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = HostMessage::decode(kind, &payload);
        if let Ok(AgentMessage::Ranges(ranges)) = AgentMessage::decode(kind, &payload) {
            let _ = ranges.iter(8).count();
        }
    }
}
