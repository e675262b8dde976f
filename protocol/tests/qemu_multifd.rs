//! Packets of QEMU's channels as a property: what is encoded is decoded, and nothing else is believed.
#![allow(
    clippy::unwrap_used,
    reason = "clippy does not see that helpers belong to tests"
)]

use proptest::prelude::*;
use transhume_protocol::memory::Block;
use transhume_protocol::qemu::multifd::{
    GREETING_LEN, Greeting, MAX_PACKET_PAGES, PACKET_LEN, Packet, encode_packet,
};
use transhume_protocol::qemu::{
    Configuration, Decoder, Encoder, Error, Kind, PAGE_SIZE, Page, start_stream,
};

const PAGES: u64 = 1000;

fn blocks() -> Vec<Block> {
    let block = |name: &str, pages| Block {
        name: name.to_owned(),
        length: pages * PAGE_SIZE as u64,
    };
    vec![block("pc.ram", PAGES), block("0000:00:02.0/vga.vram", 16)]
}

fn bytes_of(pages: &[u64]) -> Vec<u64> {
    pages.iter().map(|page| page * PAGE_SIZE as u64).collect()
}

/// A packet as QEMU would write it, with three pages and two zero pages.
fn sample() -> [u8; PACKET_LEN] {
    let (pages, zero) = (bytes_of(&[3, 4, 9]), bytes_of(&[5, 999]));
    encode_packet(false, 7, "pc.ram", &pages, &zero)
}

fn changed(at: usize, bytes: &[u8]) -> Result<usize, Error> {
    let mut packet = sample();
    packet[at..at + bytes.len()].copy_from_slice(bytes);
    Packet::decode(&packet, &blocks()).map(|packet| packet.data_len())
}

proptest! {
    #[test]
    fn a_packet_comes_back(
        sync: bool,
        number: u64,
        pages in prop::collection::vec(0..PAGES, 0..=MAX_PACKET_PAGES),
        zero in prop::collection::vec(0..PAGES, 0..=MAX_PACKET_PAGES),
    ) {
        let zero = &zero[..zero.len().min(MAX_PACKET_PAGES - pages.len())];
        let bytes = encode_packet(sync, number, "pc.ram", &bytes_of(&pages), &bytes_of(zero));
        let packet = Packet::decode(&bytes, &blocks()).unwrap();
        prop_assert_eq!(packet.sync, sync);
        prop_assert_eq!(packet.number, number);
        prop_assert_eq!(packet.is_empty(), pages.is_empty() && zero.is_empty());
        prop_assert_eq!(packet.data_len(), pages.len() * PAGE_SIZE);
        let pages_of = |pages: &[u64]| -> Vec<Page> {
            bytes_of(pages).into_iter().map(|offset| Page { block: 0, offset }).collect()
        };
        prop_assert_eq!(packet.pages().collect::<Vec<_>>(), pages_of(&pages));
        prop_assert_eq!(packet.zero_pages().collect::<Vec<_>>(), pages_of(zero));
    }

    #[test]
    fn what_is_believed_lies_in_the_guest_s_memory(
        at in prop::collection::vec((0..PACKET_LEN, any::<u8>()), 1..40),
    ) {
        let mut bytes = sample();
        for (at, byte) in at {
            bytes[at] = byte;
        }
        let blocks = blocks();
        if let Ok(packet) = Packet::decode(&bytes, &blocks) {
            let all: Vec<Page> = packet.pages().chain(packet.zero_pages()).collect();
            prop_assert!(all.len() <= MAX_PACKET_PAGES);
            prop_assert_eq!(packet.data_len(), packet.pages().count() * PAGE_SIZE);
            for page in all {
                prop_assert!(page.offset.is_multiple_of(PAGE_SIZE as u64));
                prop_assert!(page.offset < blocks[usize::from(page.block)].length);
            }
        }
    }

    #[test]
    fn a_greeting_comes_back(uuid: [u8; 16], channel: u8) {
        let greeting = Greeting { uuid, channel };
        prop_assert_eq!(Greeting::decode(&greeting.encode()), Ok(greeting));
    }
}

#[test]
fn a_greeting_of_another_protocol_is_refused() {
    let greeting = Greeting {
        uuid: [1; 16],
        channel: 1,
    };
    let mut bytes = greeting.encode();
    assert_eq!(bytes.len(), GREETING_LEN);
    bytes[7] = 2;
    assert_eq!(Greeting::decode(&bytes), Err(Error::ChannelVersion(2)));
    bytes[..4].copy_from_slice(b"QEVM");
    assert_eq!(
        Greeting::decode(&bytes),
        Err(Error::NotAChannel(0x5145_564d))
    );
}

#[test]
fn damage_is_named() {
    assert_eq!(changed(0, &[0x11]), Ok(3 * PAGE_SIZE));
    assert_eq!(changed(0, &[0]), Err(Error::NotAChannel(0x0022_3344)));
    assert_eq!(changed(7, &[9]), Err(Error::ChannelVersion(9)));
    assert_eq!(changed(11, &[2]), Err(Error::CompressedChannel));
    assert_eq!(changed(11, &[0x40]), Err(Error::DeviceInChannel));
    assert_eq!(changed(8, &[1]), Err(Error::PacketFlags(1 << 24)));
    let pages = |pages, zero, room| Err(Error::PacketPages { pages, zero, room });
    assert_eq!(changed(15, &[4]), pages(3, 2, 4));
    assert_eq!(changed(32, &[0xff; 4]), pages(3, u32::MAX, 128));
    // Room that is not there.
    assert_eq!(
        changed(12, &[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 127]),
        pages(127, 2, u32::MAX)
    );
    let length = u32::try_from(PAGE_SIZE * 3).expect("three pages");
    assert_eq!(
        changed(19, &[2]),
        Err(Error::PacketLength { pages: 2, length })
    );
    let unknown = changed(64, b"x");
    assert_eq!(unknown, Err(Error::NoSuchBlock("xc.ram".to_owned())));
    assert_eq!(changed(64, &[0]), Err(Error::Name("RAM block")));
    assert_eq!(changed(64, &[b'a'; 256]), Err(Error::Name("RAM block")));
    let outside = |offset| {
        let block = "pc.ram".to_owned();
        Err(Error::OutsideBlock { block, offset })
    };
    assert_eq!(changed(327, &[1]), outside(0x3001));
    assert_eq!(changed(320, &[0xff; 8]), outside(u64::MAX));
    // The last of the zero pages.
    assert_eq!(
        changed(352, &(PAGES * 4096).to_be_bytes()),
        outside(PAGES * 4096)
    );
}

#[test]
fn what_qemu_7_2_leaves_in_a_packet_without_pages_is_not_read() {
    let mut bytes = sample();
    bytes[16..20].fill(0);
    bytes[32..36].fill(0);
    bytes[64..70].copy_from_slice(b"nobody");
    bytes[320..328].fill(0xff);
    bytes[11] = 1;
    let packet = Packet::decode(&bytes, &blocks()).unwrap();
    assert!(packet.sync && packet.is_empty());
    assert_eq!((packet.data_len(), packet.pages().count()), (0, 0));
}

#[test]
fn a_flush_is_known_where_channels_are_read() {
    let mut stream = Vec::new();
    let machine = "pc-q35-10.0";
    start_stream(
        &Configuration {
            machine,
            uuid: None,
        },
        &mut stream,
    );
    let encoder = Encoder::new(1, blocks());
    encoder.start(&mut stream);
    encoder.part(&mut stream);
    stream.extend_from_slice(&0x200_u64.to_be_bytes());
    encoder.end_of_section(&mut stream);

    let read = |mut decoder: Decoder| {
        let mut at = 0;
        let mut flushes = 0;
        while at < stream.len() {
            let item = decoder.next(&stream[at..])?.unwrap();
            flushes += usize::from(item.kind == Kind::Flush);
            at += item.length;
        }
        Ok(flushes)
    };
    assert_eq!(read(Decoder::with_channels()), Ok(1));
    assert_eq!(
        read(Decoder::new()),
        Err(Error::Capability("multifd".into()))
    );
}
