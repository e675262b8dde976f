//! Memory that direct reads can go to.

use super::Error;
use std::ops::{Deref, DerefMut};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
struct Page([u8; AlignedBuffer::ALIGNMENT]);

/// Bytes that begin on a page boundary, as direct reads need them.
#[derive(Clone)]
pub struct AlignedBuffer {
    pages: Vec<Page>,
    length: usize,
}

impl AlignedBuffer {
    /// The boundary, in bytes: that of a page, and of the largest logical block that disks have.
    pub const ALIGNMENT: usize = 4096;
    /// Longest buffer, in bytes.
    pub const MAX_LEN: usize = 64 * 1024 * 1024;

    /// Allocates `length` zero bytes; 1 to [`Self::MAX_LEN`].
    pub fn allocate(length: usize) -> Result<Self, Error> {
        if length == 0 || length > Self::MAX_LEN {
            return Err(Error::Buffer(length));
        }
        let pages = Page::new_vec_zeroed(length.div_ceil(Self::ALIGNMENT))
            .map_err(|_| Error::Buffer(length))?;
        Ok(Self { pages, length })
    }

    /// Whether direct reads can go to `bytes`.
    pub(super) fn is_aligned(bytes: &[u8]) -> bool {
        bytes.as_ptr().addr().is_multiple_of(Self::ALIGNMENT)
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.pages.as_bytes()[..self.length]
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.pages.as_mut_bytes()[..self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_zero_aligned_and_as_long_as_asked() {
        for length in [1, 511, 4096, 4097, 1 << 20] {
            let mut buffer = AlignedBuffer::allocate(length).unwrap();
            assert_eq!(buffer.len(), length);
            assert!(AlignedBuffer::is_aligned(&buffer));
            assert!(buffer.iter().all(|&byte| byte == 0));
            buffer[length - 1] = 1;
            assert_eq!(buffer.clone().last(), Some(&1));
        }
    }

    #[test]
    fn empty_and_huge_buffers_are_refused() {
        for length in [0, AlignedBuffer::MAX_LEN + 1, usize::MAX] {
            assert!(matches!(
                AlignedBuffer::allocate(length),
                Err(Error::Buffer(_))
            ));
        }
    }
}
