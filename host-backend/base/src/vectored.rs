//! Writing many pieces at once.

use std::io::{self, IoSlice, Write};

/// Most pieces that one `writev` takes (`IOV_MAX` of Linux).
pub const MAX_PIECES: usize = 1024;

/// Writes all pieces, however many they are.
///
/// # Errors
/// The writer's.
pub fn write_all_vectored(out: &mut impl Write, mut slices: &mut [IoSlice<'_>]) -> io::Result<()> {
    while !slices.is_empty() {
        let most = slices.len().min(MAX_PIECES);
        match out.write_vectored(&slices[..most]) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => IoSlice::advance_slices(&mut slices, written),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
