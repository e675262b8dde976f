//! The guests that are moved.

use crate::Result;
use crate::guest::disk::{self, Amount, Kind};
use crate::guest::{self};
use crate::layout::Layout;
use crate::packages::{Kernel, Packages};
use crate::qemu::{Accelerator, AgentPort, DiskImage, Machine};

/// Sizes of a guest and its workload.
#[derive(Debug, Clone, Copy)]
pub struct Profile {
    /// The guest's memory in MiB.
    pub memory: u64,
    /// Page cache to warm, in MiB.
    pub cache: u64,
    /// The workload's own memory in MiB.
    pub own: u64,
    /// MiB a second that it writes there.
    pub dirty: u64,
    /// What is on its disk.
    pub files: Amount,
    /// The link, in Mbit/s.
    pub rate: u32,
}

impl Profile {
    /// The bench's: 2 GiB, 1.3 GiB of it page cache, 20 MB/s written.
    pub const BENCH: Self = Self {
        memory: 2048,
        cache: 1331,
        own: 256,
        dirty: 20,
        files: Amount::All,
        rate: 1000,
    };
    /// A small one, for a run in under a minute.
    pub const QUICK: Self = Self {
        memory: 512,
        cache: 240,
        own: 64,
        dirty: 20,
        files: Amount::Some(380),
        rate: 1000,
    };
    /// The demo's: 1 GiB.
    pub const DEMO: Self = Self {
        memory: 1024,
        cache: 640,
        own: 128,
        dirty: 20,
        files: Amount::Some(700),
        rate: 1000,
    };

    /// The guest, with all that it needs built.
    pub fn machine(self, layout: &Layout, packages: &Packages, kernel: Kernel) -> Result<Machine> {
        let path = disk::make(layout, packages, Kind::Ext4, self.files)?;
        Ok(Machine {
            name: "web1".into(),
            machine: "q35".into(),
            memory: self.memory,
            memory_kib: 0,
            vcpus: 1,
            accelerator: Accelerator::Tcg,
            boot: guest::boot(layout, packages, kernel)?,
            agent: AgentPort::Serial,
            disks: vec![DiskImage {
                id: "data".into(),
                path,
                format: "raw",
            }],
            card: None,
            settings: vec![
                ("cache-mib", self.cache.to_string()),
                ("memory-mib", self.own.to_string()),
                ("dirty-mib", self.dirty.to_string()),
            ],
        })
    }
}
