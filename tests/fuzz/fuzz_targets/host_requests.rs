//! A client's request on the control socket.
#![no_main]

use libfuzzer_sys::fuzz_target;
use transhume_api::Request;

fuzz_target!(|data: &[u8]| {
    if let Ok(request) = serde_json::from_slice::<Request>(data) {
        let written = serde_json::to_vec(&request).expect("it was read");
        let read: Request = serde_json::from_slice(&written).expect("it was written");
        assert_eq!(read, request);
    }
});
