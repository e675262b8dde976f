//! Messages of the agent's channel, both ways, ranges and runs of frames included.
#![no_main]

use libfuzzer_sys::fuzz_target;
use transhume_protocol::agent::{
    AgentMessage, FrameList, FrameRunEncoder, FrameRuns, HEADER_LEN, HostMessage, MAX_FRAME_LEN,
    MAX_PAYLOAD_LEN, RangeEncoder,
};
use transhume_protocol_fuzz::first;

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
    let (host, agent) = match list {
        FrameList::Absent => (HostMessage::decode(0x05, payload).ok(), None),
        FrameList::Arrived => (HostMessage::decode(0x07, payload).ok(), None),
        FrameList::Wanted => (None, AgentMessage::decode(0x89, payload).ok()),
        FrameList::Class(_) => (None, AgentMessage::decode(0x8b, payload).ok()),
    };
    let (Some(HostMessage::GateAbsent(runs) | HostMessage::GateArrived(runs)), _)
    | (_, Some(AgentMessage::GateWanted(runs) | AgentMessage::Class(_, runs))) = (host, agent)
    else {
        panic!("runs are no longer runs");
    };
    let again: Result<Vec<_>, _> = runs.iter().collect();
    assert_eq!(again.as_ref(), Ok(&decoded));
}
