//! The host's view of a report, for tests: a report is received over the channel, and every page of
//! it is compared with a stopped guest's memory and with its raw disks.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};
use thiserror::Error;
use transhume_protocol::agent::{
    AgentMessage, Decoder, HostMessage, MAX_FRAME_LEN, MessageError, Range, ReportSource, VERSION,
};

/// Bytes of a page; the only size that is compared.
const PAGE: u64 = 4096;
const SECTORS_PER_PAGE: u64 = PAGE / 512;

/// Why a report was not received or not compared.
#[derive(Debug, Error)]
pub enum Error {
    /// The channel failed.
    #[error("the channel to the agent failed: {0}")]
    Channel(#[source] io::Error),
    /// The agent hung up, or the guest did.
    #[error("the agent's port was closed before its report ended")]
    Closed,
    /// No whole report came in time.
    #[error("no report ended within {0:?}: is the agent running in the guest?")]
    Late(Duration),
    /// A frame held no message.
    #[error("the agent sent what is no message: {0}")]
    Message(#[from] MessageError),
    /// The agent speaks of pages of another size.
    #[error("pages of 2^{0} bytes cannot be compared, only those of 4 KiB")]
    PageSize(u8),
    /// Memory or a disk could not be read.
    #[error("cannot read {what}: {source}")]
    Read {
        /// What.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// A page frame is outside the guest's memory.
    #[error("the report names page frame {0:#x}, which is outside the guest's memory")]
    NoSuchFrame(u64),
}

/// A disk as a report names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReportedDisk {
    /// The serial number that the hypervisor gave it.
    pub serial: String,
    /// The guest's name for it.
    pub name: String,
    /// Size in sectors of 512 bytes.
    pub sectors: u64,
}

/// One whole report, and what led to it.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Where it comes from.
    pub source: Option<ReportSource>,
    /// The disks by number.
    pub disks: BTreeMap<u16, ReportedDisk>,
    /// The ranges with their disk's number, as they came.
    pub ranges: Vec<(u16, Range)>,
    /// What the agent said that a person should know.
    pub troubles: Vec<String>,
    /// Its number in the session.
    pub epoch: u32,
    /// CPU time that the agent took for it, in microseconds.
    pub cpu_us: u64,
    /// Bytes that came over the channel since the session opened.
    pub bytes: u64,
}

impl Report {
    /// Pages in it.
    pub fn pages(&self) -> u64 {
        self.ranges
            .iter()
            .map(|(_, range)| u64::from(range.pages))
            .sum()
    }

    fn take(&mut self, message: AgentMessage<'_>) -> Result<bool, Error> {
        match message {
            AgentMessage::Hello {
                source, page_shift, ..
            } => {
                if 1 << page_shift != PAGE {
                    return Err(Error::PageSize(page_shift));
                }
                self.source = Some(source);
            }
            AgentMessage::Disk {
                index,
                sectors,
                serial,
                name,
            } => {
                let disk = ReportedDisk {
                    serial: serial.to_owned(),
                    name: name.to_owned(),
                    sectors,
                };
                self.disks.insert(index, disk);
            }
            AgentMessage::EpochBegin { .. } => self.ranges.clear(),
            AgentMessage::Ranges(ranges) => {
                for range in ranges.iter(SECTORS_PER_PAGE) {
                    self.ranges.push((ranges.disk, range?));
                }
            }
            AgentMessage::EpochEnd { epoch, cpu_us, .. } => {
                self.epoch = epoch;
                self.cpu_us = cpu_us;
                return Ok(true);
            }
            AgentMessage::Trouble { text } => self.troubles.push(text.to_owned()),
        }
        Ok(false)
    }
}

/// Opens a session with the agent, receives reports until one has at least this number, and stops
/// the agent's reporting.
///
/// The channel should have a read time-out, or a guest without an agent is waited for in vain.
pub fn receive(
    channel: &mut (impl Read + Write),
    session: u64,
    epoch: u32,
    patience: Duration,
) -> Result<Report, Error> {
    say(
        channel,
        HostMessage::Hello {
            oldest: VERSION,
            newest: VERSION,
            session,
        },
    )?;
    say(
        channel,
        HostMessage::ReportStart {
            interval_ms: 500,
            cpu_permille: 1000,
        },
    )?;
    let started = Instant::now();
    let mut decoder = Decoder::new();
    let mut report = Report::default();
    let mut input = vec![0; 64 * 1024];
    // What an earlier host asked for may still be on its way.
    let mut is_ours = false;
    loop {
        if started.elapsed() > patience {
            return Err(Error::Late(patience));
        }
        let read = match channel.read(&mut input) {
            Ok(0) => return Err(Error::Closed),
            Ok(read) => read,
            Err(error) if is_time_out(&error) => continue,
            Err(error) => return Err(Error::Channel(error)),
        };
        report.bytes += read as u64;
        let mut rest = &input[..read];
        while !rest.is_empty() {
            let taken = decoder.push(rest);
            rest = &rest[taken..];
            while let Some((kind, payload)) = decoder.next_frame() {
                let message = AgentMessage::decode(kind, payload)?;
                is_ours |=
                    matches!(message, AgentMessage::Hello { session: of, .. } if of == session);
                if is_ours && report.take(message)? && report.epoch >= epoch {
                    say(channel, HostMessage::ReportStop)?;
                    return Ok(report);
                }
            }
        }
    }
}

fn is_time_out(error: &io::Error) -> bool {
    use io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
    matches!(error.kind(), Interrupted | TimedOut | WouldBlock)
}

fn say(channel: &mut impl Write, message: HostMessage) -> Result<(), Error> {
    let mut out = vec![0; MAX_FRAME_LEN];
    let length = message
        .encode(&mut out)
        .map_err(|error| Error::Channel(io::Error::other(error)))?;
    channel.write_all(&out[..length]).map_err(Error::Channel)
}

/// What comparing the pages of one disk showed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Compared {
    /// Pages compared.
    pub pages: u64,
    /// Pages of these that hold nothing but zeros, which proves little.
    pub zero: u64,
    /// Page frames whose content differs from the disk's, the first few.
    pub different: Vec<u64>,
    /// How many differ.
    pub differing: u64,
}

/// Frames that [`Compared::different`] lists at most.
const LISTED: usize = 16;

/// Compares the pages that a report names on the disk with this serial.
///
/// The guest must be stopped. `memory` is its memory (`memory-backend-file,share=on`), and
/// `offset_of` tells where a guest-physical address stands in it; `disk` is the raw disk.
pub fn compare(
    report: &Report,
    serial: &str,
    memory: &File,
    offset_of: impl Fn(u64) -> Option<u64>,
    disk: &File,
) -> Result<Compared, Error> {
    let read_error = |what: &str| {
        let what = what.to_owned();
        |source| Error::Read { what, source }
    };
    let mut compared = Compared::default();
    let mut in_memory = vec![0; 4096];
    let mut on_disk = vec![0; 4096];
    let is_on_it = |number: &u16| {
        let disk = report.disks.get(number);
        disk.is_some_and(|disk| disk.serial == serial)
    };
    for (_, range) in report.ranges.iter().filter(|(disk, _)| is_on_it(disk)) {
        for page in 0..u64::from(range.pages) {
            let pfn = range.pfn.saturating_add(page);
            let offset = pfn
                .checked_mul(PAGE)
                .and_then(&offset_of)
                .ok_or(Error::NoSuchFrame(pfn))?;
            memory
                .read_exact_at(&mut in_memory, offset)
                .map_err(read_error("the guest's memory"))?;
            disk.read_exact_at(
                &mut on_disk,
                range.sector.saturating_mul(512).saturating_add(page * PAGE),
            )
            .map_err(read_error(serial))?;
            compared.pages += 1;
            compared.zero += u64::from(in_memory.iter().all(|&byte| byte == 0));
            if in_memory != on_disk {
                compared.differing += 1;
                if compared.different.len() < LISTED {
                    compared.different.push(pfn);
                }
            }
        }
    }
    Ok(compared)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(ranges: Vec<(u16, Range)>) -> Report {
        let disk = |serial: &str| ReportedDisk {
            serial: serial.into(),
            name: String::new(),
            sectors: 1 << 10,
        };
        Report {
            disks: [(0, disk("a")), (1, disk("b"))].into(),
            ranges,
            ..Report::default()
        }
    }

    fn file(pages: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        for &byte in pages {
            file.write_all(&[byte; 4096]).unwrap();
        }
        file
    }

    #[test]
    fn pages_that_differ_are_found() {
        let range = |pfn, sector, pages| Range { pfn, sector, pages };
        let report = report(vec![
            (0, range(1, 0, 3)),
            (1, range(0, 0, 1)), // of another disk
            (0, range(5, 24, 1)),
        ]);
        let memory = file(&[9, 0, 1, 2, 7, 3]);
        let disk = file(&[0, 1, 8, 3]);
        let compared = compare(&report, "a", &memory, Some, &disk).unwrap();
        assert_eq!(
            compared,
            Compared {
                pages: 4,
                zero: 1,
                different: vec![3],
                differing: 1,
            }
        );
    }

    #[test]
    fn a_frame_outside_memory_is_an_error() {
        let report = report(vec![(
            0,
            Range {
                pfn: 100,
                sector: 0,
                pages: 1,
            },
        )]);
        let below = |address| (address < 4096).then_some(address);
        let compared = compare(&report, "a", &file(&[1]), below, &file(&[1]));
        assert!(matches!(compared, Err(Error::NoSuchFrame(100))));
    }
}
