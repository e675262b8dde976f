//! What it costs when something is bad: a slow disk, an agent whose every hint is wrong, a link that breaks
//! down for a while. Each against stock plain QEMU that moves the same guest under the same conditions. No
//! byte of the guest's compresses, so that nothing makes up for what is lost.

use super::compare::median;
use super::measure::as_f64;
use super::micro::{self, Bed, Moved, by_stock, by_transhume};
use super::slow_disk::SlowDisk;
use crate::guest::build;
use crate::hosts::Hosts;
use crate::layout::Layout;
use crate::packages::{Packages, Qemu};
use crate::progress::{say, step};
use crate::qemu::DiskImage;
use crate::qemu::migrate::Stock;
use crate::{Error, Result};
use clap::ValueEnum;
use micro_guest::content::Seed;
use micro_guest::image::write_image;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The link, in Mbit/s.
const RATE: u32 = 1000;
/// What it carries while it is bad.
const DIPPED: u32 = RATE / 10;
/// How long it is bad.
const DIP: Duration = Duration::from_secs(5);
/// What a slow disk gives, in bytes a second.
const SLOW: u64 = 10_000_000;

/// What is bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Case {
    /// The disk gives 10 MB/s
    SlowDisk,
    /// The agent names other sectors than the right ones, for every page
    WrongHints,
    /// The link drops to a tenth for five seconds
    LinkDip,
}

impl Case {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::SlowDisk, Self::WrongHints, Self::LinkDip];

    fn name(self) -> &'static str {
        match self {
            Self::SlowDisk => "slow-disk",
            Self::WrongHints => "wrong-hints",
            Self::LinkDip => "link-dip",
        }
    }

    /// The ratio that is to be reached.
    fn target(self) -> f64 {
        match self {
            Self::WrongHints => 1.10,
            Self::SlowDisk | Self::LinkDip => 1.05,
        }
    }
}

/// Sizes of a guest, in MiB.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    memory: u64,
    cache: u64,
    data: u64,
    /// When the link begins to be bad, after the command.
    dip_after: Duration,
}

impl Size {
    /// The bench's: half of 1 GiB is page cache.
    pub const BENCH: Self = Self {
        memory: 1024,
        cache: 512,
        data: 448,
        dip_after: Duration::from_secs(2),
    };
    /// A small one.
    pub const QUICK: Self = Self {
        memory: 256,
        cache: 96,
        data: 96,
        dip_after: Duration::from_millis(700),
    };

    /// The disk is a little larger than what is cached of it.
    fn disk(self) -> u64 {
        self.cache * 5 / 4
    }
}

/// What it takes, got and built before a clock starts.
#[derive(Debug)]
pub struct Setup {
    size: Size,
    kernel: PathBuf,
    image: PathBuf,
    qemu: PathBuf,
    programs: PathBuf,
}

/// A run.
#[derive(Debug)]
struct Ran {
    case: Case,
    transhume: bool,
    moved: Moved,
}

/// All runs.
#[derive(Debug)]
pub struct Comparison {
    size: Size,
    runs: Vec<Ran>,
}

impl Setup {
    /// A guest of a size.
    pub fn prepare(
        layout: &Layout,
        packages: &Packages,
        version: Qemu,
        size: Size,
    ) -> Result<Self> {
        Ok(Self {
            size,
            kernel: build::micro_guest(layout)?,
            image: image(layout, size.disk())?,
            qemu: packages.qemu(version)?,
            programs: build::host_programs(layout)?,
        })
    }

    fn run(&self, hosts: &Hosts, case: Case, transhume: bool) -> Result<Moved> {
        let slow = match case {
            Case::SlowDisk => Some(SlowDisk::attach(&self.image)?),
            Case::WrongHints | Case::LinkDip => None,
        };
        let Size {
            memory,
            cache,
            data,
            dip_after,
        } = self.size;
        let lie = match case {
            Case::WrongHints => "wrong",
            Case::SlowDisk | Case::LinkDip => "none",
        };
        let machine = micro::machine(
            self.kernel.clone(),
            memory,
            format!("content=random cache={cache}M data={data}M zero=0 rate=4M lie={lie}"),
            vec![DiskImage {
                id: "root".into(),
                path: slow.as_ref().map_or(&self.image, |slow| &slow.path).clone(),
                format: "raw",
            }],
        );
        let limit = |bytes| slow.as_ref().map_or(Ok(()), |slow| slow.limit(bytes));
        let bed = Bed {
            hosts,
            qemu: &self.qemu,
            programs: &self.programs,
            machine: &machine,
            credentials: None,
            before: &|| limit(SLOW),
            beside: &|| {
                if case == Case::LinkDip {
                    std::thread::sleep(dip_after);
                    hosts.shape(Some(DIPPED))?;
                    std::thread::sleep(DIP);
                    hosts.shape(Some(RATE))?;
                }
                Ok(())
            },
            after: &|| limit(0),
        };
        if transhume {
            by_transhume(&bed)
        } else {
            by_stock(&bed, Stock::Plain)
        }
    }
}

/// The disk, of content that does not compress. Nobody writes to it.
fn image(layout: &Layout, mib: u64) -> Result<PathBuf> {
    let path = layout.folder("disks")?.join(format!("random-{mib}.raw"));
    if fs::metadata(&path).is_ok_and(|found| found.len() == mib << 20) {
        return Ok(path);
    }
    let draft = path.with_extension("draft");
    let seed = Seed {
        number: 1,
        random: true,
    };
    step("Writing the guest's disk", || {
        write_image(&draft, seed, mib << 20).map_err(Error::file("write", Path::new(&draft)))
    })?;
    fs::rename(&draft, &path).map_err(Error::file("rename", &draft))?;
    Ok(path)
}

/// Runs both sides so many times in every case, in turn.
pub fn compare(setup: &Setup, cases: &[Case], rounds: usize) -> Result<Comparison> {
    let hosts = Hosts::new(Some(RATE))?;
    let mut runs = Vec::new();
    for round in 1..=rounds {
        for &case in cases {
            for transhume in [false, true] {
                let side = side(transhume);
                say(format!("run {round} of {rounds}: {}, {side}", case.name()));
                let moved = setup.run(&hosts, case, transhume)?;
                say(format!(
                    "  total {:.0} ms, downtime {:.0} ms, {:.0} MB on the wire; {} pages right",
                    moved.total_ms,
                    moved.downtime_ms,
                    as_f64(moved.wire_bytes) / 1e6,
                    moved.checked_pages
                ));
                runs.push(Ran {
                    case,
                    transhume,
                    moved,
                });
            }
        }
    }
    Ok(Comparison {
        size: setup.size,
        runs,
    })
}

fn side(transhume: bool) -> &'static str {
    if transhume {
        "transhume"
    } else {
        "stock-plain"
    }
}

impl Comparison {
    fn median_of(&self, case: Case, transhume: bool, what: impl Fn(&Moved) -> f64) -> f64 {
        let runs = self
            .runs
            .iter()
            .filter(|ran| (ran.case, ran.transhume) == (case, transhume));
        median(runs.map(|ran| what(&ran.moved)))
    }

    /// Transhume's total time by stock's; none if the case was not measured.
    fn ratio(&self, case: Case) -> Option<f64> {
        let total = |transhume| self.median_of(case, transhume, |moved| moved.total_ms);
        let ratio = total(true) / total(false);
        ratio.is_finite().then_some(ratio)
    }

    /// The bench's one object.
    pub fn json(&self) -> Value {
        let round = |value: f64| (value * 1000.0).round() / 1000.0;
        let runs: Vec<Value> = self
            .runs
            .iter()
            .map(
                |Ran {
                     case,
                     transhume,
                     moved,
                 }| {
                    json!({
                        "case": case.name(),
                        "side": side(*transhume),
                        "total_ms": round(moved.total_ms),
                        "stream_ms": round(moved.stream_ms),
                        "downtime_ms": round(moved.downtime_ms),
                        "wire_bytes": moved.wire_bytes,
                        "peak_rss_mib": round(micro::mib(moved.peak_memory)),
                        "checked_pages": moved.checked_pages,
                        "summary": moved.summary,
                    })
                },
            )
            .collect();
        json!({
            "bench": "adapt",
            "slow_disk_ratio": self.ratio(Case::SlowDisk).map(round),
            "wrong_hints_ratio": self.ratio(Case::WrongHints).map(round),
            "link_dip_ratio": self.ratio(Case::LinkDip).map(round),
            "runs": runs,
        })
    }

    /// A table for people.
    pub fn table(&self) -> String {
        let mut text = format!(
            "Total time, from the command to the guest's first sign at the destination, of a guest of {} MiB:\n\
             {} MiB page cache, {} MiB data of which 4 MiB/s are written, nothing of it compresses; {RATE} Mbit/s.\n\
             slow-disk: the shared disk gives {} MB/s from before the command. wrong-hints: the agent names wrong\n\
             sectors for every page. link-dip: {DIPPED} Mbit/s for {} s, from {:.1} s after the command.\n\n\
             {:<16} {:>13} {:>12} {:>7} {:>7} {:>18} {:>15}\n",
            self.size.memory,
            self.size.cache,
            self.size.data,
            SLOW / 1_000_000,
            DIP.as_secs(),
            self.size.dip_after.as_secs_f64(),
            "median of runs",
            "stock plain s",
            "Transhume s",
            "ratio",
            "target",
            "pages from disk",
            "sent after all",
        );
        for case in Case::ALL {
            let Some(ratio) = self.ratio(case) else {
                continue;
            };
            let total =
                |transhume| self.median_of(case, transhume, |moved| moved.total_ms) / 1000.0;
            let pages = |what: &str| {
                self.median_of(case, true, |moved| {
                    let summary = moved.summary.as_ref();
                    let found = summary.and_then(|summary| summary["traffic"][what].as_f64());
                    found.unwrap_or(f64::NAN)
                })
            };
            let _ = writeln!(
                text,
                "{:<16} {:>13.2} {:>12.2} {ratio:>7.3} {:>7.2} {:>18.0} {:>15.0}",
                case.name(),
                total(false),
                total(true),
                case.target(),
                pages("disk-pages"),
                pages("mismatched-pages") + pages("late-pages"),
            );
        }
        text
    }
}
