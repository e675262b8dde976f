//! The link's control messages.
#![no_main]

use libfuzzer_sys::fuzz_target;
use transhume_protocol::link::{decode_control, encode_control};

fuzz_target!(|data: &[u8]| {
    if let Ok(message) = decode_control(data) {
        let encoded = encode_control(&message).expect("it was decoded");
        assert_eq!(decode_control(&encoded), Ok(message));
    }
});
