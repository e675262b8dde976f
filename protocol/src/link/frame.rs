//! The preamble and the frames of the link, little-endian.
//!
//! ```text
//! preamble  8 bytes "TRNSHUME" | u16 oldest version | u16 newest version | u32 zero
//! frame     u8 kind | 3 bytes zero | u32 payload length | u64 XXH3 of the first 8 bytes and payload
//! ```

use super::{LinkError, VERSION};
use xxhash_rust::xxh3::Xxh3;

/// Length of a preamble, in bytes.
pub const PREAMBLE_LEN: usize = 16;
/// Length of a frame's header, in bytes.
pub const FRAME_HEADER_LEN: usize = 16;
/// Longest payload of a frame, in bytes.
pub const MAX_FRAME_PAYLOAD: usize = 4 << 20;

const MAGIC: [u8; 8] = *b"TRNSHUME";

/// The first bytes of either side: the versions that it speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preamble {
    /// Oldest version.
    pub oldest: u16,
    /// Newest version.
    pub newest: u16,
}

impl Preamble {
    /// What this release sends.
    pub const OURS: Self = Self {
        oldest: VERSION,
        newest: VERSION,
    };

    /// The preamble's bytes.
    pub fn encode(self) -> [u8; PREAMBLE_LEN] {
        let mut out = [0; PREAMBLE_LEN];
        out[..8].copy_from_slice(&MAGIC);
        out[8..10].copy_from_slice(&self.oldest.to_le_bytes());
        out[10..12].copy_from_slice(&self.newest.to_le_bytes());
        out
    }

    /// Reads the peer's preamble.
    pub fn decode(bytes: &[u8; PREAMBLE_LEN]) -> Result<Self, LinkError> {
        if bytes[..8] != MAGIC {
            return Err(LinkError::NotTranshume);
        }
        Ok(Self {
            oldest: u16::from_le_bytes([bytes[8], bytes[9]]),
            newest: u16::from_le_bytes([bytes[10], bytes[11]]),
        })
    }

    /// The highest version that both sides speak.
    pub fn agree(self, peer: Self) -> Result<u16, LinkError> {
        let version = self.newest.min(peer.newest);
        if version < self.oldest || version < peer.oldest {
            return Err(LinkError::NoCommonVersion {
                oldest: peer.oldest,
                newest: peer.newest,
            });
        }
        Ok(version)
    }
}

/// What a frame carries. 0 is never a kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameKind {
    /// A [`super::Control`] message.
    Control = 1,
    /// Part of the hypervisor's stream, its pages taken out: see [`super::BatchReader`].
    Batch = 2,
    /// Where the guest says that clean page cache lies: [`super::HintRun`]s.
    Hints = 3,
    /// Pages that the destination asked for: a batch's format, with that batch's number.
    Fill = 4,
    /// What became of a batch's references to disk: [`super::Verdict`].
    Verdict = 5,
    /// Bytes of the hypervisor's return path.
    ReturnPath = 6,
    /// Sent when nothing else was, so that silence means a broken link.
    Alive = 7,
    /// Bytes of batches that the destination has worked off, as a `u64` since the start.
    Ack = 8,
}

impl FrameKind {
    fn decode(byte: u8) -> Result<Self, LinkError> {
        Ok(match byte {
            1 => Self::Control,
            2 => Self::Batch,
            3 => Self::Hints,
            4 => Self::Fill,
            5 => Self::Verdict,
            6 => Self::ReturnPath,
            7 => Self::Alive,
            8 => Self::Ack,
            other => return Err(LinkError::UnknownKind(other)),
        })
    }
}

/// A frame's header, checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// What the payload is.
    pub kind: FrameKind,
    /// Length of the payload in bytes, at most [`MAX_FRAME_PAYLOAD`].
    pub length: usize,
    sum: u64,
}

/// The checksum of a frame, over pieces of its payload in order.
pub struct Checksum(Xxh3);

impl Checksum {
    fn start(kind: FrameKind, length: u32) -> (Self, [u8; 8]) {
        let mut head = [0; 8];
        head[0] = kind as u8;
        head[4..8].copy_from_slice(&length.to_le_bytes());
        let mut hasher = Xxh3::new();
        hasher.update(&head);
        (Self(hasher), head)
    }
}

impl FrameHeader {
    /// Encodes the header for a payload given in pieces.
    pub fn encode<'a>(
        kind: FrameKind,
        pieces: impl Iterator<Item = &'a [u8]> + Clone,
    ) -> Result<[u8; FRAME_HEADER_LEN], LinkError> {
        let length: usize = pieces.clone().map(<[u8]>::len).sum();
        if length > MAX_FRAME_PAYLOAD {
            return Err(LinkError::TooLong(length as u64));
        }
        let length = u32::try_from(length).map_err(|_| LinkError::TooLong(length as u64))?;
        let (mut sum, head) = Checksum::start(kind, length);
        for piece in pieces {
            sum.0.update(piece);
        }
        let mut out = [0; FRAME_HEADER_LEN];
        out[..8].copy_from_slice(&head);
        out[8..].copy_from_slice(&sum.0.digest().to_le_bytes());
        Ok(out)
    }

    /// Decodes a header and bounds its length.
    pub fn decode(bytes: &[u8; FRAME_HEADER_LEN]) -> Result<Self, LinkError> {
        let kind = FrameKind::decode(bytes[0])?;
        if bytes[1..4] != [0; 3] {
            return Err(LinkError::OutOfBounds("reserved bytes of a frame"));
        }
        let length = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]) as usize;
        if length > MAX_FRAME_PAYLOAD {
            return Err(LinkError::TooLong(length as u64));
        }
        let mut sum = [0; 8];
        sum.copy_from_slice(&bytes[8..]);
        Ok(Self {
            kind,
            length,
            sum: u64::from_le_bytes(sum),
        })
    }

    /// Checks the payload against the header.
    pub fn check(&self, payload: &[u8]) -> Result<(), LinkError> {
        let length = u32::try_from(payload.len()).map_err(|_| LinkError::Checksum)?;
        let (mut sum, _) = Checksum::start(self.kind, length);
        sum.0.update(payload);
        if sum.0.digest() == self.sum {
            Ok(())
        } else {
            Err(LinkError::Checksum)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn frames_round_trip(payload in prop::collection::vec(any::<u8>(), 0..600), cut in 0_usize..600) {
            let (one, two) = payload.split_at(cut.min(payload.len()));
            let head = FrameHeader::encode(FrameKind::Batch, [one, two].into_iter()).unwrap();
            let header = FrameHeader::decode(&head).unwrap();
            prop_assert_eq!(header.kind, FrameKind::Batch);
            prop_assert_eq!(header.length, payload.len());
            prop_assert_eq!(header.check(&payload), Ok(()));
        }

        #[test]
        fn a_changed_byte_is_noticed(
            payload in prop::collection::vec(any::<u8>(), 1..600), at: prop::sample::Index, bit in 0_u8..8,
        ) {
            let head = FrameHeader::encode(FrameKind::Fill, [payload.as_slice()].into_iter()).unwrap();
            let mut changed = payload.clone();
            changed[at.index(payload.len())] ^= 1 << bit;
            prop_assert_eq!(FrameHeader::decode(&head).unwrap().check(&changed), Err(LinkError::Checksum));
        }

        #[test]
        fn no_header_panics(bytes: [u8; FRAME_HEADER_LEN], preamble: [u8; PREAMBLE_LEN]) {
            let _ = FrameHeader::decode(&bytes);
            let _ = Preamble::decode(&preamble);
        }
    }

    #[test]
    fn versions_are_agreed_or_refused() {
        let ours = Preamble {
            oldest: 2,
            newest: 4,
        };
        assert_eq!(
            ours.agree(Preamble {
                oldest: 1,
                newest: 3
            }),
            Ok(3)
        );
        assert_eq!(
            ours.agree(Preamble {
                oldest: 3,
                newest: 9
            }),
            Ok(4)
        );
        assert!(
            ours.agree(Preamble {
                oldest: 5,
                newest: 9
            })
            .is_err()
        );
        assert!(
            ours.agree(Preamble {
                oldest: 1,
                newest: 1
            })
            .is_err()
        );
        assert_eq!(Preamble::decode(&ours.encode()), Ok(ours));
        assert_eq!(
            Preamble::decode(b"SSH-2.0-OpenSSH_"),
            Err(LinkError::NotTranshume)
        );
    }
}
