//! The header of a qcow2 image, which a guest may have written.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::path::Path;
use transhume_machine::image_chain::based_on;

fuzz_target!(|data: &[u8]| {
    let image = Path::new("/srv/images/web1.qcow2");
    if let Ok(Some((path, _))) = based_on(data, image) {
        // What QEMU would take for a protocol is refused.
        let name = path.strip_prefix("/srv/images").unwrap_or(&path);
        let name = name.to_str().expect("a text");
        assert!(!name.is_empty() && !name.chars().any(char::is_control));
        assert!(name.find([':', '/']).is_none_or(|at| name.as_bytes()[at] == b'/'));
    }
});
