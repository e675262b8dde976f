//! The handshake: greeting, client flags, option GO and its replies.

use super::{NbdError, be16, be32, be64};

const MAGIC: u64 = 0x4e42_444d_4147_4943; // "NBDMAGIC"
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054; // "IHAVEOPT"
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

const FIXED_NEWSTYLE: u16 = 1;
const NO_ZEROES: u16 = 1 << 1;

const OPTION_GO: u32 = 7;
const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;

const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_IS_ERROR: u32 = 1 << 31;

/// Length of the greeting, in bytes.
pub const GREETING_LEN: usize = 18;
/// Length of the client's flags, in bytes.
pub const CLIENT_FLAGS_LEN: usize = 4;
/// Longest export name used here, in bytes (the protocol allows 4,096).
pub const MAX_NAME_LEN: usize = 256;
/// Longest GO option, in bytes.
pub const MAX_GO_LEN: usize = 16 + 4 + MAX_NAME_LEN + 2 + 2;
/// Length of an option reply's header, in bytes.
pub const OPTION_REPLY_HEADER_LEN: usize = 20;
/// Longest payload of an option reply that is taken, in bytes: a string of NBD's longest, and room
/// for the fields before it.
pub const MAX_OPTION_REPLY_LEN: usize = 4096 + 64;

/// What the server says first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Greeting {
    /// Whether the server leaves out 124 zero bytes after an export's description.
    pub no_zeroes: bool,
}

impl Greeting {
    /// Decodes a greeting; servers without the fixed newstyle handshake are refused.
    pub fn decode(bytes: &[u8; GREETING_LEN]) -> Result<Self, NbdError> {
        let what = "the server's greeting";
        let short = NbdError::TooShort {
            what,
            length: bytes.len(),
        };
        let magic = be64(bytes, 0).ok_or(short)?;
        if magic != MAGIC {
            return Err(NbdError::Magic { what, found: magic });
        }
        if be64(bytes, 8).ok_or(short)? != OPTION_MAGIC {
            return Err(NbdError::OldStyle);
        }
        let flags = be16(bytes, 16).ok_or(short)?;
        if flags & FIXED_NEWSTYLE == 0 {
            return Err(NbdError::OldStyle);
        }
        Ok(Self {
            no_zeroes: flags & NO_ZEROES != 0,
        })
    }

    /// Encodes a greeting of the fixed newstyle handshake.
    pub fn encode(self) -> [u8; GREETING_LEN] {
        let mut out = [0; GREETING_LEN];
        let flags = FIXED_NEWSTYLE | if self.no_zeroes { NO_ZEROES } else { 0 };
        out[..8].copy_from_slice(&MAGIC.to_be_bytes());
        out[8..16].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
        out[16..].copy_from_slice(&flags.to_be_bytes());
        out
    }
}

/// Encodes the client's answer to a greeting.
pub fn encode_client_flags(greeting: Greeting) -> [u8; CLIENT_FLAGS_LEN] {
    let flags = FIXED_NEWSTYLE | if greeting.no_zeroes { NO_ZEROES } else { 0 };
    u32::from(flags).to_be_bytes()
}

/// The option GO: use this export, and tell its block sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GoOption<'a> {
    /// The export's name, of at most [`MAX_NAME_LEN`] bytes.
    pub export: &'a [u8],
}

impl GoOption<'_> {
    /// Encodes the option into `out` and returns its length in bytes.
    pub fn encode(self, out: &mut [u8; MAX_GO_LEN]) -> Result<usize, NbdError> {
        let length = self.export.len();
        let too_long = NbdError::TooLong {
            what: "the export's name",
            length: length as u64,
            limit: MAX_NAME_LEN,
        };
        if length > MAX_NAME_LEN {
            return Err(too_long);
        }
        let name_len = u32::try_from(length).map_err(|_| too_long)?;
        out[..8].copy_from_slice(&OPTION_MAGIC.to_be_bytes());
        out[8..12].copy_from_slice(&OPTION_GO.to_be_bytes());
        out[12..16].copy_from_slice(&(4 + name_len + 2 + 2).to_be_bytes());
        out[16..20].copy_from_slice(&name_len.to_be_bytes());
        out[20..20 + length].copy_from_slice(self.export);
        out[20 + length..22 + length].copy_from_slice(&1_u16.to_be_bytes());
        out[22 + length..24 + length].copy_from_slice(&INFO_BLOCK_SIZE.to_be_bytes());
        Ok(24 + length)
    }
}

/// What an option reply is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OptionReplyKind {
    /// The option is granted; for GO, requests may follow.
    Ack,
    /// One fact about the export; see [`Info`].
    Info,
    /// The option is refused, with NBD's error code less its top bit.
    Refused(u32),
}

/// Header of a reply to the option GO.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionReply {
    /// What the reply is.
    pub kind: OptionReplyKind,
    /// Length of the payload that follows, in bytes, at most [`MAX_OPTION_REPLY_LEN`].
    pub length: usize,
}

impl OptionReply {
    /// Decodes a header; a payload that would be too long is refused.
    pub fn decode(bytes: &[u8; OPTION_REPLY_HEADER_LEN]) -> Result<Self, NbdError> {
        let what = "an option's reply";
        let short = NbdError::TooShort {
            what,
            length: bytes.len(),
        };
        let magic = be64(bytes, 0).ok_or(short)?;
        if magic != OPTION_REPLY_MAGIC {
            return Err(NbdError::Magic { what, found: magic });
        }
        let option = be32(bytes, 8).ok_or(short)?;
        if option != OPTION_GO {
            return Err(NbdError::Value {
                what: "the option replied to",
                found: option.into(),
            });
        }
        let kind = match be32(bytes, 12).ok_or(short)? {
            REPLY_ACK => OptionReplyKind::Ack,
            REPLY_INFO => OptionReplyKind::Info,
            code if code & REPLY_IS_ERROR != 0 => OptionReplyKind::Refused(code & !REPLY_IS_ERROR),
            code => {
                return Err(NbdError::Value {
                    what: "an option reply's type",
                    found: code.into(),
                });
            }
        };
        let length = be32(bytes, 16).ok_or(short)?;
        let too_long = NbdError::TooLong {
            what,
            length: length.into(),
            limit: MAX_OPTION_REPLY_LEN,
        };
        let length = usize::try_from(length).map_err(|_| too_long)?;
        if length > MAX_OPTION_REPLY_LEN {
            return Err(too_long);
        }
        Ok(Self { kind, length })
    }

    /// Encodes a header.
    pub fn encode(self) -> Result<[u8; OPTION_REPLY_HEADER_LEN], NbdError> {
        let kind = match self.kind {
            OptionReplyKind::Ack => REPLY_ACK,
            OptionReplyKind::Info => REPLY_INFO,
            OptionReplyKind::Refused(code) => code | REPLY_IS_ERROR,
        };
        let length = u32::try_from(self.length).map_err(|_| NbdError::TooLong {
            what: "an option's reply",
            length: self.length as u64,
            limit: MAX_OPTION_REPLY_LEN,
        })?;
        let mut out = [0; OPTION_REPLY_HEADER_LEN];
        out[..8].copy_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
        out[8..12].copy_from_slice(&OPTION_GO.to_be_bytes());
        out[12..16].copy_from_slice(&kind.to_be_bytes());
        out[16..].copy_from_slice(&length.to_be_bytes());
        Ok(out)
    }
}

/// Size and abilities of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Export {
    /// Size in bytes.
    pub size: u64,
    /// NBD's transmission flags.
    pub flags: u16,
}

/// What requests an export takes, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of this: a power of two of at most 64 KiB.
    pub minimum: u32,
    /// Offsets and lengths that are fast.
    pub preferred: u32,
    /// The longest read or write.
    pub maximum: u32,
}

/// One fact about an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Info {
    /// Size and abilities.
    Export(Export),
    /// What requests it takes.
    BlockSizes(BlockSizes),
    /// Something that was not asked for.
    Other(u16),
}

impl Info {
    /// Decodes the payload of an [`OptionReplyKind::Info`] reply.
    pub fn decode(bytes: &[u8]) -> Result<Self, NbdError> {
        let short = NbdError::TooShort {
            what: "an export's description",
            length: bytes.len(),
        };
        match be16(bytes, 0).ok_or(short)? {
            INFO_EXPORT => Ok(Self::Export(Export {
                size: be64(bytes, 2).ok_or(short)?,
                flags: be16(bytes, 10).ok_or(short)?,
            })),
            INFO_BLOCK_SIZE => {
                let sizes = BlockSizes {
                    minimum: be32(bytes, 2).ok_or(short)?,
                    preferred: be32(bytes, 6).ok_or(short)?,
                    maximum: be32(bytes, 10).ok_or(short)?,
                };
                if !sizes.minimum.is_power_of_two() || sizes.minimum > 64 * 1024 {
                    return Err(NbdError::Value {
                        what: "an export's minimum block size",
                        found: sizes.minimum.into(),
                    });
                }
                if sizes.maximum < sizes.minimum {
                    return Err(NbdError::Value {
                        what: "an export's maximum block size",
                        found: sizes.maximum.into(),
                    });
                }
                Ok(Self::BlockSizes(sizes))
            }
            other => Ok(Self::Other(other)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn go_is_what_the_protocol_says() {
        let mut out = [0; MAX_GO_LEN];
        let length = GoOption { export: b"disk" }.encode(&mut out).unwrap();
        let mut expected = b"IHAVEOPT".to_vec();
        expected.extend_from_slice(&[0, 0, 0, 7, 0, 0, 0, 12, 0, 0, 0, 4]);
        expected.extend_from_slice(b"disk");
        expected.extend_from_slice(&[0, 1, 0, 3]);
        assert_eq!(&out[..length], &expected[..]);
    }

    #[test]
    fn a_name_too_long_is_refused() {
        let name = [b'x'; MAX_NAME_LEN + 1];
        let mut out = [0; MAX_GO_LEN];
        assert!(GoOption { export: &name }.encode(&mut out).is_err());
        let whole = GoOption {
            export: &name[..MAX_NAME_LEN],
        };
        assert_eq!(whole.encode(&mut out), Ok(MAX_GO_LEN));
    }

    #[test]
    fn old_servers_are_refused() {
        let mut old = Greeting { no_zeroes: true }.encode();
        old[17] = 2;
        assert_eq!(Greeting::decode(&old), Err(NbdError::OldStyle));
        old[8..16].copy_from_slice(&0x0000_4202_8186_1253_u64.to_be_bytes());
        assert_eq!(Greeting::decode(&old), Err(NbdError::OldStyle));
    }

    #[test]
    fn a_reply_longer_than_the_bound_is_refused() {
        let reply = |length| OptionReply {
            kind: OptionReplyKind::Info,
            length,
        };
        let bytes = reply(MAX_OPTION_REPLY_LEN + 1).encode().unwrap();
        assert!(matches!(
            OptionReply::decode(&bytes),
            Err(NbdError::TooLong { .. })
        ));
        let bytes = reply(MAX_OPTION_REPLY_LEN).encode().unwrap();
        assert_eq!(OptionReply::decode(&bytes), Ok(reply(MAX_OPTION_REPLY_LEN)));
    }

    #[test]
    fn block_sizes_must_make_sense() {
        let info = |minimum: u32, maximum: u32| {
            let mut bytes = 3_u16.to_be_bytes().to_vec();
            for field in [minimum, 4096, maximum] {
                bytes.extend_from_slice(&field.to_be_bytes());
            }
            Info::decode(&bytes)
        };
        assert!(info(512, 1 << 25).is_ok());
        assert!(info(0, 1 << 25).is_err());
        assert!(info(513, 1 << 25).is_err());
        assert!(info(1 << 17, 1 << 25).is_err());
        assert!(info(512, 511).is_err());
    }

    proptest! {
        #[test]
        fn greetings_come_back(no_zeroes: bool) {
            let greeting = Greeting { no_zeroes };
            prop_assert_eq!(Greeting::decode(&greeting.encode()), Ok(greeting));
        }

        #[test]
        fn any_info_is_taken_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            // Only the first bytes count, and nothing panics.
            let first = Info::decode(&bytes);
            let mut longer = bytes.clone();
            longer.push(0);
            if first.is_ok() {
                prop_assert_eq!(Info::decode(&longer), first);
            }
        }

        #[test]
        fn any_reply_header_is_taken_or_refused(bytes: [u8; OPTION_REPLY_HEADER_LEN]) {
            if let Ok(reply) = OptionReply::decode(&bytes) {
                prop_assert_eq!(reply.encode(), Ok(bytes));
            }
        }
    }
}
