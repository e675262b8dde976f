//! The return path: what the destination's QEMU says to the source's.
//!
//! A message is a `u16` type, a `u16` length and a payload, big-endian.

use super::encoder::put_name;
use super::reader::{Reader, Stop};
use super::{Error, MAX_NAME_LEN};

mod kind {
    pub(super) const SHUT: u16 = 1;
    pub(super) const PONG: u16 = 2;
    pub(super) const REQUEST_PAGES_OF: u16 = 3;
    pub(super) const REQUEST_PAGES: u16 = 4;
    pub(super) const RECEIVED_BITMAP: u16 = 5;
    pub(super) const RESUME_ACK: u16 = 6;
    pub(super) const SWITCHOVER_ACK: u16 = 7;
}

/// What follows the bits of a bitmap: `RAMBLOCK_RECV_BITMAP_ENDING` in QEMU's `migration/ram.c`.
const BITMAP_END: u64 = 0x0123_4567_89ab_cdef;

/// The number of the ping at the end of post-copy's package of devices, from QEMU 10.2 on:
/// `QEMU_VM_PING_PACKAGED_LOADED` in its `migration/savevm.h`. Its answer says that they are loaded.
pub const PACKAGE_LOADED: u32 = 0x42;

/// Longest message without its bitmap, in bytes.
pub const MAX_MESSAGE_LEN: usize = 4 + 8 + 8 + 1 + MAX_NAME_LEN;

/// A message of the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Message<'a> {
    /// The destination has loaded the VM (0) or failed to, and says no more.
    Shut {
        /// 0, or the error.
        error: u32,
    },
    /// Answers [`super::CommandKind::Ping`].
    Pong {
        /// The ping's number.
        number: u32,
    },
    /// Asks for pages of the named block.
    RequestPagesOf {
        /// The block's name.
        block: &'a str,
        /// First byte in the block.
        offset: u64,
        /// Length in bytes.
        length: u32,
    },
    /// Asks for pages of the block named last.
    RequestPages {
        /// First byte in the block.
        offset: u64,
        /// Length in bytes.
        length: u32,
    },
    /// The pages of a block that have come, when a broken post-copy is resumed.
    Received {
        /// The block's name.
        block: &'a str,
        /// A bit a page, the first page's lowest in the first byte; a multiple of 8 bytes long.
        bitmap: &'a [u8],
    },
    /// The destination is ready to resume a broken post-copy.
    ResumeAck {
        /// Always 1.
        value: u32,
    },
    /// The destination is ready for the switch. QEMU from 8.1 on.
    SwitchoverAck,
}

impl<'a> Message<'a> {
    /// Decodes the message at the start of `input`: it and the bytes that it used, or `None` when more
    /// bytes are needed, which is never so with [`MAX_MESSAGE_LEN`] of them. [`Self::Received`] is refused.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(input: &'a [u8]) -> Result<Option<(Self, usize)>, Error> {
        Self::decode_resumed(input, 0)
    }

    /// The same while a broken post-copy is resumed: bitmaps of up to `most` bytes may come, and with so many
    /// bytes more than [`MAX_MESSAGE_LEN`] no more are needed.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode_resumed(input: &'a [u8], most: usize) -> Result<Option<(Self, usize)>, Error> {
        let mut reader = Reader::new(input);
        match Self::read(&mut reader, most) {
            Ok(message) => Ok(Some((message, reader.used()))),
            Err(Stop::More) => Ok(None),
            Err(Stop::Failed(error)) => Err(error),
        }
    }

    fn read(reader: &mut Reader<'a>, most: usize) -> Result<Self, Stop> {
        let kind = reader.u16()?;
        if !(kind::SHUT..=kind::SWITCHOVER_ACK).contains(&kind) {
            return Err(Error::UnknownMessage(kind).into());
        }
        let length = reader.u16()?;
        let wrong = || Stop::from(Error::MessageLength { kind, length });
        match (kind, length) {
            (kind::SHUT, 4) => Ok(Self::Shut {
                error: reader.u32()?,
            }),
            (kind::PONG, 4) => Ok(Self::Pong {
                number: reader.u32()?,
            }),
            (kind::REQUEST_PAGES_OF, 14..=268) => {
                let offset = reader.u64()?;
                let pages = reader.u32()?;
                if u16::from(reader.peek()?) != length - 13 {
                    return Err(wrong());
                }
                Ok(Self::RequestPagesOf {
                    block: reader.name("RAM block")?,
                    offset,
                    length: pages,
                })
            }
            (kind::REQUEST_PAGES, 12) => Ok(Self::RequestPages {
                offset: reader.u64()?,
                length: reader.u32()?,
            }),
            (kind::RECEIVED_BITMAP, 2..=256) => {
                if u16::from(reader.peek()?) != length - 1 {
                    return Err(wrong());
                }
                let block = reader.name("RAM block")?;
                // The rest is not counted in the length.
                let bytes = reader.u64()?;
                let bitmap = usize::try_from(bytes).ok();
                let bitmap =
                    bitmap.filter(|bytes| (1..=most).contains(bytes) && bytes.is_multiple_of(8));
                let bitmap = reader.bytes(bitmap.ok_or(Error::ReceivedBitmap(bytes))?)?;
                if reader.u64()? != BITMAP_END {
                    return Err(Error::ReceivedBitmap(bytes).into());
                }
                Ok(Self::Received { block, bitmap })
            }
            (kind::RESUME_ACK, 4) => Ok(Self::ResumeAck {
                value: reader.u32()?,
            }),
            (kind::SWITCHOVER_ACK, 0) => Ok(Self::SwitchoverAck),
            _ => Err(wrong()),
        }
    }

    /// Appends the message. A block's name is cut after 255 bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut head = |kind: u16, length: u16| {
            out.extend_from_slice(&kind.to_be_bytes());
            out.extend_from_slice(&length.to_be_bytes());
        };
        match *self {
            Self::Shut { error: value } => {
                head(kind::SHUT, 4);
                out.extend_from_slice(&value.to_be_bytes());
            }
            Self::Pong { number: value } => {
                head(kind::PONG, 4);
                out.extend_from_slice(&value.to_be_bytes());
            }
            Self::RequestPagesOf {
                block,
                offset,
                length,
            } => {
                let name = u16::try_from(block.len().min(MAX_NAME_LEN)).unwrap_or(u16::MAX);
                head(kind::REQUEST_PAGES_OF, 13 + name);
                out.extend_from_slice(&offset.to_be_bytes());
                out.extend_from_slice(&length.to_be_bytes());
                put_name(block, out);
            }
            Self::RequestPages { offset, length } => {
                head(kind::REQUEST_PAGES, 12);
                out.extend_from_slice(&offset.to_be_bytes());
                out.extend_from_slice(&length.to_be_bytes());
            }
            Self::Received { block, bitmap } => {
                let name = u16::try_from(block.len().min(MAX_NAME_LEN)).unwrap_or(u16::MAX);
                head(kind::RECEIVED_BITMAP, 1 + name);
                put_name(block, out);
                out.extend_from_slice(&(bitmap.len() as u64).to_be_bytes());
                out.extend_from_slice(bitmap);
                out.extend_from_slice(&BITMAP_END.to_be_bytes());
            }
            Self::ResumeAck { value } => {
                head(kind::RESUME_ACK, 4);
                out.extend_from_slice(&value.to_be_bytes());
            }
            Self::SwitchoverAck => head(kind::SWITCHOVER_ACK, 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn encoded(message: &Message<'_>) -> Vec<u8> {
        let mut out = Vec::new();
        message.encode(&mut out);
        out
    }

    proptest! {
        #[test]
        fn messages_survive_any_cut(
            error: u32, number: u32, name in "[a-z0-9.:/@]{1,40}|x{255}", offset: u64, length: u32, value: u32,
        ) {
            let sent = [
                Message::Pong { number },
                Message::RequestPagesOf { block: &name, offset, length },
                Message::RequestPages { offset, length },
                Message::ResumeAck { value },
                Message::SwitchoverAck,
                Message::Shut { error },
            ];
            for message in sent {
                let mut bytes = encoded(&message);
                let whole = bytes.len();
                prop_assert!(whole <= MAX_MESSAGE_LEN);
                for cut in 0..whole {
                    prop_assert_eq!(Message::decode(&bytes[..cut]), Ok(None));
                }
                bytes.extend_from_slice(&[0xff; 7]);
                prop_assert_eq!(Message::decode(&bytes), Ok(Some((message, whole))));
            }
        }

        #[test]
        fn a_decoded_message_is_what_was_there(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let mut bytes = bytes;
            // Mostly a type and a length that exist.
            if let [_, kind, high, length, ..] = &mut bytes[..] {
                *kind %= 9;
                *high = 0;
                *length = [0, 4, 12, 14, 30][usize::from(*length % 5)];
            }
            if let Some(first) = bytes.first_mut() {
                *first = 0;
            }
            match Message::decode(&bytes) {
                Ok(Some((message, used))) => prop_assert_eq!(&encoded(&message), &bytes[..used]),
                Ok(None) => prop_assert!(bytes.len() < MAX_MESSAGE_LEN),
                Err(_) => {}
            }
        }
    }

    #[test]
    fn a_bitmap_is_taken_when_it_may_come() {
        let bitmap = [0xff, 1, 0, 0, 0, 0, 0, 0x80];
        let message = Message::Received {
            block: "pc.ram",
            bitmap: &bitmap,
        };
        let mut bytes = encoded(&message);
        let whole = bytes.len();
        for cut in 0..whole {
            assert_eq!(Message::decode_resumed(&bytes[..cut], 8), Ok(None));
        }
        assert_eq!(
            Message::decode_resumed(&bytes, 8),
            Ok(Some((message, whole)))
        );
        let refused = Err(Error::ReceivedBitmap(8));
        assert_eq!(Message::decode(&bytes), refused);
        let none = encoded(&Message::Received {
            block: "pc.ram",
            bitmap: &[],
        });
        assert_eq!(Message::decode(&none), Err(Error::ReceivedBitmap(0)));
        // Its end, then its length.
        bytes[whole - 1] += 1;
        assert_eq!(Message::decode_resumed(&bytes, 8), refused);
        bytes[18] = 7;
        assert_eq!(
            Message::decode_resumed(&bytes, 8),
            Err(Error::ReceivedBitmap(7))
        );
    }

    #[test]
    fn a_name_longer_than_its_message_is_refused() {
        let mut bytes = encoded(&Message::RequestPagesOf {
            block: "pc.ram",
            offset: 0,
            length: 4096,
        });
        bytes[16] += 1;
        let wrong = Error::MessageLength {
            kind: 3,
            length: 19,
        };
        assert_eq!(Message::decode(&bytes), Err(wrong));
    }
}
