//! The guest's disk, as a raw image.

use crate::content::{SECTOR_SIZE, SECTOR_WORDS, Seed, fill_sector};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

/// Writes an image of `bytes` (rounded down to whole sectors), whose content follows from `seed`.
///
/// It is the guest's `disk-seed`, whose default is 1, and its `content`.
pub fn write_image(path: &Path, seed: impl Into<Seed>, bytes: u64) -> io::Result<()> {
    let seed = seed.into();
    let mut out = BufWriter::with_capacity(1 << 20, File::create(path)?);
    let mut sector = [0; SECTOR_WORDS];
    for number in 0..bytes / SECTOR_SIZE as u64 {
        fill_sector(seed, number, &mut sector);
        for word in sector {
            out.write_all(&word.to_le_bytes())?;
        }
    }
    out.into_inner()
        .map_err(io::IntoInnerError::into_error)?
        .sync_all()
}
