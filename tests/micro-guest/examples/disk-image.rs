//! Writes a disk image for the micro-guest: `disk-image PATH MIB [SEED]`.

use std::error::Error;
use std::path::Path;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (path, mib, seed) = match &arguments[..] {
        [path, mib] => (path, mib, 1),
        [path, mib, seed] => (path, mib, seed.parse()?),
        _ => return Err("usage: disk-image PATH MIB [SEED]".into()),
    };
    micro_guest::image::write_image(Path::new(path), seed, mib.parse::<u64>()? << 20)?;
    Ok(())
}
