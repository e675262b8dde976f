//! Packets of QEMU's channels: what is believed lies in the guest's memory, and encodes to what was decoded.
#![no_main]

use libfuzzer_sys::fuzz_target;
use transhume_protocol::qemu::multifd::{
    GREETING_LEN, Greeting, MAX_PACKET_PAGES, PACKET_LEN, Packet, encode_packet,
};
use transhume_protocol::memory::Block;
use transhume_protocol::qemu::{PAGE_SIZE, Page};
use transhume_fuzz::first;

/// The input over a packet or a greeting of zeros, so that short inputs say much.
fn over<const N: usize>(data: &[u8]) -> [u8; N] {
    let mut out = [0; N];
    let length = data.len().min(N);
    out[..length].copy_from_slice(&data[..length]);
    out
}

fuzz_target!(|data: &[u8]| {
    let (mode, data) = first(data);
    if mode & 1 != 0 {
        let bytes: [u8; GREETING_LEN] = over(data);
        if let Ok(greeting) = Greeting::decode(&bytes) {
            assert_eq!(Greeting::decode(&greeting.encode()), Ok(greeting));
        }
        return;
    }
    let block = |name: &str, length| Block {
        name: name.to_owned(),
        length,
    };
    let blocks = [block("pc.ram", 0x80_0000), block("r", 0x1000)];
    let bytes: [u8; PACKET_LEN] = over(data);
    let Ok(packet) = Packet::decode(&bytes, &blocks) else {
        return;
    };
    let pages: Vec<Page> = packet.pages().collect();
    let zero: Vec<Page> = packet.zero_pages().collect();
    assert!(pages.len() + zero.len() <= MAX_PACKET_PAGES);
    assert_eq!(packet.data_len(), pages.len() * PAGE_SIZE);
    assert_eq!(packet.is_empty(), pages.is_empty() && zero.is_empty());
    for page in pages.iter().chain(&zero) {
        assert!(page.offset < blocks[usize::from(page.block)].length);
        assert_eq!(page.offset % PAGE_SIZE as u64, 0);
    }
    let number = pages.first().or(zero.first()).map_or(0, |page| page.block);
    let offsets = |pages: &[Page]| pages.iter().map(|page| page.offset).collect::<Vec<_>>();
    let again = encode_packet(
        packet.sync,
        packet.number,
        &blocks[usize::from(number)].name,
        &offsets(&pages),
        &offsets(&zero),
    );
    let again = Packet::decode(&again, &blocks).expect("it was encoded");
    assert_eq!((again.sync, again.number), (packet.sync, packet.number));
    assert!(again.pages().eq(pages));
    assert!(again.zero_pages().eq(zero));
});
