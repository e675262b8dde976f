//! What several fuzz targets share.

/// Splits off the first byte, or 0 if there is none.
pub fn first(data: &[u8]) -> (u8, &[u8]) {
    data.split_first()
        .map_or((0, data), |(&byte, rest)| (byte, rest))
}

/// Makes long runs cheap for the fuzzer: `0xff n` stands for 4096 bytes of `n`, `0xff 0xff` for one 0xff.
pub fn expand(data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut bytes = data.iter().copied();
    while let Some(byte) = bytes.next() {
        match (byte, if byte == 0xff { bytes.next() } else { None }) {
            (0xff, Some(fill)) if fill != 0xff => out.extend([fill; 4096]),
            _ => out.push(byte),
        }
    }
    out
}
