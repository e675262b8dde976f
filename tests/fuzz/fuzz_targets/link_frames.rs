//! The link's preamble and frame headers.
#![no_main]

use libfuzzer_sys::fuzz_target;
use transhume_protocol::link::{Cover, FRAME_HEADER_LEN, FrameHeader, MAX_FRAME_PAYLOAD, Preamble};

fuzz_target!(|data: &[u8]| {
    if let Some(bytes) = data.first_chunk()
        && let Ok(preamble) = Preamble::decode(bytes)
    {
        let _ = Preamble::OURS.agree(preamble);
        assert_eq!(preamble.encode()[..12], bytes[..12]);
    }
    let Some((bytes, payload)) = data.split_first_chunk::<FRAME_HEADER_LEN>() else {
        return;
    };
    let Ok(header) = FrameHeader::decode(bytes) else {
        return;
    };
    assert!(header.length <= MAX_FRAME_PAYLOAD);
    for cover in [Cover::Whole, Cover::Header] {
        let _ = header.check(cover, payload);
        // The right checksum for this payload.
        let sealed = FrameHeader::encode(header.kind, header.numbering, cover, [payload].into_iter())
            .expect("it is short");
        let sealed = FrameHeader::decode(&sealed).expect("it was encoded");
        assert_eq!((sealed.kind, sealed.length), (header.kind, payload.len()));
        sealed.check(cover, payload).expect("it was encoded");
    }
});
