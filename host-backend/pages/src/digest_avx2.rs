//! POLYVAL of a whole page with the wide carry-less multiplication of newer x86 CPUs.
//!
//! POLYVAL of 256 blocks is X₁·H²⁵⁶ + … + X₂₅₆·H with the product of RFC 8452, which is linear up to its
//! reduction: so a page is one sum of 256 products that are not reduced yet, two at a time, and then
//! reduced once. The powers and the reduction are left to the `polyval` crate.

use std::arch::x86_64::{
    __m256i, _mm256_clmulepi64_epi128, _mm256_setzero_si256, _mm256_shuffle_epi32, _mm256_xor_si256,
};

use polyval::Polyval;
use polyval::universal_hash::UniversalHash;
use transhume_protocol::link::Digest;

use crate::{KEY_LEN, PAGE_SIZE};

const BLOCK: usize = 16;
const PAIRS: usize = PAGE_SIZE / (2 * BLOCK);
/// The words of each half of a register in turned order, for `_mm256_shuffle_epi32`.
const TURNED: i32 = 0b01_00_11_10;

/// The powers of one key.
#[derive(Clone)]
pub(super) struct Avx2Polyval {
    /// H²⁵⁶ to H, two in each.
    powers: Box<[[u8; 2 * BLOCK]; PAIRS]>,
    /// POLYVAL with a key of 1, whose product with a block is the block's reduction.
    one: Polyval,
}

impl Avx2Polyval {
    /// The powers of `key`; `None` on a CPU without the instructions.
    pub(super) fn new(key: &[u8; KEY_LEN]) -> Option<Self> {
        let has_all = is_x86_feature_detected!("vpclmulqdq")
            && is_x86_feature_detected!("pclmulqdq")
            && is_x86_feature_detected!("avx2");
        if !has_all {
            return None;
        }
        let mut powers = Box::new([[0; 2 * BLOCK]; PAIRS]);
        let mut power = *key;
        for block in powers.as_flattened_mut().rchunks_exact_mut(BLOCK) {
            block.copy_from_slice(&power);
            power = product(&Polyval::new(&(*key).into()), power);
        }
        let mut one = [0; KEY_LEN];
        one[0] = 1;
        Some(Self {
            powers,
            one: Polyval::new(&one.into()),
        })
    }

    /// The digest of one page.
    pub(super) fn digest(&self, page: &[u8; PAGE_SIZE]) -> Digest {
        // SAFETY: `new` has seen that this CPU has the function's features.
        let (low, high) = unsafe { sum_of_products(page, &self.powers) };
        let mut digest = product(&self.one, low);
        for (byte, high) in digest.iter_mut().zip(high) {
            *byte ^= high;
        }
        digest
    }
}

fn product(hash: &Polyval, block: [u8; BLOCK]) -> [u8; BLOCK] {
    let mut hash = hash.clone();
    hash.update(&[block.into()]);
    hash.finalize().into()
}

/// The sum of the products of blocks and powers, each of 256 bits: its lower and its upper half.
#[target_feature(enable = "avx2,pclmulqdq,vpclmulqdq")]
fn sum_of_products(
    page: &[u8; PAGE_SIZE],
    powers: &[[u8; 2 * BLOCK]; PAIRS],
) -> ([u8; BLOCK], [u8; BLOCK]) {
    let mut low = _mm256_setzero_si256();
    let mut middle = low;
    let mut high = low;
    let (blocks, _) = page.as_chunks::<{ 2 * BLOCK }>();
    for (blocks, powers) in blocks.iter().zip(powers) {
        let blocks: __m256i = zerocopy::transmute!(*blocks);
        let powers: __m256i = zerocopy::transmute!(*powers);
        // Karatsuba: three products of 64 bits for one of 128.
        let blocks_folded = _mm256_xor_si256(blocks, _mm256_shuffle_epi32::<TURNED>(blocks));
        let powers_folded = _mm256_xor_si256(powers, _mm256_shuffle_epi32::<TURNED>(powers));
        low = _mm256_xor_si256(low, _mm256_clmulepi64_epi128::<0x00>(blocks, powers));
        high = _mm256_xor_si256(high, _mm256_clmulepi64_epi128::<0x11>(blocks, powers));
        middle = _mm256_xor_si256(
            middle,
            _mm256_clmulepi64_epi128::<0x00>(blocks_folded, powers_folded),
        );
    }
    let fold = |register: __m256i| {
        let [one, other]: [u128; 2] = zerocopy::transmute!(register);
        one ^ other
    };
    let (low, high) = (fold(low), fold(high));
    let middle = fold(middle) ^ low ^ high;
    (
        (low ^ middle << 64).to_le_bytes(),
        (high ^ middle >> 64).to_le_bytes(),
    )
}
