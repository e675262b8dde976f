//! The journal of VMs that arrive: how far each migration is, on disk before that is acted on.
//!
//! One file a migration, named after the number of its offer: `VERSION STAGE VM`, of version 0 `STAGE VM`. Whether this host took a VM is
//! told from here, also after a power cut: without that a source that asks could run a VM again whose
//! disks were written to here.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;

use transhume_base::{bounded, durable};
use transhume_protocol::link::GuestEnd;

/// The version of the notes that are written.
const VERSION: u32 = 1;
/// Between two tries to write a note.
const RETRY_INTERVAL: Duration = Duration::from_millis(if cfg!(test) { 50 } else { 2000 });
/// Ended migrations that are remembered.
const KEPT: usize = 256;
/// A file's length, at most.
const LENGTH: u64 = 256;

/// How far a migration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// The VM belongs to the source. A QEMU that waits for it may be here.
    Waiting,
    /// Its devices are loaded in a QEMU here, which does not run it. Whether it stays at the source is the source's to
    /// say, which may have given it up already.
    Loaded,
    /// The source gave it up: it belongs to this host, which has not taken note of it yet.
    Committed {
        /// Whether it is to run, or stays paused as it was.
        runs: bool,
        /// Part of its memory is still at the source.
        follows: bool,
    },
    /// It belongs to this host and runs here, and part of its memory is still at the source.
    PostCopy,
    /// It belongs to this host, or did.
    Taken,
    /// It belonged to this host, and its QEMU ended before all of its memory was here.
    Lost,
    /// It belonged to this host, and its guest ended by itself before all of its memory was here.
    Ended(GuestEnd),
    /// It did not come. No QEMU of it is here.
    Refused,
}

/// A migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Arrival {
    pub(crate) job: u64,
    pub(crate) vm: String,
    pub(crate) stage: Stage,
}

/// The journal.
#[derive(Debug, Clone)]
pub struct Arrivals {
    folder: PathBuf,
    /// How many are between the commit and their end.
    under_way: Arc<watch::Sender<usize>>,
}

/// A migration that must not be left half done, until this is dropped.
#[derive(Debug)]
pub(crate) struct UnderWay(Arc<watch::Sender<usize>>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

impl Stage {
    const ALL: [Self; 13] = [
        Self::Waiting,
        Self::Loaded,
        Self::Committed {
            runs: true,
            follows: false,
        },
        Self::Committed {
            runs: false,
            follows: false,
        },
        Self::Committed {
            runs: true,
            follows: true,
        },
        Self::Committed {
            runs: false,
            follows: true,
        },
        Self::PostCopy,
        Self::Taken,
        Self::Lost,
        Self::Ended(GuestEnd::ShutDown),
        Self::Ended(GuestEnd::Panicked),
        Self::Ended(GuestEnd::Rebooted),
        Self::Refused,
    ];

    fn word(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Loaded => "loaded",
            Self::Committed { runs, follows } => match (runs, follows) {
                (true, false) => "committed",
                (false, false) => "committed-paused",
                (true, true) => "committed-post-copy",
                (false, true) => "committed-paused-post-copy",
            },
            Self::PostCopy => "post-copy",
            Self::Taken => "taken",
            Self::Lost => "lost",
            Self::Ended(GuestEnd::ShutDown) => "shut-down",
            Self::Ended(GuestEnd::Panicked) => "panicked",
            Self::Ended(GuestEnd::Rebooted) => "rebooted",
            Self::Refused => "refused",
        }
    }

    /// What has become of a VM of that stage whose QEMU is gone.
    pub(crate) fn without_qemu(self) -> Self {
        match self {
            Self::Committed { follows: false, .. } => Self::Taken,
            Self::Committed { follows: true, .. } | Self::PostCopy => Self::Lost,
            _ => Self::Refused,
        }
    }

    fn is_final(self) -> bool {
        matches!(
            self,
            Self::Taken | Self::Lost | Self::Ended(_) | Self::Refused
        )
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
        let arrivals = Self {
            folder,
            under_way: Arc::default(),
        };
        for path in arrivals.files() {
            if Self::read(&path).is_none() {
                tracing::error!(
                    path = %path.display(),
                    "what was noted of a migration cannot be read, or is of a newer version: its source is told nothing, \
                     and goes on asking; mend it, or say at the source where the VM runs (`transhume job resolve`)"
                );
            }
        }
        Ok(arrivals)
    }

    fn path(&self, job: u64) -> PathBuf {
        self.folder.join(format!("{job:016x}"))
    }

    /// Notes how far a migration is. It is on disk when this returns.
    pub(crate) fn note(&self, job: u64, vm: &str, stage: Stage) -> io::Result<()> {
        let text = format!("{VERSION} {} {vm}\n", stage.word());
        if !stage.is_final() {
            return durable::replace(&self.path(job), text.as_bytes());
        }
        durable::conclude(&self.path(job), text.as_bytes())?;
        self.forget_oldest();
        Ok(())
    }

    /// Notes how far a migration is; again and again if it cannot be written, until something later is noted.
    pub(crate) fn note_surely(&self, job: u64, vm: &str, stage: Stage) {
        let Err(error) = self.note(job, vm, stage) else {
            return;
        };
        tracing::error!(
            vm, %error,
            "the journal of arriving VMs cannot be written: it is tried again; is the `state-directory` full?"
        );
        let (arrivals, vm) = (self.clone(), vm.to_owned());
        transhume_base::task::spawn(async move {
            loop {
                tokio::time::sleep(RETRY_INTERVAL).await;
                let noted = arrivals.of(job);
                if noted.is_some_and(|noted| noted.stage.is_final()) {
                    return;
                }
                if arrivals.note(job, &vm, stage).is_ok() {
                    tracing::info!(vm, "the journal of arriving VMs is written now");
                    return;
                }
            }
        });
    }

    /// A migration begins that this process must see to its end.
    pub(crate) fn under_way(&self) -> UnderWay {
        self.under_way.send_modify(|count| *count += 1);
        UnderWay(Arc::clone(&self.under_way))
    }

    /// Waits until there is none of these.
    pub async fn idle(&self) {
        // An error would mean that the sender is gone, which we hold.
        let _ = self
            .under_way
            .subscribe()
            .wait_for(|count| *count == 0)
            .await;
    }

    fn read(path: &Path) -> Option<Arrival> {
        let job = u64::from_str_radix(path.file_name()?.to_str()?, 16).ok()?;
        let text = bounded::read_text(path, LENGTH).ok()?;
        let text = text.strip_suffix('\n')?;
        let text = match text.split_once(' ')? {
            (version, rest) if version.parse() == Ok(VERSION) => rest,
            // Of version 0, or of one that is not known.
            _ => text,
        };
        let (word, vm) = text.split_once(' ')?;
        let stage = Stage::ALL.into_iter().find(|stage| stage.word() == word)?;
        transhume_base::names::is_name(vm).then(|| Arrival {
            job,
            vm: vm.to_owned(),
            stage,
        })
    }

    /// A migration, if it is known here.
    pub(crate) fn of(&self, job: u64) -> Option<Arrival> {
        Self::read(&self.path(job))
    }

    fn files(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.folder).into_iter().flatten();
        let paths = entries.flatten().map(|entry| entry.path());
        // Beside each there is one for its next content.
        paths.filter(|path| path.extension().is_none()).collect()
    }

    /// All migrations that are neither taken nor refused.
    pub(crate) fn unfinished(&self) -> Vec<Arrival> {
        let arrivals = self
            .files()
            .into_iter()
            .filter_map(|path| Self::read(&path));
        arrivals
            .filter(|arrival| !arrival.stage.is_final())
            .collect()
    }

    /// Whether this host got the VM by that migration; `None` while it cannot be said.
    pub fn owns(&self, vm: &str, job: u64) -> Option<bool> {
        let arrival = self.of(job).filter(|arrival| arrival.vm == vm)?;
        match arrival.stage {
            Stage::Committed { .. }
            | Stage::PostCopy
            | Stage::Taken
            | Stage::Lost
            | Stage::Ended(_) => Some(true),
            Stage::Refused => Some(false),
            // Its QEMU may still be there: not before it is killed. Of one that is loaded the source has to say.
            Stage::Waiting | Stage::Loaded => None,
        }
    }

    /// Whether part of a VM's memory is still at the host that it came from.
    pub fn is_in_post_copy(&self, vm: &str) -> bool {
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
                Stage::Waiting | Stage::Loaded => None,
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

    #[test]
    fn notes_of_other_versions() {
        let folder = tempfile::tempdir().unwrap();
        let arrivals = Arrivals::open(folder.path()).unwrap();
        fs::write(arrivals.path(1), "committed web1\n").unwrap();
        fs::write(arrivals.path(2), "2 committed web2\n").unwrap();
        let again = Arrivals::open(folder.path()).unwrap();
        assert_eq!(again.owns("web1", 1), Some(true));
        // Nothing is said of it, and nothing done.
        assert_eq!(again.owns("web2", 2), None);
        assert_eq!(again.unfinished().len(), 1);
    }

    #[tokio::test]
    async fn a_note_that_cannot_be_written_is_made_up_for() {
        let folder = tempfile::tempdir().unwrap();
        let arrivals = Arrivals::open(folder.path()).unwrap();
        let twin = arrivals.path(1).with_extension("new");
        fs::create_dir(&twin).unwrap();
        arrivals.note_surely(1, "web1", Stage::PostCopy);
        tokio::time::sleep(3 * RETRY_INTERVAL).await;
        assert_eq!(arrivals.of(1), None);
        fs::remove_dir(&twin).unwrap();
        tokio::time::sleep(2 * RETRY_INTERVAL).await;
        assert_eq!(arrivals.of(1).unwrap().stage, Stage::PostCopy);

        let twin = arrivals.path(3).with_extension("new");
        fs::create_dir(&twin).unwrap();
        arrivals.note_surely(3, "web3", Stage::PostCopy);
        fs::remove_dir(&twin).unwrap();
        arrivals.note(3, "web3", Stage::Taken).unwrap();
        tokio::time::sleep(2 * RETRY_INTERVAL).await;
        // What came later stays.
        assert_eq!(arrivals.of(3).unwrap().stage, Stage::Taken);
    }

    #[tokio::test]
    async fn what_is_under_way_is_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let arrivals = Arrivals::open(folder.path()).unwrap();
        arrivals.idle().await;
        let under_way = arrivals.under_way();
        let waiting = tokio::spawn({
            let arrivals = arrivals.clone();
            async move { arrivals.idle().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(under_way);
        waiting.await.unwrap();
    }
}
