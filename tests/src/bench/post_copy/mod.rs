//! Post-copy with absent memory: a guest's work while its memory follows it, against stock QEMU's own post-copy with
//! `postcopy-preempt`.
//!
//! The hosts are apart: 1 Gbit/s, and every packet takes 10 ms each way. Both sides switch after one scan of all
//! memory.

mod course;
mod load;
mod moved;
mod result;

pub use result::Comparison;

use crate::Result;
use crate::guest::disk::{self, Amount, Kind};
use crate::guest::{self, build};
use crate::hosts::{GUEST, Hosts, Users};
use crate::layout::Layout;
use crate::packages::{Kernel, Packages, Qemu};
use crate::progress::say;
use crate::qemu::serial::Console;
use crate::qemu::{Accelerator, AgentPort, Card, DiskImage, Machine};
use clap::ValueEnum;
use load::{Pieces, Store, Traffic, Web};
use moved::{Bed, Moved, by_stock, by_transhume};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// The link, in Mbit/s.
const RATE: u32 = 1000;
/// How long every packet takes, each way.
const DELAY: Duration = Duration::from_millis(10);
const CARD: Card = Card {
    mac: "52:54:00:12:34:56",
};

/// Who moves the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// QEMU alone, with `postcopy-preempt`.
    Stock,
    /// Transhume, with `--mode post`.
    Transhume,
}

impl Side {
    fn name(self) -> &'static str {
        match self {
            Self::Stock => "stock-post-copy",
            Self::Transhume => "transhume",
        }
    }
}

/// What the guest does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Load {
    /// Computes on every vCPU, while another process walks through memory at random
    Compute,
    /// Is a key-value store: redis
    Kv,
    /// Serves files: nginx
    Web,
}

impl Load {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Compute, Self::Kv, Self::Web];
    /// Those with users.
    const SERVERS: [Self; 2] = [Self::Kv, Self::Web];

    fn name(self) -> &'static str {
        match self {
            Self::Compute => "compute",
            Self::Kv => "kv",
            Self::Web => "web",
        }
    }
}

/// Sizes of a guest, in MiB.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    memory: u64,
    /// What is walked through at random.
    walk: u64,
    /// Values in the store.
    values: u64,
    /// Files to serve, all of them in the page cache.
    files: u64,
}

impl Size {
    /// The bench's: more than the link carries in five seconds is written to while memory is scanned.
    pub const BENCH: Self = Self {
        memory: 1024,
        walk: 640,
        values: 320,
        files: 640,
    };
    /// A small one.
    pub const QUICK: Self = Self {
        memory: 448,
        walk: 224,
        values: 128,
        files: 224,
    };
}

/// What it takes, got and built before a clock starts.
#[derive(Debug)]
pub struct Setup {
    size: Size,
    boot: guest::Boot,
    /// The disk with the files, and the files themselves.
    disk: PathBuf,
    pieces: Arc<Pieces>,
    qemu: PathBuf,
    programs: PathBuf,
}

/// What is measured.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Who moves the guest.
    pub sides: Vec<Side>,
    /// What it does.
    pub loads: Vec<Load>,
    /// Its vCPUs, one number a guest.
    pub vcpus: Vec<u32>,
    /// Runs of each.
    pub rounds: usize,
}

/// A run.
#[derive(Debug)]
struct Ran {
    load: Load,
    vcpus: u32,
    side: Side,
    moved: Moved,
}

impl Setup {
    /// Gets and builds everything.
    pub fn prepare(
        layout: &Layout,
        packages: &Packages,
        version: Qemu,
        size: Size,
    ) -> Result<Self> {
        Ok(Self {
            size,
            boot: guest::boot_with_servers(layout, packages, Kernel::V6_12)?,
            disk: disk::make(layout, packages, Kind::Ext4, Amount::Some(size.files))?,
            pieces: Arc::new(Pieces::new(disk::files(packages, size.files)?)),
            qemu: packages.qemu(version)?,
            programs: build::host_programs(layout)?,
        })
    }

    fn machine(&self, load: Load, vcpus: u32) -> Machine {
        let cache = if load == Load::Web {
            self.size.files
        } else {
            0
        };
        let mut settings = vec![
            ("cache-mib", cache.to_string()),
            ("memory-mib", "0".to_owned()),
            ("workers", "0".to_owned()),
            ("address", GUEST.to_owned()),
        ];
        let mut disks = Vec::new();
        match load {
            Load::Kv => settings.push(("serve", "redis".into())),
            Load::Web => {
                settings.push(("serve", "nginx".into()));
                disks.push(DiskImage {
                    id: "data".into(),
                    path: self.disk.clone(),
                    format: "raw",
                });
            }
            Load::Compute => {
                settings.push(("compute", vcpus.to_string()));
                settings.push(("walk-mib", self.size.walk.to_string()));
            }
        }
        Machine {
            name: "web1".into(),
            machine: "q35".into(),
            memory: self.size.memory,
            memory_kib: 0,
            vcpus,
            accelerator: Accelerator::Tcg,
            boot: self.boot.clone(),
            agent: AgentPort::Serial,
            disks,
            card: Some(CARD),
            settings,
        }
    }
}

impl Setup {
    /// Lets users ask a guest that is ready; nobody for one that only computes.
    fn traffic(&self, load: Load, users: &Users, console: &Console) -> Result<Option<Traffic>> {
        let clients = match load {
            Load::Compute => return Ok(None),
            Load::Kv => Store::fill(users, self.size.values)?,
            Load::Web => Web::connect(users, &self.pieces)?,
        };
        Ok(Some(Traffic::start(clients, console)))
    }
}

/// Runs every side with every load so many times, in turn.
pub fn compare(setup: &Setup, plan: &Plan) -> Result<Comparison> {
    let hosts = Hosts::apart(Some(RATE), DELAY)?;
    let users = Users::of(&hosts)?;
    let mut runs = Vec::new();
    for round in 1..=plan.rounds {
        for &vcpus in &plan.vcpus {
            for &load in &plan.loads {
                let machine = setup.machine(load, vcpus);
                for &side in &plan.sides {
                    say(format!(
                        "run {round} of {}: {}, {vcpus} vCPU, {}",
                        plan.rounds,
                        load.name(),
                        side.name()
                    ));
                    let bed = Bed {
                        hosts: &hosts,
                        qemu: &setup.qemu,
                        programs: &setup.programs,
                        machine: &machine,
                        traffic: &|console| setup.traffic(load, &users, console),
                    };
                    let moved = match side {
                        Side::Stock => by_stock(&bed)?,
                        Side::Transhume => by_transhume(&bed)?,
                    };
                    say(format!("  {}", result::line(&moved)));
                    runs.push(Ran {
                        load,
                        vcpus,
                        side,
                        moved,
                    });
                }
            }
        }
    }
    Ok(Comparison {
        size: setup.size,
        runs,
    })
}
