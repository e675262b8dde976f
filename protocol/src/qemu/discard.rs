//! The command `POSTCOPY_RAM_DISCARD`: pages that the destination forgets before a VM in post-copy runs there,
//! because they were written after they had been sent, or never sent.
//!
//! ```text
//! u8 version, 0 | block's name | u8 0 | (u64 offset, u64 length), at least one
//! ```

use super::command::{Command, CommandKind};
use super::decoder::check;
use super::encoder::put_name;
use super::reader::{Reader, Stop};
use super::{Error, PAGE, Page};
use crate::memory::{Block, Discard};

const VERSION: u8 = 0;
/// Ranges in one command, at most: a payload of less than 64 KiB.
const MAX_RANGES: usize = 1024;
const RANGE_LEN: usize = 16;

impl Discard {
    /// Reads the command's payload, with the table of blocks that it is about.
    ///
    /// # Errors
    /// If it is not of [`CommandKind::PostcopyRamDiscard`], is damaged, or names what is not in the table.
    pub fn read(command: &Command<'_>, blocks: &[Block]) -> Result<Self, Error> {
        let damaged = || Error::CommandLength {
            command: command.kind,
            length: command.payload.len(),
        };
        if command.kind != CommandKind::PostcopyRamDiscard {
            return Err(damaged());
        }
        let mut reader = Reader::new(command.payload);
        let mut head = || {
            let version = reader.u8()?;
            let name = reader.name("RAM block")?;
            Ok((version, name, reader.u8()?))
        };
        let (version, name, end) = head().map_err(|stop| match stop {
            Stop::More => damaged(),
            Stop::Failed(error) => error,
        })?;
        let block = (0..)
            .zip(blocks)
            .find_map(|(index, block)| (block.name == name).then_some(index))
            .ok_or_else(|| Error::NoSuchBlock(name.to_owned()))?;
        let rest = command.payload.get(reader.used()..).unwrap_or_default();
        let (pairs, left) = rest.as_chunks::<RANGE_LEN>();
        if version != VERSION || end != 0 || pairs.is_empty() || !left.is_empty() {
            return Err(damaged());
        }
        let range = |pair: &[u8; RANGE_LEN]| {
            let (words, _) = pair.as_chunks::<8>();
            let [offset, length] = [words[0], words[1]].map(u64::from_be_bytes);
            let last = offset
                .checked_add(length)
                .and_then(|end| end.checked_sub(PAGE));
            let outside = || Error::OutsideBlock {
                block: name.to_owned(),
                offset,
            };
            let last = last.filter(|&last| last >= offset).ok_or_else(outside)?;
            for offset in [offset, last] {
                check(blocks, Page { block, offset })?;
            }
            Ok((offset / PAGE, length / PAGE))
        };
        let ranges = pairs.iter().map(range).collect::<Result<_, Error>>()?;
        Ok(Self { block, ranges })
    }

    /// Appends it as one command or more.
    ///
    /// # Errors
    /// If it names what is not in the table.
    pub fn encode(&self, blocks: &[Block], out: &mut Vec<u8>) -> Result<(), Error> {
        for ranges in self.ranges.chunks(MAX_RANGES) {
            let mut payload = vec![VERSION];
            for (n, &(page, count)) in ranges.iter().enumerate() {
                let offset = page.saturating_mul(PAGE);
                let last = page.saturating_add(count).saturating_sub(1);
                let block = self.block;
                let found = check(blocks, Page { block, offset })?;
                let end = last.saturating_mul(PAGE);
                check(blocks, Page { block, offset: end })?;
                if n == 0 {
                    put_name(&found.name, &mut payload);
                    payload.push(0);
                }
                payload.extend_from_slice(&offset.to_be_bytes());
                payload.extend_from_slice(&count.saturating_mul(PAGE).to_be_bytes());
            }
            let kind = CommandKind::PostcopyRamDiscard;
            let command = Command {
                kind,
                payload: &payload,
            };
            command.encode(out).ok_or(Error::CommandLength {
                command: kind,
                length: payload.len(),
            })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn blocks() -> Vec<Block> {
        ["pc.ram", "vga.vram"]
            .map(|name| Block {
                name: name.to_owned(),
                length: 64 * PAGE,
            })
            .into()
    }

    fn command(payload: &[u8]) -> Command<'_> {
        Command {
            kind: CommandKind::PostcopyRamDiscard,
            payload,
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            block in 0_u16..2, ranges in prop::collection::vec((0_u64..64, 1_u64..=64), 1..3000),
        ) {
            let ranges: Vec<_> =
                ranges.into_iter().map(|(page, count)| (page, count.min(64 - page))).collect();
            let mut out = Vec::new();
            Discard { block, ranges: ranges.clone() }.encode(&blocks(), &mut out).unwrap();
            let mut read = Vec::new();
            let mut rest = &out[..];
            while !rest.is_empty() {
                let length = usize::from(u16::from_be_bytes([rest[3], rest[4]]));
                let one = Discard::read(&command(&rest[5..5 + length]), &blocks()).unwrap();
                prop_assert_eq!(one.block, block);
                read.extend(one.ranges);
                rest = &rest[5 + length..];
            }
            prop_assert_eq!(read, ranges);
        }

        #[test]
        fn no_payload_leads_outside(
            offset in 0_u64..=80 * PAGE, length in 0_u64..=80 * PAGE, wild: u64,
        ) {
            for (offset, length) in [(offset, length), (wild, length), (offset, wild)] {
                let mut payload = b"\0\x06pc.ram\0".to_vec();
                payload.extend_from_slice(&offset.to_be_bytes());
                payload.extend_from_slice(&length.to_be_bytes());
                let inside = offset % PAGE == 0 && length % PAGE == 0 && length > 0
                    && offset.checked_add(length).is_some_and(|end| end <= 64 * PAGE);
                prop_assert_eq!(Discard::read(&command(&payload), &blocks()).is_ok(), inside);
            }
        }

        #[test]
        fn no_payload_panics(payload in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = Discard::read(&command(&payload), &blocks());
        }
    }

    #[test]
    fn the_damaged_is_refused() {
        let right = b"\0\x06pc.ram\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x20\0";
        let expected = Discard {
            block: 0,
            ranges: vec![(1, 2)],
        };
        assert_eq!(Discard::read(&command(right), &blocks()), Ok(expected));
        let wrong: [&[u8]; 4] = [
            &right[..right.len() - 1],
            b"\x01\x06pc.ram\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x20\0",
            b"\0\x06pc.ram\x01\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x20\0",
            b"\0\x06pc.rom\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x20\0",
        ];
        for payload in wrong {
            assert!(Discard::read(&command(payload), &blocks()).is_err());
        }
        let ping = Command {
            kind: CommandKind::Ping,
            payload: right,
        };
        assert!(Discard::read(&ping, &blocks()).is_err());
        let outside = Discard {
            block: 1,
            ranges: vec![(63, 2)],
        };
        assert!(outside.encode(&blocks(), &mut Vec::new()).is_err());
    }
}
