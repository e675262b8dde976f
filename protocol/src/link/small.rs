//! Payloads of the small frames: hints, verdicts, acknowledgements. Integers are LEB128.

use super::LinkError;
use crate::varint;

fn get(payload: &[u8], at: &mut usize) -> Result<u64, LinkError> {
    let (value, next) = varint::get(payload, *at).ok_or(LinkError::Short("integer"))?;
    *at = next;
    Ok(value)
}

pub(super) fn put(out: &mut Vec<u8>, value: u64) {
    let mut bytes = [0; varint::MAX_LEN];
    if let Some(length) = varint::put(&mut bytes, 0, value) {
        out.extend_from_slice(&bytes[..length]);
    }
}

/// Clean page cache by the guest's word: pages of a RAM block, and where on which disk they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HintRun {
    /// Number of the RAM block in QEMU's table.
    pub block: u16,
    /// First page in the block, in units of 4 KiB.
    pub page: u64,
    /// Number of pages, at least 1.
    pub pages: u32,
    /// Number of the disk in the VM's definition.
    pub disk: u16,
    /// First sector of 512 bytes.
    pub sector: u64,
}

/// Appends a run to the payload of a `Hints` frame.
pub fn encode_hint(out: &mut Vec<u8>, run: &HintRun) {
    for value in [
        u64::from(run.block),
        run.page,
        u64::from(run.pages),
        u64::from(run.disk),
        run.sector,
    ] {
        put(out, value);
    }
}

/// The runs of a `Hints` frame.
pub fn decode_hints(payload: &[u8]) -> impl Iterator<Item = Result<HintRun, LinkError>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        if at >= payload.len() {
            return None;
        }
        let run = decode_hint(payload, &mut at);
        if run.is_err() {
            at = payload.len();
        }
        Some(run)
    })
}

fn decode_hint(payload: &[u8], at: &mut usize) -> Result<HintRun, LinkError> {
    let block = get(payload, at)?;
    let page = get(payload, at)?;
    let pages = get(payload, at)?;
    let disk = get(payload, at)?;
    let sector = get(payload, at)?;
    let run = HintRun {
        block: u16::try_from(block).map_err(|_| LinkError::OutOfBounds("block of a hint"))?,
        page,
        pages: u32::try_from(pages).map_err(|_| LinkError::OutOfBounds("pages of a hint"))?,
        disk: u16::try_from(disk).map_err(|_| LinkError::OutOfBounds("disk of a hint"))?,
        sector,
    };
    if run.pages == 0 {
        return Err(LinkError::OutOfBounds("pages of a hint"));
    }
    Ok(run)
}

/// What became of references of one batch.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Verdict {
    /// The batch.
    pub batch: u64,
    /// How many more of its references are settled: the disk had the page, or a later record replaced it.
    pub settled: u32,
    /// References, numbered in their order in the batch, whose pages must be sent.
    pub wanted: Vec<u32>,
}

impl Verdict {
    /// Encodes the verdict as a frame's payload.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(16 + 2 * self.wanted.len());
        put(&mut out, self.batch);
        put(&mut out, u64::from(self.settled));
        for &reference in &self.wanted {
            put(&mut out, u64::from(reference));
        }
        out
    }

    /// Decodes a verdict.
    pub fn decode(payload: &[u8]) -> Result<Self, LinkError> {
        let mut at = 0;
        let batch = get(payload, &mut at)?;
        let settled = u32::try_from(get(payload, &mut at)?)
            .map_err(|_| LinkError::OutOfBounds("settled references"))?;
        let mut wanted = Vec::new();
        while at < payload.len() {
            let reference = u32::try_from(get(payload, &mut at)?)
                .map_err(|_| LinkError::OutOfBounds("number of a reference"))?;
            wanted.push(reference);
        }
        Ok(Self {
            batch,
            settled,
            wanted,
        })
    }
}

/// What the destination has done since the start. Two integers of 64 bits, little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ack {
    /// Bytes of batches that were worked off.
    pub batch_bytes: u64,
    /// Bytes that were read from disks.
    pub disk_bytes: u64,
}

impl Ack {
    /// Encodes the acknowledgement as a frame's payload.
    pub fn encode(&self) -> [u8; 16] {
        let mut out = [0; 16];
        out[..8].copy_from_slice(&self.batch_bytes.to_le_bytes());
        out[8..].copy_from_slice(&self.disk_bytes.to_le_bytes());
        out
    }

    /// Decodes an acknowledgement.
    pub fn decode(payload: &[u8]) -> Result<Self, LinkError> {
        match payload.as_chunks::<8>() {
            ([batch_bytes, disk_bytes], []) => Ok(Self {
                batch_bytes: u64::from_le_bytes(*batch_bytes),
                disk_bytes: u64::from_le_bytes(*disk_bytes),
            }),
            _ => Err(LinkError::Short("acknowledgement")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn hints_round_trip(
            runs in prop::collection::vec((any::<u16>(), any::<u64>(), 1_u32.., any::<u16>(), any::<u64>()), 0..50),
        ) {
            let runs: Vec<HintRun> = runs.into_iter()
                .map(|(block, page, pages, disk, sector)| HintRun { block, page, pages, disk, sector })
                .collect();
            let mut payload = Vec::new();
            for run in &runs {
                encode_hint(&mut payload, run);
            }
            prop_assert_eq!(decode_hints(&payload).collect::<Result<Vec<_>, _>>(), Ok(runs));
        }

        #[test]
        fn verdicts_round_trip(batch: u64, settled: u32, wanted in prop::collection::vec(any::<u32>(), 0..50)) {
            let verdict = Verdict { batch, settled, wanted };
            prop_assert_eq!(Verdict::decode(&verdict.encode()), Ok(verdict));
        }

        #[test]
        fn acknowledgements_round_trip(batch_bytes: u64, disk_bytes: u64) {
            let ack = Ack { batch_bytes, disk_bytes };
            prop_assert_eq!(Ack::decode(&ack.encode()), Ok(ack));
        }

        #[test]
        fn no_payload_panics(payload in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Verdict::decode(&payload);
            let _ = decode_hints(&payload).count();
            let _ = Ack::decode(&payload);
        }
    }
}
