//! What a page must hold, as a function that guest and host compute alike.
//!
//! Content comes in kinds, so that every path a page can take in a migration is walked: pages that
//! are zero again after they were not, pages with a single byte set, pages that compress and pages
//! that do not.
#![allow(
    clippy::cast_possible_truncation,
    reason = "what is cast was taken modulo less"
)]

/// Bytes in a page.
pub const PAGE_SIZE: usize = 4096;
/// Words in a page.
pub const PAGE_WORDS: usize = PAGE_SIZE / 8;
/// Bytes in a disk sector.
pub const SECTOR_SIZE: usize = 512;
/// Words in a disk sector.
pub const SECTOR_WORDS: usize = SECTOR_SIZE / 8;
/// Sectors in a page.
pub const SECTORS_PER_PAGE: u64 = (PAGE_SIZE / SECTOR_SIZE) as u64;

/// A page as the guest writes and reads it.
pub type Page = [u64; PAGE_WORDS];
/// A sector of the disk.
pub type Sector = [u64; SECTOR_WORDS];

/// Mixes two numbers into one that looks random (the finaliser of `SplitMix64`).
pub const fn mix(a: u64, b: u64) -> u64 {
    let mut x = a.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(b);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[derive(Clone, Copy)]
enum Kind {
    Zero,
    /// One byte of the page is set.
    OneByte,
    /// Compresses to about a quarter.
    Text,
    Random,
}

fn kind(key: u64) -> Kind {
    match key >> 60 {
        0 => Kind::Zero,
        1 => Kind::OneByte,
        2..=7 => Kind::Text,
        _ => Kind::Random,
    }
}

/// Passes words `from..from + count` of the content that `key` names to `each`.
#[inline]
fn visit(key: u64, from: usize, count: usize, mut each: impl FnMut(usize, u64)) {
    match kind(key) {
        Kind::Zero => (0..count).for_each(|at| each(at, 0)),
        Kind::OneByte => {
            let byte = (key % PAGE_SIZE as u64) as usize;
            let word = 1 << (8 * (byte % 8));
            (0..count).for_each(|at| each(at, if from + at == byte / 8 { word } else { 0 }));
        }
        Kind::Text => {
            let word = mix(key, 0);
            (0..count).for_each(|at| {
                let place = from + at;
                let noise = if place.is_multiple_of(8) {
                    key.rotate_left(place as u32)
                } else {
                    0
                };
                each(at, word ^ noise);
            });
        }
        Kind::Random => {
            let mut state = mix(key, from as u64);
            (0..count).for_each(|at| {
                state = state
                    .wrapping_mul(0x5851_f42d_4c95_7f2d)
                    .wrapping_add(0x1405_7b7e_f767_814f);
                each(at, state ^ (state >> 32));
            });
        }
    }
}

/// What all content follows from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seed {
    /// Any number.
    pub number: u64,
    /// Every page is of the kind that does not compress.
    pub random: bool,
}

impl From<u64> for Seed {
    /// Of all kinds.
    fn from(number: u64) -> Self {
        Self {
            number,
            random: false,
        }
    }
}

impl Seed {
    fn key(self, a: u64, b: u64) -> u64 {
        let key = mix(mix(self.number, a), b);
        // See `kind`.
        key | u64::from(self.random) << 63
    }

    fn data(self, pfn: u64, generation: u64) -> u64 {
        self.key(pfn, generation)
    }

    fn disk(self, disk_page: u64) -> u64 {
        self.key(0x6469_736b, disk_page)
    }
}

/// Writes what the page at `pfn` holds in its `generation`.
pub fn fill_data(seed: impl Into<Seed>, pfn: u64, generation: u64, page: &mut Page) {
    visit(
        seed.into().data(pfn, generation),
        0,
        PAGE_WORDS,
        |at, word| {
            page[at] = word;
        },
    );
}

/// Whether the page holds what [`fill_data`] writes.
pub fn is_data(seed: impl Into<Seed>, pfn: u64, generation: u64, page: &Page) -> bool {
    let mut differs = 0;
    visit(
        seed.into().data(pfn, generation),
        0,
        PAGE_WORDS,
        |at, word| {
            differs |= page[at] ^ word;
        },
    );
    differs == 0
}

/// How many words, from the page's start on, are what [`fill_data`] writes.
pub fn data_words(seed: impl Into<Seed>, pfn: u64, generation: u64, page: &Page) -> usize {
    let key = seed.into().data(pfn, generation);
    // Most generations differ in the first words already.
    let count = |words| {
        let (mut same, mut all) = (0, true);
        visit(key, 0, words, |at, word| {
            all &= page[at] == word;
            same += usize::from(all);
        });
        same
    };
    if count(2) < 2 { 0 } else { count(PAGE_WORDS) }
}

/// Writes what the disk holds at `sector`.
pub fn fill_sector(seed: impl Into<Seed>, sector: u64, out: &mut Sector) {
    let key = seed.into().disk(sector / SECTORS_PER_PAGE);
    let from = (sector % SECTORS_PER_PAGE) as usize * SECTOR_WORDS;
    visit(key, from, SECTOR_WORDS, |at, word| out[at] = word);
}

/// Whether the page holds what the disk holds from `sector` on.
pub fn is_disk(seed: impl Into<Seed>, sector: u64, page: &Page) -> bool {
    let seed = seed.into();
    let mut differs = 0;
    for (sector, words) in (sector..).zip(page.chunks_exact(SECTOR_WORDS)) {
        let key = seed.disk(sector / SECTORS_PER_PAGE);
        let from = (sector % SECTORS_PER_PAGE) as usize * SECTOR_WORDS;
        visit(key, from, SECTOR_WORDS, |at, word| {
            differs |= words[at] ^ word;
        });
    }
    differs == 0
}

/// Whether the page holds zeros only.
pub fn is_zero(page: &Page) -> bool {
    page.chunks_exact(8)
        .all(|words| words.iter().fold(0, |all, word| all | word) == 0)
}

/// A small random number generator whose state is one word.
#[derive(Debug, Clone, Copy)]
pub struct Random(u64);

impl Random {
    /// A generator whose numbers depend on `seed` only.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(1);
        mix(self.0, 0x5261_6e64)
    }

    /// The next number below `bound`, which must not be 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.number() % bound
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_is_recognised_and_one_flipped_bit_is_not() {
        for pfn in 0..64 {
            let mut page = [u64::MAX; PAGE_WORDS];
            fill_data(7, pfn, 3, &mut page);
            assert!(is_data(7, pfn, 3, &page));
            page[(pfn * 8) as usize % PAGE_WORDS] ^= 1 << pfn;
            assert!(!is_data(7, pfn, 3, &page));
        }
    }

    #[test]
    fn a_page_is_its_eight_sectors_wherever_it_starts() {
        for sector in 0..200 {
            let mut page = [u64::MAX; PAGE_WORDS];
            for (sector, words) in (sector..).zip(page.chunks_exact_mut(SECTOR_WORDS)) {
                let mut out = [u64::MAX; SECTOR_WORDS];
                fill_sector(7, sector, &mut out);
                words.copy_from_slice(&out);
            }
            assert!(is_disk(7, sector, &page));
            page[(sector as usize * 5) % PAGE_WORDS] ^= 1;
            assert!(!is_disk(7, sector, &page));
        }
    }

    #[test]
    fn a_random_seed_leaves_no_two_words_alike() {
        let seed = Seed {
            number: 1,
            random: true,
        };
        for pfn in 0..256 {
            let mut page = [0; PAGE_WORDS];
            fill_data(seed, pfn, 1, &mut page);
            assert!(is_data(seed, pfn, 1, &page));
            let mut words = page.to_vec();
            words.sort_unstable();
            words.dedup();
            assert_eq!(words.len(), PAGE_WORDS);
        }
    }

    #[test]
    fn every_kind_of_content_occurs() {
        let pages: Vec<Page> = (0..256)
            .map(|pfn| {
                let mut page = [0; PAGE_WORDS];
                fill_data(1, pfn, 1, &mut page);
                page
            })
            .collect();
        let ones = |page: &Page| page.iter().map(|word| word.count_ones()).sum::<u32>();
        assert!(pages.iter().any(is_zero));
        assert!(pages.iter().any(|page| ones(page) == 1));
        assert!(pages.iter().any(|page| page[1] == page[2] && page[1] != 0));
        assert!(pages.iter().any(|page| page[1] != page[2]));
    }
}
