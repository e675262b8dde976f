//! The page cache of a Linux guest.

use super::Error;
use super::device::{Device, open_root};
use super::disks::{Disks, Place};
use super::mounts::{self, Mount};
use super::userspace::UserSpace;
use crate::cache::{Disk, PageCache, Step};
use crate::text::Text;
use core::fmt::Write as _;
use core::time::Duration;
use nix::errno::Errno;
use std::path::PathBuf;
use tracing::{debug, info, warn};
use transhume_protocol::agent::{Range, ReportSource};

/// How to learn what the page cache holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Preference {
    /// The kernel module where it works, user space otherwise.
    #[default]
    Auto,
    /// The kernel module only.
    Module,
    /// User space only.
    UserSpace,
}

/// A walk's source.
enum Walker {
    Module(Device),
    UserSpace(Box<UserSpace>),
}

/// The page cache of this guest: one file system after the other.
pub struct LinuxCache {
    sys: PathBuf,
    proc: PathBuf,
    preference: Preference,
    page_shift: u8,
    source: ReportSource,
    notice: Option<String>,
    disks: Disks,
    /// File systems to come.
    mounts: Vec<(Mount, Place)>,
    walker: Option<Walker>,
    /// The file system that is being walked.
    current: Option<(Mount, Place)>,
    pages: u64,
}

impl LinuxCache {
    /// The page cache of the running kernel.
    pub fn new(preference: Preference) -> Self {
        Self {
            sys: "/sys".into(),
            proc: "/proc".into(),
            preference,
            page_shift: page_shift(),
            source: ReportSource::Module,
            notice: None,
            disks: Disks::default(),
            mounts: Vec::new(),
            walker: None,
            current: None,
            pages: 0,
        }
    }

    /// Opens the best source there is.
    fn open_walker(&mut self) -> Result<Walker, Error> {
        let cause = match self.preference {
            Preference::UserSpace => None,
            Preference::Module => return Device::open().map(Walker::Module),
            Preference::Auto => match Device::open() {
                Ok(device) => return Ok(Walker::Module(device)),
                Err(error) => Some(error),
            },
        };
        let walker = UserSpace::open(&self.proc, self.page_shift)?;
        if let Some(cause) = cause
            && self.source != ReportSource::UserSpace
        {
            let notice = format!(
                "{cause}; until then user space reports, slowly and without unlinked files"
            );
            warn!("{notice}");
            self.notice = Some(notice);
        }
        Ok(Walker::UserSpace(Box::new(walker)))
    }

    /// Goes to the next file system. One that cannot be walked is passed over.
    fn next_mount(&mut self) {
        self.finish_mount();
        let Some((mount, place)) = self.mounts.pop() else {
            return;
        };
        let started = open_root(&mount.point).and_then(|root| match &mut self.walker {
            Some(Walker::Module(device)) => {
                use std::os::fd::AsFd as _;
                device.start(root.as_fd())
            }
            Some(Walker::UserSpace(walker)) => walker.start(root),
            None => Ok(()),
        });
        match started {
            Ok(()) => self.current = Some((mount, place)),
            Err(error) => debug!("{} is left out: {error}", mount.point.display()),
        }
    }

    fn finish_mount(&mut self) {
        let Some((mount, _)) = self.current.take() else {
            return;
        };
        if let Some(Walker::Module(device)) = &self.walker {
            debug!("{}: {:?}", mount.point.display(), device.counts());
        }
    }

    /// The next range of the current file system; `None` when there is none now.
    fn next_range(&mut self) -> Result<Option<(u16, Range)>, Errno> {
        let Some((_, place)) = &self.current else {
            return Ok(None);
        };
        match &mut self.walker {
            Some(Walker::Module(device)) => Ok(device
                .next()?
                // Never another disk than the mount table says, or its number would be a lie.
                .filter(|(dev, _)| *dev == place.dev.packed())
                .map(|(_, range)| (place.disk, range))),
            Some(Walker::UserSpace(walker)) => Ok(walker.next().map(|mut range| {
                range.sector = range.sector.wrapping_add(place.first_sector);
                (place.disk, range)
            })),
            None => Ok(None),
        }
    }

    fn is_mount_finished(&self) -> bool {
        match &self.walker {
            Some(Walker::Module(device)) => device.is_finished(),
            Some(Walker::UserSpace(walker)) => walker.is_finished(),
            None => true,
        }
    }
}

impl PageCache for LinuxCache {
    type Error = Error;

    fn source(&mut self) -> ReportSource {
        // Said anew in every session.
        self.source = ReportSource::Module;
        self.notice = None;
        match self.open_walker() {
            Ok(Walker::Module(_)) => self.source = ReportSource::Module,
            Ok(Walker::UserSpace(_)) => self.source = ReportSource::UserSpace,
            Err(error) => {
                warn!("{error}");
                self.notice = Some(error.to_string());
                self.source = ReportSource::UserSpace;
            }
        }
        info!("page cache is reported from {:?}", self.source);
        self.source
    }

    fn page_shift(&self) -> u8 {
        self.page_shift
    }

    fn cpu_time(&mut self) -> Duration {
        super::gate::cpu_time()
    }

    fn begin(&mut self) -> Result<(), Error> {
        self.end();
        let walker = self.open_walker()?;
        self.source = match walker {
            Walker::Module(_) => ReportSource::Module,
            Walker::UserSpace(_) => ReportSource::UserSpace,
        };
        self.disks = Disks::read(&self.sys)?;
        self.mounts = mounts::read(&self.proc)?
            .into_iter()
            .filter_map(|mount| {
                let place = self.disks.place(&self.sys, mount.dev)?;
                Some((mount, place))
            })
            .collect();
        self.walker = Some(walker);
        self.pages = 0;
        Ok(())
    }

    fn disk(&self, number: u16) -> Option<Disk<'_>> {
        self.disks.get(number)
    }

    fn step(&mut self) -> Result<Step, Error> {
        if self.current.is_none() {
            if self.mounts.is_empty() {
                debug!("{} pages reported", self.pages);
                return Ok(Step::Done);
            }
            self.next_mount();
            return Ok(Step::Pending);
        }
        match self.next_range() {
            Ok(Some((disk, range))) => {
                self.pages += u64::from(range.pages);
                Ok(Step::Found { disk, range })
            }
            Ok(None) => {
                if self.is_mount_finished() {
                    self.finish_mount();
                }
                Ok(Step::Pending)
            }
            Err(source) => Err(Error::Call {
                call: "reading a report of the kernel module",
                source,
            }),
        }
    }

    fn end(&mut self) {
        self.finish_mount();
        self.walker = None;
        self.mounts = Vec::new();
    }

    fn notice(&mut self, text: &mut Text) -> bool {
        let Some(notice) = self.notice.take() else {
            return false;
        };
        let _ = text.write_str(&notice);
        true
    }
}

fn page_shift() -> u8 {
    nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
        .ok()
        .flatten()
        .and_then(|size| u8::try_from(size.trailing_zeros()).ok())
        .unwrap_or(12)
}
