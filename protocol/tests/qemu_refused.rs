//! What is refused of QEMU's stream, and by which name.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "clippy does not see that helpers belong to tests"
)]

use std::borrow::Cow;
use transhume_protocol::memory::Block;
use transhume_protocol::qemu::{
    Configuration, Decoder, Encoder, Error, MAX_BLOCKS, MAX_ITEM_LEN, Page, start_stream,
};

const RAM: u64 = 0x10_000;

fn encoder() -> Encoder {
    let block = |name: &str, length| Block {
        name: name.to_owned(),
        length,
    };
    Encoder::new(2, vec![block("pc.ram", RAM), block("pc.bios", 0x1000)])
}

/// A stream's start, then whatever `more` appends.
fn stream(more: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::new();
    start_stream(
        &Configuration {
            machine: "pc-q35-7.2",
            uuid: None,
        },
        &mut out,
    );
    more(&mut out);
    out
}

/// A stream with the table, then whatever `more` appends.
fn after_start(more: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    stream(|out| {
        encoder().start(out);
        more(out);
    })
}

/// A stream in the middle of a PART, then a record of these flags and whatever `rest` is.
fn record(word: u64, rest: &[u8]) -> Vec<u8> {
    after_start(|out| {
        encoder().part(out);
        out.extend_from_slice(&word.to_be_bytes());
        out.extend_from_slice(rest);
    })
}

fn error(stream: &[u8]) -> Error {
    let mut decoder = Decoder::new();
    let mut from = 0;
    loop {
        match decoder.next(&stream[from..]) {
            Ok(Some(item)) => from += item.length,
            Ok(None) => panic!("no error in {stream:x?}"),
            Err(error) => {
                assert_eq!(decoder.next(&stream[from..]), Err(error.clone()));
                return error;
            }
        }
    }
}

fn capability(name: &'static str) -> Error {
    Error::Capability(Cow::Borrowed(name))
}

#[test]
fn other_streams() {
    assert_eq!(error(b"GET / HTTP"), Error::NotAStream(0x4745_5420));
    assert_eq!(error(b"QEVM\0\0\0\x02"), Error::Version(2));
}

#[test]
fn capabilities_that_change_the_records() {
    assert_eq!(
        error(&record(0x1000 | 0x40, b"\x06pc.ram")),
        capability("xbzrle")
    );
    assert_eq!(error(&record(0x1000 | 0x120, b"")), capability("compress"));
    assert_eq!(error(&record(0x200, b"")), capability("multifd"));
    assert_eq!(error(&record(0x80, b"")), Error::Rdma);
    let colo = stream(|out| out.extend_from_slice(&[8, 0, 8, 0, 0]));
    assert_eq!(error(&colo), capability("x-colo"));
    let shared = stream(|out| {
        out.extend_from_slice(b"\x05\x1aconfiguration/capabilities\0\0\0\x01");
        out.extend_from_slice(b"\0\0\0\x01\x0fx-ignore-shared");
    });
    assert_eq!(error(&shared), capability("x-ignore-shared"));
    let huge = stream(|out| {
        out.extend_from_slice(&[8, 0, 3, 0, 16]);
        out.extend_from_slice(&0x20_1000_u64.to_be_bytes());
        out.extend_from_slice(&0x1000_u64.to_be_bytes());
    });
    assert_eq!(error(&huge), Error::HugePages(0x20_1000));
}

#[test]
fn unknown_flags() {
    for flags in [
        0x00,
        0x01,
        0x0a,
        0x14,
        0x24,
        0x30,
        0x60 | 0x08,
        0x400,
        0x1010,
    ] {
        let flags_only = flags & 0xfff;
        assert_eq!(
            error(&record(flags, b"\x06pc.ram")),
            Error::Flags(flags_only)
        );
    }
}

#[test]
fn pages_outside_the_memory() {
    let outside = |block: &str, offset| Error::OutsideBlock {
        block: block.to_owned(),
        offset,
    };
    assert_eq!(
        error(&record(RAM | 8, b"\x06pc.ram")),
        outside("pc.ram", RAM)
    );
    assert_eq!(
        error(&record(0x1002, b"\x07pc.bios\0")),
        outside("pc.bios", 0x1000)
    );
    let far = !0xfff;
    assert_eq!(
        error(&record(far | 8, b"\x06pc.ram")),
        outside("pc.ram", far)
    );
    assert_eq!(error(&record(0x28, b"")), Error::NothingToContinue);
    assert_eq!(
        error(&record(8, b"\x03rom")),
        Error::NoSuchBlock("rom".to_owned())
    );
    // CONTINUE after a page of the smaller block.
    let continued = after_start(|out| {
        let mut encoder = encoder();
        encoder.part(out);
        let page = Page {
            block: 1,
            offset: 0,
        };
        encoder.page(page, &[1; 4096], out).unwrap();
        out.extend_from_slice(&0x1028_u64.to_be_bytes());
        out.extend_from_slice(&[2; 4096]);
    });
    assert_eq!(error(&continued), outside("pc.bios", 0x1000));
}

#[test]
fn the_encoder_refuses_them_too() {
    let mut out = Vec::new();
    for (block, offset) in [(0, RAM), (0, 0x800), (1, 0x1000), (2, 0)] {
        let page = Page { block, offset };
        assert!(encoder().page_header(page, &mut out).is_err());
        assert!(encoder().zero(page, 0, &mut out).is_err());
    }
    assert_eq!(out, []);
}

#[test]
fn sections_of_unknown_length() {
    let named = |name: &str| {
        let mut section = vec![1, 0, 0, 0, 9, u8::try_from(name.len()).unwrap()];
        section.extend_from_slice(name.as_bytes());
        error(&stream(|out| out.extend_from_slice(&section)))
    };
    for (name, cure) in [
        ("dirty-bitmap", "`dirty-bitmaps`"),
        ("block", "`block`"),
        ("0000:00:03.0/vfio", "remove the device"),
    ] {
        let error = named(name);
        assert!(matches!(error, Error::Iterative { .. }), "{error}");
        assert!(error.to_string().contains(cure), "{error}");
    }
    let early = after_start(|out| out.extend_from_slice(b"\x04\0\0\0\x07\x0avirtio-mem"));
    assert_eq!(error(&early), Error::EarlyDevice("virtio-mem".to_owned()));
}

#[test]
fn sections_out_of_place() {
    let order = |section, part| Error::Order { section, part };
    assert_eq!(
        error(&stream(|out| out.extend_from_slice(&[2, 0, 0, 0, 2]))),
        order(2, "PART")
    );
    assert_eq!(
        error(&after_start(|out| out.extend_from_slice(&[3, 0, 0, 0, 3]))),
        order(3, "END")
    );
    assert_eq!(
        error(&after_start(|out| encoder().start(out))),
        order(2, "START")
    );
    let ended = after_start(|out| {
        let encoder = encoder();
        encoder.end(out);
        encoder.end_of_section(out);
        encoder.footer(out);
        encoder.part(out);
    });
    assert_eq!(error(&ended), order(2, "PART"));
    assert_eq!(error(&after_start(|out| out.push(0))), Error::EarlyEnd);
    assert_eq!(
        error(&after_start(|out| out.push(9))),
        Error::UnknownSection(9)
    );
}

#[test]
fn machine_types_without_configuration_or_footers() {
    let mut bare = b"QEVM\0\0\0\x03".to_vec();
    bare.extend_from_slice(b"\x01\0\0\0\x02\x03ram");
    assert_eq!(error(&bare), Error::NoConfiguration);
    let mut bare = after_start(|_| {});
    let footer = bare.len() - 5;
    bare[footer] = 2;
    let no_footer = Error::NoFooter {
        section: 2,
        found: 2,
    };
    assert_eq!(error(&bare), no_footer);
    bare[footer] = 0x7e;
    bare[footer + 4] = 3;
    let wrong = Error::WrongFooter {
        section: 2,
        found: 3,
    };
    assert_eq!(error(&bare), wrong);
}

/// A table of these entries and total.
fn table(total: u64, blocks: &[(&str, u64)]) -> Vec<u8> {
    stream(|out| {
        out.extend_from_slice(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
        out.extend_from_slice(&(total | 4).to_be_bytes());
        for (name, length) in blocks {
            out.push(u8::try_from(name.len()).unwrap());
            out.extend_from_slice(name.as_bytes());
            out.extend_from_slice(&length.to_be_bytes());
        }
    })
}

#[test]
fn bad_tables() {
    let length = |length| Error::BlockLength {
        name: "a".to_owned(),
        length,
    };
    assert_eq!(error(&table(0x2000, &[("a", 0x1800)])), length(0x1800));
    assert_eq!(error(&table(0x2000, &[("a", 0x3000)])), length(0x3000));
    assert_eq!(
        error(&table(0x2000, &[("a", 0x1000), ("a", 0x1000)])),
        Error::DuplicateBlock("a".to_owned())
    );
    assert_eq!(
        error(&table(0x2000, &[("", 0x1000)])),
        Error::Name("RAM block")
    );
    assert_eq!(
        error(&record(0x1004, b"\x01b\0\0\0\0\0\0\x10\0")),
        Error::SecondTable
    );
    let none = stream(|out| {
        Encoder::new(2, Vec::new()).start(out);
    });
    assert_eq!(error(&none), Error::NoTable);
}

#[test]
fn a_table_without_end_is_refused_within_the_bound() {
    let names: Vec<String> = (0..=MAX_BLOCKS).map(|n| format!("{n:0255}")).collect();
    let blocks: Vec<_> = names.iter().map(|name| (name.as_str(), 0)).collect();
    let stream = table(0x1000, &blocks);
    let from = table(0x1000, &[]).len() - 8;
    assert_eq!(error(&stream[..from + MAX_ITEM_LEN]), Error::TooManyBlocks);
}

#[test]
fn commands_of_the_wrong_length() {
    let ping = stream(|out| out.extend_from_slice(&[8, 0, 2, 0, 3, 1, 2, 3]));
    assert!(matches!(
        error(&ping),
        Error::CommandLength { length: 3, .. }
    ));
    let unknown = stream(|out| out.extend_from_slice(&[8, 0, 12, 0, 0]));
    assert_eq!(error(&unknown), Error::UnknownCommand(12));
}
