//! The journal of VMs that arrive: how far each migration is, on disk before that is acted on.
//!
//! One file a migration, named after the number of its offer: `STAGE VM`. Whether this host took a VM is
//! told from here, also after a power cut: without that a source that asks could run a VM again whose
//! disks were written to here.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::{bounded, durable};

/// Ended migrations that are remembered.
const KEPT: usize = 256;
/// A file's length, at most.
const LENGTH: u64 = 256;

/// How far a migration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// The VM belongs to the source. A QEMU that waits for it may be here.
    Waiting,
    /// The source gave it up: it belongs to this host, which has not taken note of it yet.
    Committed {
        /// Whether it is to run, or stays paused as it was.
        runs: bool,
    },
    /// It belongs to this host and runs here, and part of its memory is still at the source.
    PostCopy,
    /// It belongs to this host, or did.
    Taken,
    /// It belonged to this host, and its QEMU ended before all of its memory was here.
    Lost,
    /// It did not come. No QEMU of it is here.
    Refused,
}

/// A migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Arrival {
    pub(super) job: u64,
    pub(super) vm: String,
    pub(super) stage: Stage,
}

/// The journal.
#[derive(Debug, Clone)]
pub struct Arrivals {
    folder: PathBuf,
}

impl Stage {
    const ALL: [Self; 7] = [
        Self::Waiting,
        Self::Committed { runs: true },
        Self::Committed { runs: false },
        Self::PostCopy,
        Self::Taken,
        Self::Lost,
        Self::Refused,
    ];

    fn word(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Committed { runs: true } => "committed",
            Self::Committed { runs: false } => "committed-paused",
            Self::PostCopy => "post-copy",
            Self::Taken => "taken",
            Self::Lost => "lost",
            Self::Refused => "refused",
        }
    }

    fn is_final(self) -> bool {
        matches!(self, Self::Taken | Self::Lost | Self::Refused)
    }
}

impl Arrivals {
    /// The journal in a host's state directory.
    ///
    /// # Errors
    /// If its folder cannot be made.
    pub fn open(state_directory: &Path) -> io::Result<Self> {
        let folder = state_directory.join("arrivals");
        fs::create_dir_all(&folder)?;
        Ok(Self { folder })
    }

    fn path(&self, job: u64) -> PathBuf {
        self.folder.join(format!("{job:016x}"))
    }

    /// Notes how far a migration is. It is on disk when this returns.
    pub(super) fn note(&self, job: u64, vm: &str, stage: Stage) -> io::Result<()> {
        let text = format!("{} {vm}\n", stage.word());
        durable::replace(&self.path(job), text.as_bytes())?;
        if stage.is_final() {
            self.forget_oldest();
        }
        Ok(())
    }

    fn read(path: &Path) -> Option<Arrival> {
        let job = u64::from_str_radix(path.file_name()?.to_str()?, 16).ok()?;
        let text = bounded::read_text(path, LENGTH).ok()?;
        let (word, vm) = text.strip_suffix('\n')?.split_once(' ')?;
        let stage = Stage::ALL.into_iter().find(|stage| stage.word() == word)?;
        crate::hypervisor::definition::is_name(vm).then(|| Arrival {
            job,
            vm: vm.to_owned(),
            stage,
        })
    }

    /// A migration, if it is known here.
    pub(super) fn of(&self, job: u64) -> Option<Arrival> {
        Self::read(&self.path(job))
    }

    fn files(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.folder).into_iter().flatten();
        entries.flatten().map(|entry| entry.path()).collect()
    }

    /// All migrations that are neither taken nor refused.
    pub(super) fn unfinished(&self) -> Vec<Arrival> {
        let arrivals = self
            .files()
            .into_iter()
            .filter_map(|path| Self::read(&path));
        arrivals
            .filter(|arrival| !arrival.stage.is_final())
            .collect()
    }

    /// Whether this host got the VM by that migration; `None` while it cannot be said.
    pub(crate) fn owns(&self, vm: &str, job: u64) -> Option<bool> {
        let arrival = self.of(job).filter(|arrival| arrival.vm == vm)?;
        match arrival.stage {
            Stage::Committed { .. } | Stage::PostCopy | Stage::Taken | Stage::Lost => Some(true),
            Stage::Refused => Some(false),
            // Its QEMU may still be there: not before it is killed.
            Stage::Waiting => None,
        }
    }

    /// Whether part of a VM's memory is still at the host that it came from.
    pub(crate) fn is_in_post_copy(&self, vm: &str) -> bool {
        let mut unfinished = self.unfinished().into_iter();
        unfinished.any(|arrival| arrival.vm == vm && arrival.stage == Stage::PostCopy)
    }

    fn forget_oldest(&self) {
        let ended = self.files().into_iter().filter_map(|path| {
            let ended = Self::read(&path)?.stage.is_final();
            let since = fs::metadata(&path).and_then(|found| found.modified());
            ended.then(|| (since.unwrap_or(SystemTime::UNIX_EPOCH), path))
        });
        let mut ended: Vec<_> = ended.collect();
        ended.sort();
        for (_, path) in &ended[..ended.len().saturating_sub(KEPT)] {
            if let Err(error) = durable::remove(path) {
                tracing::warn!(path = %path.display(), %error, "an old note stays");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_read_as_written() {
        let folder = tempfile::tempdir().unwrap();
        let arrivals = Arrivals::open(folder.path()).unwrap();
        assert_eq!(arrivals.owns("web1", 7), None);
        for stage in Stage::ALL {
            arrivals.note(7, "web1", stage).unwrap();
            let found = Arrivals::open(folder.path()).unwrap().of(7).unwrap();
            assert_eq!((found.vm.as_str(), found.stage), ("web1", stage));
            let owned = match stage {
                Stage::Waiting => None,
                Stage::Refused => Some(false),
                _ => Some(true),
            };
            assert_eq!(arrivals.owns("web1", 7), owned);
            assert_eq!(arrivals.owns("web2", 7), None);
        }
        for bad in ["", "taken", "taken web1", "taken ../x\n", "gone web1\n"] {
            fs::write(arrivals.path(7), bad).unwrap();
            assert_eq!(arrivals.of(7), None, "{bad}");
        }
    }

    #[test]
    fn the_last_ones_are_kept_and_all_that_are_unfinished() {
        let folder = tempfile::tempdir().unwrap();
        let arrivals = Arrivals::open(folder.path()).unwrap();
        arrivals.note(0, "web0", Stage::Waiting).unwrap();
        let most = KEPT as u64;
        for job in 1..=most + 9 {
            arrivals.note(job, "web1", Stage::Taken).unwrap();
        }
        assert_eq!(arrivals.files().len(), KEPT + 1);
        assert!(arrivals.of(most + 9).is_some());
        let unfinished = arrivals.unfinished();
        assert_eq!(unfinished.len(), 1);
        assert_eq!(unfinished[0].job, 0);
    }
}
