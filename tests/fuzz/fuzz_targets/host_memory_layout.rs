//! QEMU's `info mtree -f`, by which page frames are found in its blocks.
#![no_main]

use libfuzzer_sys::fuzz_target;
use transhume_hypervisor::Layout;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok(layout) = Layout::parse(text) {
        for region in layout.regions() {
            assert!(region.length > 0 && region.start.checked_add(region.length).is_some());
            assert!(layout.find(region.start).is_some());
        }
    }
});
