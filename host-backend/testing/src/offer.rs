//! Messages between hosts.

use transhume_protocol::link::{Offer, Signs};

/// An offer of nothing, which a test fills.
pub fn some_offer() -> Offer {
    Offer {
        from: "hosta".to_owned(),
        job: 1,
        first: 1,
        attempt: 0,
        definition: String::new(),
        qemu: [10, 0, 0],
        qemu_package: String::new(),
        disks: Vec::new(),
        cpu_flags: Vec::new(),
        digest_key: [0; 16],
        running: true,
        dry_run: false,
        source_job: 1,
        autostart: false,
        signs: Signs {
            nonce: [0; 16],
            made: 0,
        },
        virtio: Vec::new(),
    }
}
