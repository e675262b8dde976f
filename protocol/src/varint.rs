//! LEB128 integers, and zigzag for signed differences.

/// Longest encoding of a `u64`, in bytes.
pub(crate) const MAX_LEN: usize = 10;

/// Appends `value` at `at`; `None` when `out` is too short.
pub(crate) fn put(out: &mut [u8], at: usize, mut value: u64) -> Option<usize> {
    let mut at = at;
    loop {
        let byte = (value & 0x7f) as u8;
        value >>= 7;
        *out.get_mut(at)? = if value == 0 { byte } else { byte | 0x80 };
        at += 1;
        if value == 0 {
            return Some(at);
        }
    }
}

/// Reads one integer at `at`: its value and the position after it.
/// `None` when the input ends early or the value does not fit in 64 bits.
pub(crate) fn get(input: &[u8], at: usize) -> Option<(u64, usize)> {
    let mut value = 0_u64;
    for n in 0..MAX_LEN {
        let byte = *input.get(at + n)?;
        let bits = u64::from(byte & 0x7f);
        if n == MAX_LEN - 1 && byte > 1 {
            return None;
        }
        value |= bits << (7 * n);
        if byte & 0x80 == 0 {
            return Some((value, at + n + 1));
        }
    }
    None
}

/// Maps a signed difference to a small unsigned number.
pub(crate) fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)).cast_unsigned()
}

/// Inverse of [`zigzag`].
pub(crate) fn unzigzag(value: u64) -> i64 {
    (value >> 1).cast_signed() ^ -(value & 1).cast_signed()
}
