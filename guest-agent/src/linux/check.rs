//! A report without a host, for people.

use super::{Error, LinuxCache, LinuxClasses};
use crate::cache::{PageCache as _, Step};
use crate::classes::{Classes as _, Named};
use nix::unistd::{SysconfVar, sysconf};
use std::fmt::{self, Display};
use transhume_protocol::agent::{ClassCounts, MemoryClass, ReportSource};

/// What a report found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    source: ReportSource,
    /// Name, serial and pages of each disk.
    disks: Vec<(String, String, u64)>,
    page_size: u64,
    cpu_ms: u128,
    counts: ClassCounts,
    /// Pages that processes have touched since they were last looked at; `None` where that is not told.
    touched: Option<u64>,
}

/// Makes one report, and tells classes of memory.
pub fn check(cache: &mut LinuxCache, classes: &mut LinuxClasses) -> Result<Summary, Error> {
    let source = cache.source();
    let before = cache.cpu_time();
    cache.begin()?;
    let mut disks: Vec<_> = (0..u16::MAX)
        .map_while(|number| cache.disk(number))
        .map(|disk| (disk.name.to_owned(), disk.serial.to_owned(), 0))
        .collect();
    loop {
        match cache.step()? {
            Step::Found { disk, range } => {
                if let Some((_, _, pages)) = disks.get_mut(usize::from(disk)) {
                    *pages += u64::from(range.pages);
                }
            }
            Step::Pending => {}
            Step::Done => break,
        }
    }
    cache.end();
    let (counts, touched) = name(classes);
    Ok(Summary {
        source,
        disks,
        page_size: 1 << cache.page_shift(),
        cpu_ms: cache.cpu_time().saturating_sub(before).as_millis(),
        counts,
        touched: (touched > 0).then_some(touched),
    })
}

/// Frames that are no memory, at most, below the last one that is: the hole below 4 GiB.
const MAX_HOLES: u64 = 1 << 20;

/// How much memory there is of each class, and how many pages were touched.
fn name(classes: &mut LinuxClasses) -> (ClassCounts, u64) {
    let pages = sysconf(SysconfVar::_PHYS_PAGES).ok().flatten();
    let pages = pages.and_then(|pages| u64::try_from(pages).ok());
    classes.begin(pages.unwrap_or(0).saturating_add(MAX_HOLES));
    let mut touched = 0_u64;
    loop {
        match classes.step() {
            Named::Found(MemoryClass::WorkingSet(_), run) => {
                touched = touched.saturating_add(run.pages);
            }
            Named::Found(MemoryClass::Kernel, _) | Named::Pending => {}
            Named::Done(counts) => return (counts, touched),
        }
    }
}

impl Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let source = match self.source {
            ReportSource::Module => "the kernel module",
            ReportSource::UserSpace => "user space (no kernel module)",
            ReportSource::BareMetal => "its own memory",
        };
        write!(f, "source: {source}, {} ms of CPU time", self.cpu_ms)?;
        for (name, serial, pages) in &self.disks {
            let mib = pages * self.page_size / (1 << 20);
            write!(
                f,
                "\n{name} (serial \"{serial}\"): {pages} pages, {mib} MiB"
            )?;
        }
        let mib = |pages: u64| pages * self.page_size / (1 << 20);
        let counts = &self.counts;
        write!(
            f,
            "\nmemory in MiB: kernel {}, slab {}, page tables {}, anonymous {}, clean files {}, dirty files {}, \
             free {}, other {}",
            mib(counts.kernel),
            mib(counts.slab),
            mib(counts.page_tables),
            mib(counts.anonymous),
            mib(counts.clean_file),
            mib(counts.dirty_file),
            mib(counts.free),
            mib(counts.other)
        )?;
        let reported = self.disks.iter().map(|(_, _, pages)| *pages).sum();
        let left_out = mib(counts.clean_file.saturating_sub(reported));
        if left_out > 0 {
            write!(
                f,
                "\n{left_out} MiB of clean files cannot be reported: they are on LVM, LUKS, md, loop devices, btrfs, \
                 network file systems, or in memory only"
            )?;
        }
        match self.touched {
            Some(pages) => write!(f, "\nworked with by processes: {} MiB", mib(pages)),
            None => write!(
                f,
                "\nworked with by processes: not told without the kernel module"
            ),
        }
    }
}
