//! QEMU's return path: what is understood encodes to the same bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use transhume_protocol::qemu::return_path::{MAX_MESSAGE_LEN, Message};

/// Longest bitmap, in bytes.
const MOST: usize = 64;

fuzz_target!(|data: &[u8]| {
    let mut rest = data;
    loop {
        match Message::decode_resumed(rest, MOST) {
            Ok(Some((message, used))) => {
                let mut out = Vec::new();
                message.encode(&mut out);
                assert_eq!(out, &rest[..used]);
                for cut in 0..used {
                    assert_eq!(Message::decode_resumed(&rest[..cut], MOST), Ok(None));
                }
                rest = &rest[used..];
            }
            Ok(None) => {
                assert!(rest.len() < MAX_MESSAGE_LEN + MOST);
                return;
            }
            Err(_) => return,
        }
    }
});
