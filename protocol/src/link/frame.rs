//! The preamble and the frames of the link, little-endian.
//!
//! ```text
//! preamble  8 bytes "TRNSHUME" | u16 oldest version | u16 newest version | u32 zero
//! frame     u8 kind | 3 bytes zero | u32 payload length | u64 number | u64 taken
//!           | u64 XXH3 of the first 24 bytes and, where nothing else protects it, the payload
//! ```
//!
//! Frames of a session are numbered from 1 on in each direction, over all of its connections, so that
//! one that was lost with a connection can be sent again on another. Number 0 is outside of the order.

use super::{LinkError, VERSION};
use xxhash_rust::xxh3::Xxh3;

/// Length of a preamble, in bytes.
pub const PREAMBLE_LEN: usize = 16;
/// Length of a frame's header, in bytes.
pub const FRAME_HEADER_LEN: usize = 32;
/// Of these, bytes that the checksum covers.
const SUMMED_LEN: usize = 24;
/// Longest payload of a frame, in bytes.
pub const MAX_FRAME_PAYLOAD: usize = 4 << 20;
/// Longest payload of a frame that carries no pages, in bytes: twice the longest definition of a VM.
pub const MAX_SMALL_PAYLOAD: usize = 512 << 10;

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
    /// The session is over: whoever reads this need not wait for another connection.
    Bye = 9,
}

impl FrameKind {
    /// Longest payload of such a frame, in bytes: whoever says nothing but a length has no more memory kept for it.
    pub fn longest(self) -> usize {
        match self {
            Self::Batch | Self::Fill => MAX_FRAME_PAYLOAD,
            _ => MAX_SMALL_PAYLOAD,
        }
    }

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
            9 => Self::Bye,
            other => return Err(LinkError::UnknownKind(other)),
        })
    }
}

/// A frame's place among those of a session.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Numbering {
    /// Its number in its direction, from 1; 0 outside of the order.
    pub number: u64,
    /// How many frames of the other direction its sender has worked off.
    pub taken: u64,
}

/// What a frame's checksum covers; both sides know which it is by the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cover {
    /// Header and payload.
    Whole,
    /// The header: TLS authenticates every byte of the payload already.
    Header,
}

/// A frame's header, checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// What the payload is.
    pub kind: FrameKind,
    /// Length of the payload in bytes, at most [`FrameKind::longest`].
    pub length: usize,
    /// Where it belongs.
    pub numbering: Numbering,
    sum: u64,
}

/// The header's first bytes, without a payload longer than one may be.
fn head(
    kind: FrameKind,
    length: usize,
    numbering: Numbering,
) -> Result<[u8; SUMMED_LEN], LinkError> {
    let too_long = LinkError::TooLong(length as u64);
    let length = match u32::try_from(length) {
        Ok(short) if length <= kind.longest() => short,
        _ => return Err(too_long),
    };
    let mut head = [0; SUMMED_LEN];
    head[0] = kind as u8;
    head[4..8].copy_from_slice(&length.to_le_bytes());
    head[8..16].copy_from_slice(&numbering.number.to_le_bytes());
    head[16..24].copy_from_slice(&numbering.taken.to_le_bytes());
    Ok(head)
}

fn checksum<'a>(
    head: &[u8; SUMMED_LEN],
    cover: Cover,
    pieces: impl Iterator<Item = &'a [u8]>,
) -> u64 {
    let mut sum = Xxh3::new();
    sum.update(head);
    if cover == Cover::Whole {
        for piece in pieces {
            sum.update(piece);
        }
    }
    sum.digest()
}

impl FrameHeader {
    /// Encodes the header for a payload given in pieces.
    pub fn encode<'a>(
        kind: FrameKind,
        numbering: Numbering,
        cover: Cover,
        pieces: impl Iterator<Item = &'a [u8]> + Clone,
    ) -> Result<[u8; FRAME_HEADER_LEN], LinkError> {
        let length = pieces.clone().map(<[u8]>::len).sum();
        let head = head(kind, length, numbering)?;
        let mut out = [0; FRAME_HEADER_LEN];
        out[..SUMMED_LEN].copy_from_slice(&head);
        out[SUMMED_LEN..].copy_from_slice(&checksum(&head, cover, pieces).to_le_bytes());
        Ok(out)
    }

    /// Decodes a header and bounds its length.
    pub fn decode(bytes: &[u8; FRAME_HEADER_LEN]) -> Result<Self, LinkError> {
        let number = |at: usize| {
            let mut number = [0; 8];
            number.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(number)
        };
        let kind = FrameKind::decode(bytes[0])?;
        if bytes[1..4] != [0; 3] {
            return Err(LinkError::OutOfBounds("reserved bytes of a frame"));
        }
        let length = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]) as usize;
        if length > kind.longest() {
            return Err(LinkError::TooLong(length as u64));
        }
        Ok(Self {
            kind,
            length,
            numbering: Numbering {
                number: number(8),
                taken: number(16),
            },
            sum: number(24),
        })
    }

    /// Checks the payload against the header.
    pub fn check(&self, cover: Cover, payload: &[u8]) -> Result<(), LinkError> {
        let head = head(self.kind, payload.len(), self.numbering)?;
        if checksum(&head, cover, core::iter::once(payload)) == self.sum {
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
        fn frames_round_trip(
            payload in prop::collection::vec(any::<u8>(), 0..600), cut in 0_usize..600, number: u64, taken: u64,
            whole: bool,
        ) {
            let cover = if whole { Cover::Whole } else { Cover::Header };
            let (one, two) = payload.split_at(cut.min(payload.len()));
            let numbering = Numbering { number, taken };
            let head = FrameHeader::encode(FrameKind::Batch, numbering, cover, [one, two].into_iter()).unwrap();
            let header = FrameHeader::decode(&head).unwrap();
            prop_assert_eq!(header.numbering, numbering);
            prop_assert_eq!(header.kind, FrameKind::Batch);
            prop_assert_eq!(header.length, payload.len());
            prop_assert_eq!(header.check(cover, &payload), Ok(()));
        }

        #[test]
        fn a_changed_byte_is_noticed(
            payload in prop::collection::vec(any::<u8>(), 1..600), at: prop::sample::Index, bit in 0_u8..8,
        ) {
            let head = FrameHeader::encode(FrameKind::Fill, Numbering::default(), Cover::Whole, [payload.as_slice()].into_iter()).unwrap();
            let mut changed = payload.clone();
            changed[at.index(payload.len())] ^= 1 << bit;
            prop_assert_eq!(FrameHeader::decode(&head).unwrap().check(Cover::Whole, &changed), Err(LinkError::Checksum));
        }

        #[test]
        fn a_changed_place_is_noticed(number: u64, at in 8_usize..24, bit in 0_u8..8, whole: bool) {
            let cover = if whole { Cover::Whole } else { Cover::Header };
            let numbering = Numbering { number, taken: 7 };
            let mut head = FrameHeader::encode(FrameKind::Ack, numbering, cover, [].into_iter()).unwrap();
            head[at] ^= 1 << bit;
            prop_assert_eq!(FrameHeader::decode(&head).unwrap().check(cover, &[]), Err(LinkError::Checksum));
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
