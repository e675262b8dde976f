//! Places that both hosts draw by the same key, and nobody can foretell.

use transhume_protocol::link::Sample;

/// A sequence of numbers that is known from the key (`SplitMix64`).
pub(super) struct Drawn(u64);

impl Drawn {
    pub(super) fn new(key: &[u8; 16], which: u64) -> Self {
        let half = |at: usize| {
            key[at..]
                .first_chunk()
                .map_or(0, |half| u64::from_le_bytes(*half))
        };
        Self(half(0) ^ half(8).rotate_left(17) ^ which.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    /// Below `end`, which is not 0.
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        // Even where it does not divide, none is preferred by more than 2⁻²⁰.
        (z ^ (z >> 31)) % end
    }
}

/// All places of a sample, in the order of the digests. Both hosts get the same.
pub(super) fn all(sample: &Sample, key: &[u8; 16]) -> Vec<u64> {
    let mut places = sample.places.clone();
    if sample.blocks > 0 {
        let which = u64::from(sample.disk) << 32 | u64::from(sample.node) << 16 | 1;
        let mut drawn = Drawn::new(key, which);
        places.extend((0..sample.drawn).map(|_| drawn.below(sample.blocks)));
    }
    places
}
