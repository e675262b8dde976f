//! Classes of this guest's memory, from the kernel module (see kernel-module/transhume.h), and without it from
//! /proc/kpageflags, which does not tell what processes touch.

mod first;
mod flags;

use first::OWN_RANK;
pub use first::{First, Group};

use super::device;
use crate::classes::{Classes, Named};
use flags::Flags;
use nix::errno::Errno;
use std::collections::VecDeque;
use std::fs::{self, File};
use std::os::fd::AsRawFd as _;
use tracing::{debug, info};
use transhume_protocol::agent::{ClassCounts, FrameRun, MemoryClass};

/// `TRANSHUME_MAX_RANGES`.
const MAX_RANGES: usize = 512;
/// `TRANSHUME_CLASS_COUNT`.
const CLASSES: usize = 8;

/// A process's runs of so many pages and more come behind its shorter ones: its heap behind its stack and its
/// libraries, without which it does nothing with a heap.
const LONG: u64 = 64;

/// `struct transhume_frames`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct Frames {
    pfn: u64,
    pages: u64,
}

/// `struct transhume_classes`.
#[repr(C)]
#[derive(Debug)]
pub(super) struct Look {
    pfn: u64,
    end: u64,
    frames: u64,
    count: u32,
    flags: u32,
    pages: [u64; CLASSES],
}

/// `struct transhume_touched`.
#[repr(C)]
#[derive(Debug)]
pub(super) struct Touched {
    addr: u64,
    frames: u64,
    count: u32,
    pid: i32,
    flags: u32,
    reserved: u32,
}

nix::ioctl_readwrite!(classes, device::MAGIC, 10, Look);
nix::ioctl_readwrite!(touched, device::MAGIC, 11, Touched);

/// Where classes are told.
#[derive(Debug)]
enum Source {
    Module(File),
    Flags(Flags),
    /// Neither is there.
    None,
}

impl Source {
    fn open() -> Self {
        let has_classes = |device: &File| {
            let mut frames = [Frames::default()];
            look(device, &mut 0, 0, &mut frames).is_ok()
        };
        match device::open_file() {
            // An older module does not know of them.
            Ok(device) if has_classes(&device) => Self::Module(device),
            _ => Flags::open().map_or(Self::None, Self::Flags),
        }
    }
}

/// Goes on to look at frames below `end`; the kernel's, and counts of each class.
fn look<'a>(
    device: &File,
    at: &mut u64,
    end: u64,
    frames: &'a mut [Frames],
) -> nix::Result<(&'a [Frames], [u64; CLASSES])> {
    let mut look = Look {
        pfn: *at,
        end,
        frames: frames.as_mut_ptr() as u64,
        count: u32::try_from(frames.len()).unwrap_or(0),
        flags: 0,
        pages: [0; CLASSES],
    };
    // SAFETY: the descriptor is open; the call fills `look`, and `count` frames at most where it points to, which is
    // a slice of that many.
    unsafe { classes(device.as_raw_fd(), &raw mut look) }?;
    *at = look.pfn;
    let count = usize::try_from(look.count).unwrap_or(0);
    Ok((frames.get(..count).unwrap_or_default(), look.pages))
}

/// Goes on to look what a process has touched; with no room for frames it is only forgotten.
fn touch<'a>(
    device: &File,
    pid: i32,
    addr: &mut u64,
    frames: &'a mut [Frames],
) -> nix::Result<&'a [Frames]> {
    let mut look = Touched {
        addr: *addr,
        frames: frames.as_mut_ptr() as u64,
        count: u32::try_from(frames.len()).unwrap_or(0),
        pid,
        flags: 0,
        reserved: 0,
    };
    // SAFETY: as in `look`.
    unsafe { touched(device.as_raw_fd(), &raw mut look) }?;
    *addr = look.addr;
    let count = usize::try_from(look.count).unwrap_or(0);
    Ok(frames.get(..count).unwrap_or_default())
}

/// Pages of memory that a process has, by the second number of `/proc/PID/statm` (`proc_pid_statm(5)`); 0 if it is
/// gone.
fn resident_pages(pid: i32) -> u64 {
    let numbers = fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    let resident = numbers.split_ascii_whitespace().nth(1);
    resident.and_then(|pages| pages.parse().ok()).unwrap_or(0)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Done,
    /// Frames are looked at, from this one on.
    Frames(u64),
    /// Processes are looked at; in the first one from this address on.
    Processes(u64),
}

/// The classes of this guest.
#[derive(Debug)]
pub struct LinuxClasses {
    first: First,
    source: Source,
    stage: Stage,
    /// What processes touched is named, and not just forgotten.
    names: bool,
    frames: u64,
    /// Ranks, sizes in pages and processes that are left, the next one last.
    to_walk: Vec<(u8, u64, i32)>,
    found: VecDeque<(MemoryClass, FrameRun)>,
    /// Long runs of the process that is looked at.
    long: Vec<(MemoryClass, FrameRun)>,
    counts: ClassCounts,
    /// Pages that processes touched: of what the administrator wants first, and of all others.
    touched: (u64, u64),
}

impl LinuxClasses {
    /// With what an administrator wants first.
    pub fn new(first: First) -> Self {
        Self {
            first,
            source: Source::None,
            stage: Stage::Done,
            names: false,
            frames: 0,
            to_walk: Vec::new(),
            found: VecDeque::new(),
            long: Vec::new(),
            counts: ClassCounts::default(),
            touched: (0, 0),
        }
    }

    fn rank_processes(&mut self) {
        let ranked = super::gate::processes().into_iter();
        // Nobody sleeps for a page before this process knows which ones are absent.
        let own = i32::try_from(std::process::id()).ok();
        let rank = |pid| {
            if Some(pid) == own {
                OWN_RANK
            } else {
                self.first.rank_of(pid)
            }
        };
        // Small ones first: that lets the most of them go on the soonest, and hardly holds up the large ones.
        let ranked = ranked.map(|pid| (rank(pid), resident_pages(pid), pid));
        self.to_walk = ranked.collect();
        self.to_walk.sort_unstable_by(|a, b| b.cmp(a));
    }

    /// Goes on with frames from `at` on; whether there is more.
    fn look_at_frames(&mut self, mut at: u64) -> Stage {
        let found = &mut self.found;
        let mut add = |pfn, pages| {
            found.push_back((MemoryClass::Kernel, FrameRun { pfn, pages }));
        };
        let counts = match &mut self.source {
            Source::Module(device) => {
                let mut frames = [Frames::default(); MAX_RANGES];
                match look(device, &mut at, self.frames, &mut frames) {
                    Ok((frames, counts)) => {
                        for run in frames {
                            add(run.pfn, run.pages);
                        }
                        counts
                    }
                    Err(error) => {
                        debug!(%error, "classes of frames");
                        at = 0;
                        [0; CLASSES]
                    }
                }
            }
            Source::Flags(flags) => flags.look(&mut at, self.frames, add),
            Source::None => {
                at = 0;
                [0; CLASSES]
            }
        };
        let all = &mut self.counts;
        for (sum, count) in [
            &mut all.kernel,
            &mut all.slab,
            &mut all.page_tables,
            &mut all.anonymous,
            &mut all.clean_file,
            &mut all.dirty_file,
            &mut all.free,
            &mut all.other,
        ]
        .into_iter()
        .zip(counts)
        {
            *sum = sum.saturating_add(count);
        }
        if at == 0 {
            self.rank_processes();
            Stage::Processes(0)
        } else {
            Stage::Frames(at)
        }
    }

    /// Goes on with the next process, from that address on.
    fn look_at_process(&mut self, mut addr: u64) -> Stage {
        let (Source::Module(device), Some(&(rank, _, pid))) = (&self.source, self.to_walk.last())
        else {
            return Stage::Done;
        };
        let mut frames = [Frames::default(); MAX_RANGES];
        let room = if self.names { MAX_RANGES } else { 0 };
        match touch(device, pid, &mut addr, &mut frames[..room]) {
            Ok(frames) => {
                let class = MemoryClass::WorkingSet(rank);
                let pages = frames
                    .iter()
                    .map(|run| run.pages)
                    .fold(0, u64::saturating_add);
                let (first, others) = &mut self.touched;
                let sum = if self.first.wants(rank) {
                    first
                } else {
                    others
                };
                *sum = sum.saturating_add(pages);
                for &Frames { pfn, pages } in frames {
                    let run = (class, FrameRun { pfn, pages });
                    if pages < LONG {
                        self.found.push_back(run);
                    } else {
                        self.long.push(run);
                    }
                }
            }
            // It has ended, or has no memory.
            Err(Errno::ESRCH) => addr = 0,
            Err(error) => {
                debug!(%error, pid, "what a process touched");
                addr = 0;
            }
        }
        if addr == 0 {
            self.to_walk.pop();
            self.found.extend(self.long.drain(..));
        }
        Stage::Processes(addr)
    }
}

impl Classes for LinuxClasses {
    fn watch(&mut self) {
        self.source = Source::open();
        self.names = false;
        self.found.clear();
        self.long.clear();
        self.rank_processes();
        self.stage = Stage::Processes(0);
    }

    fn begin(&mut self, frames: u64) {
        self.source = Source::open();
        self.names = true;
        self.found.clear();
        self.long.clear();
        self.frames = frames;
        self.counts = ClassCounts::default();
        self.touched = (0, 0);
        self.stage = Stage::Frames(0);
    }

    fn step(&mut self) -> Named {
        if let Some((class, run)) = self.found.pop_front() {
            return Named::Found(class, run);
        }
        self.stage = match self.stage {
            Stage::Frames(at) => self.look_at_frames(at),
            Stage::Processes(addr) => self.look_at_process(addr),
            Stage::Done => {
                if std::mem::take(&mut self.names) {
                    let (first, others) = self.touched;
                    info!(
                        first,
                        others, "the host knows which pages processes work with"
                    );
                }
                self.source = Source::None;
                self.to_walk.clear();
                return Named::Done(self.counts);
            }
        };
        Named::Pending
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_memory_and_one_that_is_not_has_none() {
        let own = i32::try_from(std::process::id()).expect("a process id");
        assert!(resident_pages(own) > 16);
        assert_eq!(resident_pages(i32::MAX), 0);
    }
}
