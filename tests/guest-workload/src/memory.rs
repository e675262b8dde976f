//! Memory of the workload's own, each page known by its number and how often it was written.

/// A page, in bytes.
pub(crate) const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;

/// One page, where the kernel has one: a write to it dirties no other.
#[derive(Debug, Clone, Copy)]
#[repr(align(4096))]
pub(crate) struct Page([u64; WORDS]);

impl Page {
    pub(crate) const ZERO: Self = Self([0; WORDS]);

    pub(crate) fn words(&mut self) -> &mut [u64; WORDS] {
        &mut self.0
    }

    /// One word, where it is, as a system call takes it.
    pub(crate) fn word_in_bytes(&mut self, word: usize) -> &mut [u8; 8] {
        let word = &raw mut self.0[word];
        // SAFETY: eight bytes of a word that is borrowed for as long; any bytes are a word, and bytes may
        // be anywhere.
        unsafe { &mut *word.cast() }
    }
}

/// Pages are rewritten in an order that leaps, so that dirty memory is not one range.
const LEAP: usize = 7919;

/// Repeatable numbers (splitmix64).
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }
}

/// The pages and how often each was written.
#[derive(Debug)]
pub(crate) struct Memory {
    pages: Vec<Page>,
    generations: Vec<u32>,
    next: usize,
}

/// Half of a page is random and half of it repeats, as the memory of programs does.
pub(crate) fn word_at(random: &mut Random, page: usize, generation: u32, word: usize) -> u64 {
    if word.is_multiple_of(2) {
        random.next()
    } else {
        (page as u64) << 32 | u64::from(generation)
    }
}

pub(crate) fn random_of(page: usize, generation: u32) -> Random {
    Random::new((page as u64) << 32 ^ u64::from(generation) ^ 0x5eed_5eed_5eed_5eed)
}

impl Memory {
    pub(crate) fn fill(size: usize) -> Result<Self, String> {
        let pages = size / PAGE;
        let mut memory = Vec::new();
        memory
            .try_reserve_exact(pages)
            .map_err(|error| error.to_string())?;
        memory.resize(pages, Page::ZERO);
        let mut memory = Self {
            pages: memory,
            generations: vec![0; pages],
            next: 0,
        };
        for page in 0..pages {
            memory.write(page);
        }
        Ok(memory)
    }

    fn write(&mut self, page: usize) {
        let generation = self.generations[page];
        let mut random = random_of(page, generation);
        for (index, word) in self.pages[page].0.iter_mut().enumerate() {
            *word = word_at(&mut random, page, generation, index);
        }
    }

    /// Writes the next page in the order anew.
    pub(crate) fn rewrite_next(&mut self) {
        if self.generations.is_empty() {
            return;
        }
        self.next = (self.next + LEAP) % self.generations.len();
        self.generations[self.next] = self.generations[self.next].wrapping_add(1);
        self.write(self.next);
    }

    /// Compares every page; says how many there are.
    pub(crate) fn check(&self) -> Result<usize, String> {
        for (page, generation) in self.generations.iter().enumerate() {
            let mut random = random_of(page, *generation);
            for (index, word) in self.pages[page].0.iter().enumerate() {
                if *word != word_at(&mut random, page, *generation, index) {
                    return Err(format!("page {page} of memory is not what was written"));
                }
            }
        }
        Ok(self.generations.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_word_is_found() {
        let mut memory = Memory::fill(64 * PAGE).expect("memory");
        for _ in 0..100 {
            memory.rewrite_next();
        }
        assert_eq!(memory.check(), Ok(64));
        memory.pages[1].0[488] ^= 1;
        assert!(memory.check().is_err());
    }

    #[test]
    fn an_old_page_is_found() {
        let mut memory = Memory::fill(2 * PAGE).expect("memory");
        let old = memory.pages.clone();
        memory.rewrite_next();
        memory.pages = old;
        assert!(memory.check().is_err());
    }
}
