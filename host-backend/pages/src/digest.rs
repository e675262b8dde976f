//! The digest by which a page read from a disk is recognised as the one that the source has.
//!
//! POLYVAL (RFC 8452, section 3) under a key that is drawn for each migration and that the guest
//! never learns: two different pages have the same digest with a probability of at most 2⁻¹²⁰,
//! whatever the guest writes. See `docs/decisions/0004-page-digest.md`.

use polyval::Polyval;
use polyval::universal_hash::UniversalHash;
use transhume_protocol::link::{DIGEST_LEN, Digest};

#[cfg(target_arch = "x86_64")]
use crate::digest_avx2::Avx2Polyval;
use crate::{KEY_LEN, PAGE_SIZE};

/// Takes digests of pages under one key.
#[derive(Clone)]
pub struct Digester {
    hash: Polyval,
    /// The same, faster, where the CPU can.
    #[cfg(target_arch = "x86_64")]
    wide: Option<Avx2Polyval>,
}

impl Digester {
    /// A digester for a key from [`random_key`].
    pub fn new(key: &[u8; KEY_LEN]) -> Self {
        Self {
            hash: Polyval::new(&(*key).into()),
            #[cfg(target_arch = "x86_64")]
            wide: Avx2Polyval::new(key),
        }
    }

    /// The digest of one page.
    pub fn digest(&self, page: &[u8; PAGE_SIZE]) -> Digest {
        #[cfg(target_arch = "x86_64")]
        if let Some(wide) = &self.wide {
            return wide.digest(page);
        }
        self.narrow(page)
    }

    fn narrow(&self, page: &[u8; PAGE_SIZE]) -> Digest {
        let mut hash = self.hash.clone();
        hash.update_padded(page);
        let mut digest = [0; DIGEST_LEN];
        digest.copy_from_slice(&hash.finalize());
        digest
    }
}

/// Draws a key from the system's random numbers.
pub fn random_key() -> std::io::Result<[u8; KEY_LEN]> {
    let mut key = [0; KEY_LEN];
    getrandom::fill(&mut key).map_err(std::io::Error::from)?;
    Ok(key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_changed_byte_changes_the_digest(key: [u8; KEY_LEN], at in 0..PAGE_SIZE, by in 1_u8..) {
            prop_assume!(key != [0; KEY_LEN]);
            let digester = Digester::new(&key);
            let page = [0x5a; PAGE_SIZE];
            let mut changed = page;
            changed[at] ^= by;
            prop_assert_ne!(digester.digest(&page), digester.digest(&changed));
            prop_assert_eq!(digester.digest(&page), Digester::new(&key).digest(&page));
        }
    }

    proptest! {
        #[test]
        fn every_cpu_takes_the_same_digest(
            key: [u8; KEY_LEN],
            page in prop::collection::vec(any::<u8>(), PAGE_SIZE),
        ) {
            let digester = Digester::new(&key);
            let page: &[u8; PAGE_SIZE] = page.as_slice().try_into()?;
            prop_assert_eq!(digester.digest(page), digester.narrow(page));
        }
    }

    #[test]
    fn keys_differ() {
        assert_ne!(random_key().unwrap(), random_key().unwrap());
    }
}
