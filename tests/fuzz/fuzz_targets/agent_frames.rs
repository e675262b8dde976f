//! Frames of the agent's channel among garbage, in pieces.
#![no_main]

use libfuzzer_sys::fuzz_target;
use transhume_protocol::agent::{Decoder, HEADER_LEN, MAX_FRAME_LEN, encode_frame};
use transhume_fuzz::first;

/// Reads `tag length bytes` again and again: an odd tag makes a frame of the bytes, so that the checksum
/// is no obstacle; an even one leaves them as they are.
fn stream(mut data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    while let [tag, length, rest @ ..] = data {
        let (bytes, rest) = rest.split_at(usize::from(*length).min(rest.len()));
        if tag & 1 == 1 {
            let mut frame = [0; MAX_FRAME_LEN];
            let length = encode_frame(&mut frame, tag >> 1, bytes).expect("it fits");
            out.extend_from_slice(&frame[..length]);
        } else {
            out.extend_from_slice(bytes);
        }
        data = rest;
    }
    out
}

fuzz_target!(|data: &[u8]| {
    let (step, data) = first(data);
    let stream = stream(data);
    let mut decoder = Decoder::new();
    let mut framed = 0;
    for mut piece in stream.chunks(usize::from(step) + 1) {
        while !piece.is_empty() {
            let taken = decoder.push(piece);
            assert!(taken > 0);
            piece = &piece[taken..];
            while let Some((kind, payload)) = decoder.next_frame() {
                let mut frame = [0; MAX_FRAME_LEN];
                let length = encode_frame(&mut frame, kind, payload).expect("it was a frame");
                assert_eq!(length, HEADER_LEN + payload.len());
                framed += length;
            }
        }
    }
    let accounted = framed as u64 + decoder.skipped();
    assert!(accounted <= stream.len() as u64);
    assert!(decoder.is_mid_frame() || accounted == stream.len() as u64);
});
