//! Images of disks.

/// The header of a qcow2 image on another file (docs/interop/qcow2.txt of QEMU).
///
/// # Panics
/// If the name is longer than any.
pub fn qcow2_header(backing: &str, format: Option<&str>, features: u64) -> Vec<u8> {
    let mut header = b"QFI\xfb".to_vec();
    header.extend(3_u32.to_be_bytes());
    header.extend(if backing.is_empty() { 0 } else { 512_u64 }.to_be_bytes());
    header.extend(
        u32::try_from(backing.len())
            .expect("a length")
            .to_be_bytes(),
    );
    header.extend(16_u32.to_be_bytes());
    header.extend((1_u64 << 20).to_be_bytes());
    header.resize(72, 0);
    header.extend(features.to_be_bytes());
    header.resize(100, 0);
    header.extend(104_u32.to_be_bytes());
    // An extension that means nothing here comes first, padded to eight bytes.
    header.extend(0x6803_f857_u32.to_be_bytes());
    header.extend(3_u32.to_be_bytes());
    header.extend([7; 8]);
    if let Some(format) = format {
        header.extend(0xe279_2aca_u32.to_be_bytes());
        header.extend(u32::try_from(format.len()).expect("a length").to_be_bytes());
        header.extend(format.as_bytes());
        header.resize(header.len().next_multiple_of(8), 0);
    }
    header.extend([0; 8]);
    header.resize(512, 0);
    header.extend(backing.as_bytes());
    header.resize(4096, 0);
    header
}
