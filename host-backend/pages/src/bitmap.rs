//! One bit a page.

/// A set of page numbers below a bound.
#[derive(Debug, Clone)]
pub struct Bitmap {
    words: Vec<u64>,
    bits: u64,
}

impl Bitmap {
    /// An empty set of numbers below `bits`.
    pub fn new(bits: u64) -> Self {
        let words = usize::try_from(bits.div_ceil(64)).unwrap_or(usize::MAX);
        Self {
            words: vec![0; words],
            bits,
        }
    }

    #[inline]
    fn place(&self, bit: u64) -> Option<(usize, u64)> {
        (bit < self.bits).then(|| (usize::try_from(bit / 64).unwrap_or(0), 1 << (bit % 64)))
    }

    /// Whether the number is in the set; one out of bounds never is.
    #[inline]
    pub fn contains(&self, bit: u64) -> bool {
        self.place(bit)
            .is_some_and(|(word, mask)| self.words[word] & mask != 0)
    }

    /// Adds a number; `false` when it was there already or is out of bounds.
    #[inline]
    pub fn insert(&mut self, bit: u64) -> bool {
        let Some((word, mask)) = self.place(bit) else {
            return false;
        };
        let new = self.words[word] & mask == 0;
        self.words[word] |= mask;
        new
    }

    /// Adds `count` numbers from `from` on, as far as they are within bounds.
    pub fn insert_run(&mut self, from: u64, count: u64) {
        let to = from.saturating_add(count).min(self.bits);
        let mut bit = from;
        while bit < to {
            // Below the bound, so it is the place of a word.
            let word = usize::try_from(bit / 64).unwrap_or(0);
            let end = to.min((bit / 64 + 1) * 64);
            let ones = u64::MAX >> (64 - (end - bit));
            self.words[word] |= ones << (bit % 64);
            bit = end;
        }
    }

    /// Takes a number out; `false` when it was not there.
    #[inline]
    pub fn remove(&mut self, bit: u64) -> bool {
        let Some((word, mask)) = self.place(bit) else {
            return false;
        };
        let there = self.words[word] & mask != 0;
        self.words[word] &= !mask;
        there
    }

    /// Takes out at least all numbers from `from` on and below `to`, and none that is more than 63 away from them.
    pub fn clear(&mut self, from: u64, to: u64) {
        let to = to.min(self.bits);
        if from >= to {
            return;
        }
        // Below the bound, so both are places of words.
        let place = |bit: u64| usize::try_from(bit / 64).unwrap_or(0);
        self.words[place(from)..=place(to - 1)].fill(0);
    }

    /// The first number from `from` on and below `to` that is not in the set.
    #[inline]
    pub fn first_absent(&self, from: u64, to: u64) -> Option<u64> {
        let to = to.min(self.bits);
        let mut bit = from;
        while bit < to {
            let (word, mask) = self.place(bit)?;
            // What lies below `bit` counts as there.
            let absent = !self.words[word] & !(mask - 1);
            if absent != 0 {
                let found = bit / 64 * 64 + u64::from(absent.trailing_zeros());
                return (found < to).then_some(found);
            }
            bit = (bit / 64 + 1) * 64;
        }
        None
    }

    /// The set of numbers below `bits` whose words, low bytes first, are those of [`Self::write`]. What is too short
    /// is filled up with nothing.
    pub fn read(bits: u64, bytes: &[u8]) -> Self {
        let mut bitmap = Self::new(bits);
        for (word, bytes) in bitmap.words.iter_mut().zip(bytes.as_chunks().0) {
            *word = u64::from_le_bytes(*bytes);
        }
        // What is out of bounds is never in the set.
        if let (Some(last), rest @ 1..) = (bitmap.words.last_mut(), bits % 64) {
            *last &= (1 << rest) - 1;
        }
        bitmap
    }

    /// Appends the words, low bytes first: bit `n % 8` of byte `n / 8` is the number `n`'s.
    pub fn write(&self, out: &mut Vec<u8>) {
        for word in &self.words {
            out.extend_from_slice(&word.to_le_bytes());
        }
    }

    /// Takes out all numbers that another set has.
    pub fn subtract(&mut self, other: &Self) {
        for (word, other) in self.words.iter_mut().zip(&other.words) {
            *word &= !other;
        }
    }

    /// How many numbers are in the set.
    pub fn count(&self) -> u64 {
        self.words
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    /// The first number from `from` on and below `to` that is in the set.
    #[inline]
    pub fn first_present(&self, from: u64, to: u64) -> Option<u64> {
        let to = to.min(self.bits);
        let mut bit = from;
        while bit < to {
            let (word, mask) = self.place(bit)?;
            // What lies below `bit` counts as not there.
            let present = self.words[word] & !(mask - 1);
            if present != 0 {
                let found = bit / 64 * 64 + u64::from(present.trailing_zeros());
                return (found < to).then_some(found);
            }
            bit = (bit / 64 + 1) * 64;
        }
        None
    }

    /// The bound.
    #[inline]
    pub fn len(&self) -> u64 {
        self.bits
    }

    /// Whether no number can be in the set.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.bits == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    proptest! {
        #[test]
        fn behaves_as_a_set(steps in prop::collection::vec((any::<bool>(), 0_u64..200), 0..200)) {
            let mut bitmap = Bitmap::new(150);
            let mut set = HashSet::new();
            for (add, bit) in steps {
                if add {
                    prop_assert_eq!(bitmap.insert(bit), bit < 150 && set.insert(bit));
                } else {
                    prop_assert_eq!(bitmap.remove(bit), bit < 150 && set.remove(&bit));
                }
                prop_assert_eq!(bitmap.contains(bit), bit < 150 && set.contains(&bit));
            }
            for from in 0..160 {
                let to = from * 2;
                let absent = (from..to.min(150)).find(|bit| !set.contains(bit));
                prop_assert_eq!(bitmap.first_absent(from, to), absent);
                let present = (from..to).find(|bit| set.contains(bit));
                prop_assert_eq!(bitmap.first_present(from, to), present);
            }
        }

        #[test]
        fn a_run_is_each_of_its_numbers(from in 0_u64..200, count in prop_oneof![0_u64..200, Just(u64::MAX)]) {
            let (mut run, mut each) = (Bitmap::new(150), Bitmap::new(150));
            run.insert_run(from, count);
            (from..from.saturating_add(count).min(300)).for_each(|bit| {
                each.insert(bit);
            });
            prop_assert_eq!(run.words, each.words);
        }
    }

    #[test]
    fn survives_as_bytes() {
        let mut bitmap = Bitmap::new(70);
        for bit in [0, 9, 69] {
            bitmap.insert(bit);
        }
        let mut bytes = Vec::new();
        bitmap.write(&mut bytes);
        assert_eq!((bytes.len(), bytes[0], bytes[1], bytes[8]), (16, 1, 2, 32));
        bytes[15] = 0xff;
        let mut read = Bitmap::read(70, &bytes);
        assert!((0..200).all(|bit| read.contains(bit) == bitmap.contains(bit)));
        bitmap.remove(9);
        read.subtract(&bitmap);
        assert_eq!(read.count(), 1);
        assert!(read.contains(9));
    }

    #[test]
    fn clears_a_range_and_little_more() {
        let mut bitmap = Bitmap::new(1000);
        (0..1000).for_each(|bit| {
            bitmap.insert(bit);
        });
        bitmap.clear(200, 400);
        bitmap.clear(u64::MAX, 0);
        assert!((200..400).all(|bit| !bitmap.contains(bit)));
        assert!((0..137).chain(463..1000).all(|bit| bitmap.contains(bit)));
        bitmap.clear(0, u64::MAX);
        assert!((0..1000).all(|bit| !bitmap.contains(bit)));
    }
}
