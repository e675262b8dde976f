//! Where a disk's recent past shows: blocks that are written when a file system is mounted and while it is used. A copy
//! that was made some time ago is equal to its disk nearly everywhere, and not there.
//!
//! What is read here was written by the guest: it only leads to blocks that are compared, each number of them checked
//! against the disk's length.

use transhume_protocol::link::COMPARED_BLOCK;

const BLOCK: u64 = COMPARED_BLOCK as u64;
const SECTOR: u64 = 512;
/// Partitions that are looked into, at most.
const PARTITIONS: usize = 16;
/// Blocks of one journal that are compared, at most.
const JOURNAL: u64 = 32;
const EXTENTS: u16 = 0xf30a;
const XFS_LOG: u32 = 0xfeed_babe;
const JOURNAL_MAGIC: u32 = 0xc03b_3998;

/// A block of the disk, by its number.
pub(super) type Block = Box<[u8; COMPARED_BLOCK]>;

/// Reads blocks of one disk, and collects their numbers.
struct Look<R> {
    read: R,
    /// The disk's length in bytes.
    length: u64,
    places: Vec<u64>,
}

/// Blocks of a raw disk that tell of its past.
pub(super) fn of_raw(length: u64, read: impl FnMut(u64) -> Option<Block>) -> Vec<u64> {
    let mut look = Look {
        read,
        length,
        places: Vec::new(),
    };
    look.note(0, 4 * BLOCK);
    look.note(length.saturating_sub(9 * BLOCK), 9 * BLOCK);
    look.file_system(0);
    for start in look.partitions() {
        look.note(start, 2 * BLOCK);
        look.file_system(start);
    }
    look.places.sort_unstable();
    look.places.dedup();
    look.places
}

/// Blocks of a qcow2 image that tell of its past: the header, its first table, and what was appended last.
pub(super) fn of_qcow2(length: u64, read: impl FnMut(u64) -> Option<Block>) -> Vec<u64> {
    let mut look = Look {
        read,
        length,
        places: Vec::new(),
    };
    look.note(0, 2 * BLOCK);
    if let Some(table) = look.big(40, 8) {
        let entries = look.big(36, 4).unwrap_or_default();
        look.note(table, (entries * 8).clamp(1, JOURNAL * BLOCK));
    }
    look.note(length.saturating_sub(JOURNAL * BLOCK), JOURNAL * BLOCK);
    look.places.sort_unstable();
    look.places.dedup();
    look.places
}

impl<R: FnMut(u64) -> Option<Block>> Look<R> {
    /// Has the blocks of a range compared.
    fn note(&mut self, start: u64, bytes: u64) {
        let end = start.saturating_add(bytes).min(self.length).div_ceil(BLOCK);
        self.places.extend(start / BLOCK..end);
    }

    /// The bytes at an offset, which do not reach across a block's end.
    fn bytes(&mut self, offset: u64, count: usize) -> Option<Vec<u8>> {
        if offset >= self.length {
            return None;
        }
        let block = (self.read)(offset / BLOCK)?;
        let at = usize::try_from(offset % BLOCK).ok()?;
        block.get(at..at.checked_add(count)?).map(<[u8]>::to_vec)
    }

    fn big(&mut self, offset: u64, count: usize) -> Option<u64> {
        let bytes = self.bytes(offset, count)?;
        Some(
            bytes
                .iter()
                .fold(0, |number, &byte| number << 8 | u64::from(byte)),
        )
    }

    fn little(&mut self, offset: u64, count: usize) -> Option<u64> {
        let bytes = self.bytes(offset, count)?;
        Some(
            bytes
                .iter()
                .rev()
                .fold(0, |number, &byte| number << 8 | u64::from(byte)),
        )
    }

    /// Where partitions begin, in bytes: of a GPT with sectors of 512 or 4,096 bytes, or of an MBR without its logical
    /// ones.
    fn partitions(&mut self) -> Vec<u64> {
        for sector in [SECTOR, BLOCK] {
            if self
                .bytes(sector, 8)
                .is_some_and(|magic| magic == b"EFI PART")
            {
                return self.gpt(sector).unwrap_or_default();
            }
        }
        if self.little(510, 2) != Some(0xaa55) {
            return Vec::new();
        }
        let starts = (0..4).filter_map(|n| self.little(446 + 16 * n + 8, 4));
        starts
            .filter(|&start| start > 0)
            .map(|start| start * SECTOR)
            .collect()
    }

    fn gpt(&mut self, sector: u64) -> Option<Vec<u64>> {
        let table = self.little(sector + 72, 8)?.checked_mul(sector)?;
        let count = self.little(sector + 80, 4)?;
        let size = self.little(sector + 84, 4)?;
        if size < 128 || !size.is_power_of_two() || size > BLOCK {
            return None;
        }
        let mut starts = Vec::new();
        for n in 0..count.min(128) {
            let entry = table.checked_add(n * size)?;
            let is_used = self.bytes(entry, 16)?.iter().any(|&byte| byte != 0);
            if is_used && starts.len() < PARTITIONS {
                starts.push(self.little(entry + 32, 8)?.checked_mul(sector)?);
            }
        }
        Some(starts)
    }

    /// The journal of a file system that begins there.
    fn file_system(&mut self, start: u64) {
        // Nothing but what is recognised.
        let _ = self.ext4(start);
        let _ = self.xfs(start);
    }

    /// ext3 and ext4: the superblock keeps a copy of the journal's inode (`s_jnl_blocks`), and the journal's own
    /// superblock says where its oldest entries are.
    fn ext4(&mut self, start: u64) -> Option<()> {
        let superblock = start.checked_add(1024)?;
        (self.little(superblock + 0x38, 2)? == 0xef53).then_some(())?;
        self.note(superblock, 1024);
        let block =
            1024_u64.checked_shl(u32::try_from(self.little(superblock + 0x18, 4)?).ok()?)?;
        (block <= 64 << 10).then_some(())?;
        let extents = superblock + 0x10c;
        // A tree of no depth, as those of journals are.
        let is_tree =
            self.little(extents, 2)? == u64::from(EXTENTS) && self.little(extents + 6, 2)? == 0;
        is_tree.then_some(())?;
        let mut pieces = Vec::new();
        for n in 0..self.little(extents + 2, 2)?.min(4) {
            let entry = extents + 12 + 12 * n;
            let blocks = self.little(entry + 4, 2)?;
            let place = self.little(entry + 6, 2)? << 32 | self.little(entry + 8, 4)?;
            pieces.push((place, blocks));
        }
        let at = |n: u64| {
            let mut n = n;
            for &(place, blocks) in &pieces {
                if n < blocks {
                    return place.checked_add(n)?.checked_mul(block)?.checked_add(start);
                }
                n -= blocks;
            }
            None
        };
        let journal = at(0)?;
        self.note(journal, 1024);
        (self.big(journal, 4)? == u64::from(JOURNAL_MAGIC)).then_some(())?;
        let (length, oldest) = (self.big(journal + 16, 4)?, self.big(journal + 28, 4)?);
        (length > 1).then_some(())?;
        for n in 0..JOURNAL {
            let place = 1 + (oldest.max(1) - 1 + n) % (length - 1);
            if let Some(offset) = at(place) {
                self.note(offset, 1);
            }
        }
        Some(())
    }

    /// XFS: every sector of its log begins with the number of the round in which it was written, but for a record's
    /// first, which has it behind its magic number. The newest is where that number falls.
    fn xfs(&mut self, start: u64) -> Option<()> {
        (self.bytes(start, 4)? == b"XFSB").then_some(())?;
        let block = self.big(start + 4, 4)?;
        let log = self.big(start + 48, 8)?;
        let (per_group, blocks, shift) = (
            self.big(start + 84, 4)?,
            self.big(start + 96, 4)?,
            self.big(start + 124, 1)?,
        );
        ((SECTOR..=64 << 10).contains(&block) && shift < 32 && blocks > 0 && log > 0)
            .then_some(())?;
        let place = (log >> shift)
            .checked_mul(per_group)?
            .checked_add(log & ((1 << shift) - 1))?;
        let begin = place.checked_mul(block)?.checked_add(start)?;
        let sectors = blocks.checked_mul(block)? / SECTOR;
        let mut round = |n: u64| {
            let sector = begin.checked_add(n.checked_mul(SECTOR)?)?;
            let word = self.big(sector, 4)?;
            if word == u64::from(XFS_LOG) {
                self.big(sector + 4, 4)
            } else {
                Some(word)
            }
        };
        let first = round(0)?;
        let (mut low, mut high) = (0, sectors);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if round(middle)? == first {
                low = middle;
            } else {
                high = middle;
            }
        }
        let newest = begin + low * SECTOR;
        self.note(begin, BLOCK);
        self.note(
            newest.saturating_sub(JOURNAL / 2 * BLOCK).max(begin),
            JOURNAL / 2 * BLOCK + 1,
        );
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places_of(
        disk: &[u8],
        of: impl Fn(u64, &mut dyn FnMut(u64) -> Option<Block>) -> Vec<u64>,
    ) -> Vec<u64> {
        let mut read = |place: u64| {
            let at = usize::try_from(place * BLOCK).ok()?;
            Box::<[u8]>::from(disk.get(at..at + COMPARED_BLOCK)?)
                .try_into()
                .ok()
        };
        of(disk.len() as u64, &mut read)
    }

    fn put(disk: &mut [u8], at: usize, bytes: &[u8]) {
        disk[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// A GPT with one partition at 1 MiB.
    fn partitioned(length: usize) -> (Vec<u8>, usize) {
        let (mut disk, start) = (vec![0; length], 1 << 20);
        put(&mut disk, 512, b"EFI PART");
        put(&mut disk, 512 + 72, &2_u64.to_le_bytes());
        put(&mut disk, 512 + 80, &128_u32.to_le_bytes());
        put(&mut disk, 512 + 84, &128_u32.to_le_bytes());
        put(&mut disk, 1024, &[7; 16]);
        put(&mut disk, 1024 + 32, &2048_u64.to_le_bytes());
        (disk, start)
    }

    #[test]
    fn the_oldest_entries_of_an_ext4_journal_are_found() {
        let (mut disk, start) = partitioned(8 << 20);
        let superblock = start + 1024;
        put(&mut disk, superblock + 0x38, &0xef53_u16.to_le_bytes());
        put(&mut disk, superblock + 0x18, &2_u32.to_le_bytes());
        let extents = superblock + 0x10c;
        put(&mut disk, extents, &EXTENTS.to_le_bytes());
        put(&mut disk, extents + 2, &1_u16.to_le_bytes());
        put(&mut disk, extents + 12 + 4, &1024_u16.to_le_bytes());
        put(&mut disk, extents + 12 + 8, &512_u32.to_le_bytes());
        let journal = start + 512 * 4096;
        put(&mut disk, journal, &JOURNAL_MAGIC.to_be_bytes());
        put(&mut disk, journal + 16, &1024_u32.to_be_bytes());
        put(&mut disk, journal + 28, &300_u32.to_be_bytes());
        let places = places_of(&disk, |length, read| of_raw(length, read));
        for wanted in [0, 256, 256 + 512, 256 + 512 + 300, 256 + 512 + 331] {
            assert!(places.contains(&wanted), "{wanted}: {places:?}");
        }
        assert!(!places.contains(&(256 + 512 + 299)));
        assert!(places.len() < 100);
    }

    #[test]
    fn the_newest_entries_of_an_xfs_log_are_found() {
        let (mut disk, start) = partitioned(8 << 20);
        put(&mut disk, start, b"XFSB");
        put(&mut disk, start + 4, &4096_u32.to_be_bytes());
        put(&mut disk, start + 48, &((1_u64 << 8) | 4).to_be_bytes());
        put(&mut disk, start + 84, &200_u32.to_be_bytes());
        put(&mut disk, start + 96, &512_u32.to_be_bytes());
        put(&mut disk, start + 124, &[8]);
        let log = start + 204 * 4096;
        for sector in 0..512 * 8 {
            let round: u32 = if sector <= 1000 { 9 } else { 8 };
            put(&mut disk, log + sector * 512, &round.to_be_bytes());
        }
        put(&mut disk, log, &XFS_LOG.to_be_bytes());
        put(&mut disk, log + 4, &9_u32.to_be_bytes());
        let places = places_of(&disk, |length, read| of_raw(length, read));
        let newest = (log + 1000 * 512) as u64 / BLOCK;
        assert!(
            places.contains(&newest) && places.contains(&(newest - 16)),
            "{places:?}"
        );
        assert!(places.len() < 100);
    }

    #[test]
    fn no_disk_leads_astray() {
        for seed in 0..200_u64 {
            let (mut disk, start) = partitioned(4 << 20);
            let mut state = seed * 77 + 1;
            for byte in &mut disk[1024 + 32..1024 + 40] {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                *byte = if seed % 2 == 0 {
                    (state >> 56) as u8
                } else {
                    *byte
                };
            }
            for byte in &mut disk[start..start + 4096] {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                *byte = (state >> 56) as u8;
            }
            put(
                &mut disk,
                start,
                if seed % 3 == 0 { b"XFSB" } else { b"none" },
            );
            put(&mut disk, start + 1024 + 0x38, &0xef53_u16.to_le_bytes());
            put(&mut disk, start + 1024 + 0x10c, &EXTENTS.to_le_bytes());
            put(&mut disk, start + 1024 + 0x10c + 6, &[0; 2]);
            let end = disk.len() as u64 / BLOCK;
            let places = places_of(&disk, |length, read| of_raw(length, read));
            assert!(places.iter().all(|&place| place < end) && places.len() < 2000);
            let places = places_of(&disk, |length, read| of_qcow2(length, read));
            assert!(places.iter().all(|&place| place < end) && places.len() < 2000);
        }
        assert_eq!(
            places_of(&[0; 512], |length, read| of_raw(length, read)),
            [0]
        );
    }
}
