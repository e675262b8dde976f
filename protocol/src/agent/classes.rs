//! Classes of memory: what is wanted first where a guest runs before all of its memory has come.

/// Ranks that working sets have.
pub const RANKS: u8 = 16;

/// A class whose frames are named one by one, from what is wanted first to what is wanted last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MemoryClass {
    /// The kernel's own: its text and data, slab, page tables, stacks. Touched by whoever runs, and nobody else
    /// can run meanwhile.
    Kernel,
    /// What processes of that rank touched lately; 0 is the most important one, [`RANKS`] is above all of them.
    WorkingSet(u8),
}

impl MemoryClass {
    /// On the wire: 0 for the kernel's, or a rank plus one.
    pub(super) fn to_byte(self) -> u8 {
        match self {
            Self::Kernel => 0,
            Self::WorkingSet(rank) => rank.min(RANKS - 1) + 1,
        }
    }

    pub(super) fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Kernel),
            rank @ 1..=RANKS => Some(Self::WorkingSet(rank - 1)),
            _ => None,
        }
    }
}

/// How many page frames there are of each class; each frame counts once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ClassCounts {
    /// The kernel's that is nothing of the following.
    pub kernel: u64,
    /// The kernel's small objects.
    pub slab: u64,
    /// Page tables.
    pub page_tables: u64,
    /// Of processes alone.
    pub anonymous: u64,
    /// Page cache that is as on disk.
    pub clean_file: u64,
    /// Page cache that is not, or has no disk.
    pub dirty_file: u64,
    /// Holds nothing.
    pub free: u64,
    /// What cannot be told.
    pub other: u64,
}

impl ClassCounts {
    /// How many counts there are.
    pub(super) const LEN: usize = 8;

    pub(super) fn to_array(self) -> [u64; Self::LEN] {
        let Self {
            kernel,
            slab,
            page_tables,
            anonymous,
            clean_file,
            dirty_file,
            free,
            other,
        } = self;
        [
            kernel,
            slab,
            page_tables,
            anonymous,
            clean_file,
            dirty_file,
            free,
            other,
        ]
    }

    pub(super) fn from_array(counts: [u64; Self::LEN]) -> Self {
        let [
            kernel,
            slab,
            page_tables,
            anonymous,
            clean_file,
            dirty_file,
            free,
            other,
        ] = counts;
        Self {
            kernel,
            slab,
            page_tables,
            anonymous,
            clean_file,
            dirty_file,
            free,
            other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_is_a_class_or_none() {
        for byte in 0..=u8::MAX {
            match MemoryClass::from_byte(byte) {
                Some(class) => assert_eq!(class.to_byte(), byte),
                None => assert!(byte > RANKS),
            }
        }
        assert!(MemoryClass::Kernel < MemoryClass::WorkingSet(0));
        assert_eq!(MemoryClass::WorkingSet(u8::MAX).to_byte(), RANKS);
    }
}
