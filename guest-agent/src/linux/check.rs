//! A report without a host, for people.

use super::{Error, LinuxCache};
use crate::cache::{PageCache as _, Step};
use std::fmt::{self, Display};
use transhume_protocol::agent::ReportSource;

/// What a report found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    source: ReportSource,
    /// Name, serial and pages of each disk.
    disks: Vec<(String, String, u64)>,
    page_size: u64,
    cpu_ms: u128,
}

/// Makes one report.
pub fn check(cache: &mut LinuxCache) -> Result<Summary, Error> {
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
    Ok(Summary {
        source,
        disks,
        page_size: 1 << cache.page_shift(),
        cpu_ms: cache.cpu_time().saturating_sub(before).as_millis(),
    })
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
        Ok(())
    }
}
