//! NBD: the server's messages, and the requests that the tests' server takes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use transhume_protocol::nbd::{
    Greeting, Info, MAX_OPTION_REPLY_LEN, OptionReply, Request, SimpleReply, encode_client_flags,
};

fuzz_target!(|data: &[u8]| {
    if let Some(bytes) = data.first_chunk()
        && let Ok(greeting) = Greeting::decode(bytes)
    {
        assert_eq!(greeting.encode()[..16], bytes[..16]);
        let _ = encode_client_flags(greeting);
    }
    if let Some(bytes) = data.first_chunk()
        && let Ok(reply) = OptionReply::decode(bytes)
    {
        assert!(reply.length <= MAX_OPTION_REPLY_LEN);
        assert_eq!(reply.encode().as_ref(), Ok(bytes));
    }
    if let Some(bytes) = data.first_chunk()
        && let Ok(request) = Request::decode(bytes)
    {
        assert_eq!(&request.encode(), bytes);
    }
    if let Some(bytes) = data.first_chunk()
        && let Ok(reply) = SimpleReply::decode(bytes)
    {
        assert_eq!(&reply.encode(), bytes);
    }
    if let Ok(Info::BlockSizes(sizes)) = Info::decode(data) {
        assert!(sizes.minimum.is_power_of_two() && sizes.minimum <= sizes.maximum);
    }
});
