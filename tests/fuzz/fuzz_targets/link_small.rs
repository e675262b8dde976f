//! The link's hints, verdicts and acknowledgements.
#![no_main]

use libfuzzer_sys::fuzz_target;
use transhume_protocol::link::{Ack, Verdict, decode_hints, encode_hint};

fuzz_target!(|data: &[u8]| {
    let hints: Vec<_> = decode_hints(data).map_while(Result::ok).collect();
    let mut encoded = Vec::new();
    for hint in &hints {
        assert!(hint.pages > 0);
        encode_hint(&mut encoded, hint);
    }
    assert!(encoded.len() <= data.len());
    let again: Result<Vec<_>, _> = decode_hints(&encoded).collect();
    assert_eq!(again, Ok(hints));

    if let Ok(verdict) = Verdict::decode(data) {
        assert_eq!(Verdict::decode(&verdict.encode()), Ok(verdict));
    }
    if let Ok(ack) = Ack::decode(data) {
        assert_eq!(ack.encode(), data);
    }
});
