//! Messages of the agent's channel, both ways, ranges and runs of frames included.
#![no_main]

use libfuzzer_sys::fuzz_target;
use transhume_protocol::agent::{
    AgentMessage, FrameList, FrameRunEncoder, FrameRuns, HEADER_LEN, HostMessage, MAX_FRAME_LEN,
    MAX_PAYLOAD_LEN, RangeEncoder,
};
use transhume_fuzz::first;

fuzz_target!(|data: &[u8]| {
    let (kind, payload) = first(data);
    let payload = &payload[..payload.len().min(MAX_PAYLOAD_LEN)];
    let mut out = vec![0; MAX_FRAME_LEN];
    if let Ok(message) = HostMessage::decode(kind, payload) {
        let length = message.encode(&mut out).expect("it fits");
        assert_eq!(&out[HEADER_LEN..length], payload);
        match message {
            HostMessage::GateAbsent(runs) => again(runs, FrameList::Absent),
            HostMessage::GateArrived(runs) => again(runs, FrameList::Arrived),
            _ => {}
        }
    }
    let Ok(message) = AgentMessage::decode(kind, payload) else {
        return;
    };
    let length = message.encode(&mut out).expect("it fits");
    assert_eq!(&out[HEADER_LEN..length], payload);
    match message {
        AgentMessage::GateWanted(runs) => again(runs, FrameList::Wanted),
        AgentMessage::Class(class, runs) => again(runs, FrameList::Class(class)),
        _ => {}
    }
    let AgentMessage::Ranges(ranges) = message else {
        return;
    };
    let decoded: Vec<_> = ranges.iter(8).map_while(Result::ok).collect();
    let mut encoder = RangeEncoder::new(&mut out, ranges.disk, 8).expect("it fits");
    for &range in &decoded {
        assert!(range.pages > 0);
        assert!(encoder.add(range), "no longer than it was");
    }
    let length = encoder.finish().expect("it fits");
    let Ok(AgentMessage::Ranges(again)) = AgentMessage::decode(kind, &out[HEADER_LEN..length])
    else {
        panic!("ranges are no longer ranges");
    };
    let again: Result<Vec<_>, _> = again.iter(8).collect();
    assert_eq!(again.as_ref(), Ok(&decoded));
});

/// What can be read of runs is the same when it is written again.
fn again(runs: FrameRuns<'_>, list: FrameList) {
    let decoded: Vec<_> = runs.iter().map_while(Result::ok).collect();
    let mut out = vec![0; MAX_FRAME_LEN];
    let mut encoder = FrameRunEncoder::new(&mut out, list);
    for &run in &decoded {
        assert!(run.pages > 0);
        assert!(encoder.add(run), "no longer than it was");
    }
    let length = encoder.finish().expect("it fits");
    let payload = &out[HEADER_LEN..length];
    let host = |kind| HostMessage::decode(kind, payload);
    let agent = |kind| AgentMessage::decode(kind, payload);
    let runs = match list {
        FrameList::Absent => match host(0x05) {
            Ok(HostMessage::GateAbsent(runs)) => runs,
            other => panic!("{other:?}"),
        },
        FrameList::Arrived => match host(0x07) {
            Ok(HostMessage::GateArrived(runs)) => runs,
            other => panic!("{other:?}"),
        },
        FrameList::Wanted => match agent(0x89) {
            Ok(AgentMessage::GateWanted(runs)) => runs,
            other => panic!("{other:?}"),
        },
        FrameList::Class(class) => match agent(0x8b) {
            Ok(AgentMessage::Class(same, runs)) if same == class => runs,
            other => panic!("{other:?}"),
        },
    };
    let again: Result<Vec<_>, _> = runs.iter().collect();
    assert_eq!(again.as_ref(), Ok(&decoded));
}
