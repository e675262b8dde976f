//! Collects the agent's messages into reports.

use transhume_protocol::agent::AgentMessage;

/// Most ranges of one report; what a guest names beyond them is left out.
pub(super) const MAX_RANGES: usize = transhume_pages::hint_table::MAX_RUNS;
/// Most disks that a guest may name.
const MAX_DISKS: usize = 256;

/// A disk of the VM's definition, by which the guest's names are recognised.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskName {
    /// The serial number that the hypervisor gives it.
    pub serial: String,
    /// Its size in bytes.
    pub size: u64,
}

/// Clean page cache by the guest's word, in guest-physical pages of 4 KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestRange {
    /// First page frame.
    pub pfn: u64,
    /// Number of pages.
    pub pages: u32,
    /// Number of the disk in the definition.
    pub disk: u16,
    /// First sector of 512 bytes.
    pub sector: u64,
}

/// A report: whole, or as far as it came.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// The ranges, in the order in which they came.
    pub ranges: Vec<GuestRange>,
    /// Whether the guest said that it is whole.
    pub complete: bool,
    /// Ranges that were left out, because they were too many or on no disk of the VM.
    pub left_out: u64,
}

/// Collects the messages of one session.
#[derive(Debug)]
pub struct Collector {
    disks: Vec<DiskName>,
    sectors_per_page: u64,
    /// The guest's numbers of disks, and ours.
    known: Vec<(u16, Option<u16>)>,
    epoch: Option<u32>,
    report: Report,
}

const SECTOR: u64 = 512;
const PAGE_SHIFT: u8 = 12;

impl Collector {
    /// A collector for a VM with these disks, for an agent that counts in pages of 4 KiB. `None` for
    /// other page sizes: no x86 guest has them.
    pub fn new(disks: Vec<DiskName>, page_shift: u8) -> Option<Self> {
        (page_shift == PAGE_SHIFT).then(|| Self {
            disks,
            sectors_per_page: transhume_pages::SECTORS_PER_PAGE,
            known: Vec::new(),
            epoch: None,
            report: Report::default(),
        })
    }

    /// The report so far.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// Takes a message. Returns the report when this message completes it.
    pub fn take(&mut self, message: &AgentMessage<'_>) -> Option<Report> {
        match *message {
            AgentMessage::Disk {
                index,
                sectors,
                serial,
                ..
            } => {
                self.name_disk(index, sectors, serial);
            }
            AgentMessage::EpochBegin { epoch } => {
                self.epoch = Some(epoch);
                self.report = Report::default();
            }
            AgentMessage::Ranges(ranges) if self.epoch.is_some() => {
                let disk = self.known.iter().find(|(index, _)| *index == ranges.disk);
                let disk = disk.and_then(|(_, ours)| *ours);
                // A range that cannot be read ends its message; the others count.
                for range in ranges.iter(self.sectors_per_page).map_while(Result::ok) {
                    match disk {
                        Some(disk) if self.report.ranges.len() < MAX_RANGES => {
                            self.report.ranges.push(GuestRange {
                                pfn: range.pfn,
                                pages: range.pages,
                                disk,
                                sector: range.sector,
                            });
                        }
                        _ => self.report.left_out += 1,
                    }
                }
            }
            AgentMessage::EpochEnd { epoch, .. } if self.epoch == Some(epoch) => {
                self.epoch = None;
                self.report.complete = true;
                return Some(std::mem::take(&mut self.report));
            }
            _ => {}
        }
        None
    }

    /// Recognises a disk by its serial number, or by a size that only one disk has.
    fn name_disk(&mut self, index: u16, sectors: u64, serial: &str) {
        let by_serial = self.disks.iter().position(|disk| disk.serial == serial);
        let ours = by_serial.or_else(|| {
            let size = sectors.checked_mul(SECTOR)?;
            let mut same = self
                .disks
                .iter()
                .enumerate()
                .filter(|(_, disk)| disk.size == size);
            let first = same.next();
            first
                .filter(|_| serial.is_empty() && same.next().is_none())
                .map(|(at, _)| at)
        });
        let ours = ours.and_then(|at| u16::try_from(at).ok());
        if let Some(known) = self.known.iter_mut().find(|(known, _)| *known == index) {
            known.1 = ours;
        } else if self.known.len() < MAX_DISKS {
            self.known.push((index, ours));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use transhume_protocol::agent::{Decoder, MAX_FRAME_LEN, Range, RangeEncoder};

    fn disks() -> Vec<DiskName> {
        [("root", 1 << 30), ("data", 1 << 20)]
            .map(|(serial, size)| DiskName {
                serial: serial.to_owned(),
                size,
            })
            .to_vec()
    }

    fn give(collector: &mut Collector, disk: u16, ranges: &[Range]) -> Option<Report> {
        let mut out = vec![0; MAX_FRAME_LEN];
        let mut encoder = RangeEncoder::new(&mut out, disk, 8).unwrap();
        for &range in ranges {
            assert!(encoder.add(range));
        }
        let length = encoder.finish().unwrap();
        let mut decoder = Decoder::new();
        decoder.push(&out[..length]);
        let (kind, payload) = decoder.next_frame().unwrap();
        collector.take(&AgentMessage::decode(kind, payload).unwrap())
    }

    #[test]
    fn a_report_is_whole_only_between_its_marks() {
        let range = Range {
            pfn: 3,
            sector: 16,
            pages: 2,
        };
        let mut collector = Collector::new(disks(), 12).unwrap();
        give(&mut collector, 0, &[range]);
        assert_eq!(collector.report().ranges, []);
        let data = AgentMessage::Disk {
            index: 7,
            sectors: 2048,
            serial: "",
            name: "vdb",
        };
        assert_eq!(collector.take(&data), None);
        assert_eq!(collector.take(&AgentMessage::EpochBegin { epoch: 1 }), None);
        assert_eq!(give(&mut collector, 7, &[range]), None);
        assert_eq!(give(&mut collector, 8, &[range]), None);
        let wrong = AgentMessage::EpochEnd {
            epoch: 2,
            pages: 0,
            cpu_us: 0,
        };
        assert_eq!(collector.take(&wrong), None);
        let end = AgentMessage::EpochEnd {
            epoch: 1,
            pages: 0,
            cpu_us: 0,
        };
        let report = collector.take(&end).unwrap();
        assert_eq!(
            report.ranges,
            [GuestRange {
                pfn: 3,
                pages: 2,
                disk: 1,
                sector: 16
            }]
        );
        assert_eq!((report.complete, report.left_out), (true, 1));
    }

    #[test]
    fn a_serial_number_counts_before_a_size() {
        let mut collector = Collector::new(disks(), 12).unwrap();
        collector.name_disk(0, 2048, "root");
        collector.name_disk(1, 2048, "other");
        assert_eq!(collector.known, [(0, Some(0)), (1, None)]);
    }

    #[test]
    fn other_page_sizes_are_not_used() {
        assert!(Collector::new(disks(), 16).is_none());
    }
}
