//! The client against servers that behave, and against servers that do not.

use super::*;
use std::sync::Barrier;
use std::thread;
use transhume_protocol::nbd::{CLIENT_FLAGS_LEN, REQUEST_LEN};

const SIZE: u64 = 1 << 20;
const TIMEOUT: Duration = Duration::from_secs(20);

fn byte_at(offset: u64) -> u8 {
    (offset / 512 * 7 + offset).to_le_bytes()[0]
}

/// Bytes of an option reply with this payload.
fn reply(kind: OptionReplyKind, payload: &[u8]) -> Vec<u8> {
    let length = payload.len();
    let mut out = OptionReply { kind, length }.encode().unwrap().to_vec();
    out.extend_from_slice(payload);
    out
}

fn export_info(size: u64) -> Vec<u8> {
    let mut payload = 0_u16.to_be_bytes().to_vec();
    payload.extend_from_slice(&size.to_be_bytes());
    payload.extend_from_slice(&3_u16.to_be_bytes());
    reply(OptionReplyKind::Info, &payload)
}

fn block_info(minimum: u32, maximum: u32) -> Vec<u8> {
    let mut payload = 3_u16.to_be_bytes().to_vec();
    for field in [minimum, 4096, maximum] {
        payload.extend_from_slice(&field.to_be_bytes());
    }
    reply(OptionReplyKind::Info, &payload)
}

fn honest_description() -> Vec<u8> {
    let mut out = export_info(SIZE);
    out.extend(block_info(1, 64 * 1024));
    out.extend(reply(OptionReplyKind::Ack, &[]));
    out
}

/// The server's half of a handshake, with this description of the export.
fn greet(stream: &mut UnixStream, description: &[u8]) {
    let greeting = Greeting { no_zeroes: true };
    stream.write_all(&greeting.encode()).unwrap();
    let mut flags = [0; CLIENT_FLAGS_LEN];
    stream.read_exact(&mut flags).unwrap();
    assert_eq!(flags, [0, 0, 0, 3]);
    let mut go = [0; 16 + 4 + 4 + 4];
    stream.read_exact(&mut go).unwrap();
    assert_eq!(&go[20..24], b"disk");
    stream.write_all(description).unwrap();
}

fn next_request(stream: &mut UnixStream) -> Option<Request> {
    let mut bytes = [0; REQUEST_LEN];
    stream.read_exact(&mut bytes).ok()?;
    Some(Request::decode(&bytes).unwrap())
}

fn answer(stream: &mut UnixStream, request: Request, error: u32) {
    let cookie = request.cookie;
    stream
        .write_all(&SimpleReply { error, cookie }.encode())
        .unwrap();
    if error == 0 {
        let data: Vec<u8> = (request.offset..request.offset + u64::from(request.length))
            .map(byte_at)
            .collect();
        stream.write_all(&data).unwrap();
    }
}

/// A client of one connection to a server that does `serve`.
fn against(
    patience: Duration,
    serve: impl FnOnce(&mut UnixStream) + Send + 'static,
) -> Result<Client, Error> {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    thread::spawn(move || serve(&mut theirs));
    Client::start(vec![ours], "disk", patience)
}

#[test]
fn long_reads_are_split_and_put_together() {
    let client = against(TIMEOUT, |stream| {
        greet(stream, &honest_description());
        while let Some(request) = next_request(stream) {
            assert!(request.length <= 64 * 1024);
            answer(stream, request, 0);
        }
    })
    .unwrap();
    assert_eq!(client.size(), SIZE);
    let mut buffer = vec![0; 200 * 1024];
    client.read_at(4096, &mut buffer).unwrap();
    assert!((4096..).zip(&buffer).all(|(at, &byte)| byte == byte_at(at)));
}

#[test]
fn a_refused_read_leaves_the_connection_usable() {
    let client = against(TIMEOUT, |stream| {
        greet(stream, &honest_description());
        let first = next_request(stream).unwrap();
        answer(stream, first, 5);
        let second = next_request(stream).unwrap();
        answer(stream, second, 0);
    })
    .unwrap();
    let mut buffer = [0; 512];
    assert!(matches!(
        client.read_at(512, &mut buffer),
        Err(Error::Remote {
            offset: 512,
            length: 512,
            code: 5
        })
    ));
    client.read_at(1024, &mut buffer).unwrap();
    assert_eq!(buffer[3], byte_at(1027));
}

#[test]
fn threads_read_on_connections_of_their_own() {
    // Neither server answers before both were asked.
    let both = std::sync::Arc::new(Barrier::new(2));
    let streams = (0..2)
        .map(|_| {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let both = both.clone();
            thread::spawn(move || {
                greet(&mut theirs, &honest_description());
                let request = next_request(&mut theirs).unwrap();
                both.wait();
                answer(&mut theirs, request, 0);
                while let Some(request) = next_request(&mut theirs) {
                    answer(&mut theirs, request, 0);
                }
            });
            ours
        })
        .collect();
    let client = Client::start(streams, "disk", TIMEOUT).unwrap();
    thread::scope(|scope| {
        for reader in 0..4_u64 {
            let client = &client;
            scope.spawn(move || {
                let mut buffer = [0; 512];
                client.read_at(reader * 512, &mut buffer).unwrap();
                assert_eq!(buffer[0], byte_at(reader * 512));
            });
        }
    });
}

#[test]
fn servers_that_greet_wrongly_are_refused() {
    let noise = against(TIMEOUT, |stream| {
        stream.write_all(&[0xff; 64]).unwrap();
    });
    assert!(matches!(noise, Err(Error::Protocol(_))));
    let gone = against(TIMEOUT, |stream| {
        stream.write_all(b"NBDMAG").unwrap();
    });
    assert!(matches!(gone, Err(Error::Connection(_))));
}

#[test]
fn descriptions_that_lie_are_refused() {
    let ack = reply(OptionReplyKind::Ack, &[]);
    let lies = [
        ack.clone(),                                         // no size
        [export_info(1000), ack.clone()].concat(),           // not of whole sectors
        [export_info(u64::MAX - 511), ack.clone()].concat(), // larger than any file
        [export_info(SIZE), block_info(4096, 8192), ack.clone()].concat(),
        [export_info(SIZE), block_info(1, 100), ack].concat(),
        export_info(SIZE).repeat(100), // no end
    ];
    for lie in lies {
        let client = against(TIMEOUT, move |stream| {
            greet(stream, &lie);
            let _ = next_request(stream);
        });
        assert!(matches!(client, Err(Error::Description(_))));
    }
}

#[test]
fn a_reply_of_4_gib_is_refused_before_memory_is_taken() {
    let client = against(TIMEOUT, |stream| {
        let mut header = OptionReply {
            kind: OptionReplyKind::Info,
            length: 0,
        }
        .encode()
        .unwrap();
        header[16..].fill(0xff);
        greet(stream, &header);
    });
    assert!(matches!(client, Err(Error::Protocol(_))));
}

#[test]
fn a_refusal_is_told_without_control_characters() {
    let client = against(TIMEOUT, |stream| {
        greet(
            stream,
            &reply(OptionReplyKind::Refused(6), b"no\x1b[31m such\nexport\n"),
        );
    });
    match client.err().unwrap() {
        Error::Refused { code: 6, said } => assert_eq!(said, "no?[31m such | export"),
        other => panic!("{other}"),
    }
}

#[test]
fn an_answer_to_something_else_ends_the_connection() {
    let client = against(TIMEOUT, |stream| {
        greet(stream, &honest_description());
        let mut request = next_request(stream).unwrap();
        request.cookie ^= 1;
        answer(stream, request, 0);
        let _ = next_request(stream);
    })
    .unwrap();
    let mut buffer = [0; 512];
    assert!(matches!(
        client.read_at(0, &mut buffer),
        Err(Error::Description(_))
    ));
    // What is left in the stream must never be taken for data.
    assert!(matches!(
        client.read_at(0, &mut buffer),
        Err(Error::NoConnection)
    ));
}

#[test]
fn a_silent_server_is_given_up() {
    let client = against(Duration::from_millis(50), |stream| {
        greet(stream, &honest_description());
        let request = next_request(stream).unwrap();
        // Half an answer.
        let cookie = request.cookie;
        stream
            .write_all(&SimpleReply { error: 0, cookie }.encode())
            .unwrap();
        stream.write_all(&[1; 100]).unwrap();
        let _ = next_request(stream);
    })
    .unwrap();
    let mut buffer = [0; 512];
    assert!(matches!(
        client.read_at(0, &mut buffer),
        Err(Error::Silent(_))
    ));
}

#[test]
fn a_server_that_hands_out_byte_by_byte_is_given_up() {
    let client = against(Duration::from_millis(50), |stream| {
        greet(stream, &honest_description());
        let request = next_request(stream).unwrap();
        let cookie = request.cookie;
        stream
            .write_all(&SimpleReply { error: 0, cookie }.encode())
            .unwrap();
        while stream.write_all(&[1]).is_ok() {
            thread::sleep(Duration::from_millis(5));
        }
    })
    .unwrap();
    let mut buffer = vec![0; 64 * 1024];
    assert!(matches!(
        client.read_at(0, &mut buffer),
        Err(Error::Silent(_))
    ));
}

#[test]
fn waiting_readers_learn_that_no_connection_is_left() {
    let asked = std::sync::Arc::new(Barrier::new(2));
    let waiting = asked.clone();
    let client = against(TIMEOUT, move |stream| {
        greet(stream, &honest_description());
        let _ = next_request(stream);
        waiting.wait();
    })
    .unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            assert!(client.read_at(0, &mut [0; 512]).is_err());
        });
        for _ in 0..3 {
            scope.spawn(|| {
                assert!(client.read_at(0, &mut [0; 512]).is_err());
            });
        }
        asked.wait();
    });
    assert!(matches!(
        client.read_at(0, &mut [0; 512]),
        Err(Error::NoConnection)
    ));
}
