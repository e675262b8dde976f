//! The table of migrations: one of a VM at a time, the ended ones kept up to a number, in memory and in
//! the state directory.

use super::{Ending, Job};
use crate::state_directory::State;
use crate::{Error, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use transhume_api::migration::Phase;
use transhume_api::{JobInfo, JobState, Offered};
use transhume_base::process_identity::Identity;
use transhume_relay::progress::Progress;

/// Ended jobs that are kept.
const KEPT: usize = 100;

/// What a migration begins with.
#[derive(Debug, Clone, Copy)]
pub struct Begun<'a> {
    /// The VM.
    pub vm: &'a str,
    /// Its QEMU, if its process is known.
    pub qemu: Option<&'a Identity>,
    /// This host.
    pub from: &'a str,
    /// Where it is to go.
    pub to: &'a str,
    /// Only tell what would be done.
    pub dry_run: bool,
}

/// All jobs of this host.
#[derive(Debug)]
pub struct Jobs {
    state: Arc<State>,
    table: Mutex<BTreeMap<u64, Arc<Job>>>,
    /// Those whose last state is not on disk.
    unsaved: Mutex<BTreeSet<u64>>,
}

impl Jobs {
    /// The jobs that an earlier process left. What was running then is given to [`Jobs::finish`] by
    /// whoever finds out how it ended.
    pub(crate) fn load(state: Arc<State>) -> Result<Self> {
        let found = state.jobs()?;
        let held = found.unreadable.iter().filter_map(Job::unreadable);
        let held: Vec<_> = held.map(|job| (job.id(), Arc::new(job))).collect();
        let jobs = found.read.into_iter().map(|mut info| {
            if let Some(offer) = &mut info.offer {
                // A version before kept the phase alone.
                offer.post_copy |= info.progress.phase == Phase::PostCopy;
            }
            let ago = now_ms().saturating_sub(info.started_ms);
            let progress = Progress::restored(&info.progress, Duration::from_millis(ago));
            (info.id, Arc::new(Job::new(info, progress)))
        });
        let table = Mutex::new(jobs.chain(held).collect());
        let unsaved = Mutex::default();
        Ok(Self {
            state,
            table,
            unsaved,
        })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Job>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a new job.
    ///
    /// # Errors
    /// [`Error::Refused`] while another one moves the same VM, or if it cannot be noted on disk.
    pub fn begin(&self, begun: Begun<'_>) -> Result<Arc<Job>> {
        let vm = begun.vm;
        self.refuse_in_doubt(vm)?;
        let job = {
            let mut table = self.lock();
            if let Some(other) = find_active(&table, vm) {
                return Err(Error::refused(
                    format!("job {} moves {vm} already", other.id()),
                    format!(
                        "see `transhume job show {0}`, or end it by `transhume job cancel {0}`",
                        other.id()
                    ),
                ));
            }
            let progress = Progress::new();
            let info = JobInfo {
                id: table.keys().next_back().map_or(1, |last| last + 1),
                vm: vm.to_owned(),
                from: begun.from.to_owned(),
                to: begun.to.to_owned(),
                dry_run: begun.dry_run,
                state: JobState::Running,
                started_ms: now_ms(),
                progress: progress.snapshot(),
                qemu: begun.qemu.cloned(),
                offer: None,
                in_doubt: false,
                error: None,
                summary: None,
                plan: None,
                plan_text: None,
            };
            let job = Arc::new(Job::new(info, progress));
            table.insert(job.id(), job.clone());
            job
        };
        if let Err(error) = self.state.save_job(&job.started) {
            // A part of it may be on disk.
            self.lock().remove(&job.id());
            if let Err(error) = self.state.forget_job(job.id()) {
                tracing::warn!(job = job.id(), vm, %error, "the file of a job that did not begin stays");
            }
            return Err(Error::refused(
                format!("the migration cannot be noted on disk: {error}"),
                "make room in `state-directory`",
            ));
        }
        Ok(job)
    }

    /// Notes how a job ended, and forgets the oldest ended ones.
    pub fn finish(&self, job: &Job, ending: Ending) {
        let mut info = JobInfo {
            in_doubt: false,
            ..job.now()
        };
        match ending {
            Ending::Completed(summary) => {
                info.state = JobState::Completed;
                info.summary = Some(*summary);
            }
            Ending::Planned(plan, text) => {
                info.state = JobState::Planned;
                info.plan = Some(plan);
                info.plan_text = Some(text);
            }
            Ending::Failed(state, error) | Ending::Settled(state, error) => {
                info.state = state;
                info.error = Some(error);
            }
            Ending::InDoubt(error) => {
                info.state = JobState::Unresolved;
                info.in_doubt = true;
                info.error = Some(error);
            }
        }
        self.save(&info);
        job.ended.send_replace(Some(info));
        for id in self.forget_oldest() {
            if let Err(error) = self.state.forget_job(id) {
                tracing::warn!(job = id, %error, "an old job's file stays");
            }
        }
    }

    /// A job that had ended goes on: it is known now who has the VM, and part of its memory is still here.
    pub(crate) fn go_on(&self, job: &Job) {
        job.ended.send_replace(None);
        self.save(&job.now());
    }

    /// Notes what is about to be done in a job, before it is.
    ///
    /// # Errors
    /// If it cannot be written: then it must not be done.
    pub(crate) fn note(&self, job: &Job, offer: Offered) -> Result<()> {
        *job.offer.lock().unwrap_or_else(PoisonError::into_inner) = Some(offer);
        self.state.save_job(&job.now())?;
        self.lock_unsaved().remove(&job.id());
        Ok(())
    }

    /// Refuses to touch a VM while it is not known which host has it, or would not be known after a restart.
    ///
    /// # Errors
    /// [`Error::Refused`] then.
    pub(crate) fn refuse_in_doubt(&self, vm: &str) -> Result<()> {
        self.refuse_unsaved(vm)?;
        match self.in_doubt(vm) {
            None => Ok(()),
            Some(job) => Err(Error::refused(
                format!(
                    "it is not known which host has {vm} since job {}, to {}",
                    job.id(),
                    job.started.to
                ),
                format!("`transhume job show {}` says what to do", job.id()),
            )),
        }
    }

    fn in_doubt(&self, vm: &str) -> Option<Arc<Job>> {
        let table = self.lock();
        let mut of_vm = table.values().filter(|job| job.vm() == vm);
        of_vm.find(|job| job.info().in_doubt).cloned()
    }

    /// What an operator should know of a VM while it is not known which host has it.
    pub(crate) fn doubt(&self, vm: &str) -> Option<String> {
        let job = self.in_doubt(vm)?;
        Some(format!(
            "it is not known which host has it since job {}, to {}; `transhume job show {}` says what to do",
            job.id(),
            job.started.to,
            job.id()
        ))
    }

    /// Whether a VM was handed over in post-copy by a job that is in doubt, so that its QEMU here can run it no more.
    pub(crate) fn is_cut_off(&self, vm: &str) -> bool {
        let table = self.lock();
        let mut infos = table
            .values()
            .filter(|job| job.vm() == vm)
            .map(|job| job.info());
        infos.any(|info| info.in_doubt && info.is_in_post_copy())
    }

    /// A VM whose job on disk says something else than what became of it must not come here again: a restarted
    /// service would take it for the one that left.
    fn refuse_unsaved(&self, vm: &str) -> Result<()> {
        // There may be room since.
        self.save_again();
        let unsaved = self.lock_unsaved().clone();
        let table = self.lock();
        let mut ended = unsaved.iter().filter_map(|id| table.get(id));
        match ended.find(|job| job.vm() == vm && !job.is_running() && !job.started.dry_run) {
            None => Ok(()),
            Some(job) => Err(Error::refused(
                format!(
                    "the end of job {}, which moved {vm}, is not on disk yet",
                    job.id()
                ),
                "make room in `state-directory` (see `journalctl -u transhumed`); it is tried again every few seconds",
            )),
        }
    }

    fn lock_unsaved(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.unsaved.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn save(&self, info: &JobInfo) {
        match self.state.save_job(info) {
            Ok(()) => {
                self.lock_unsaved().remove(&info.id);
            }
            // No reason to fail a migration that has begun.
            Err(error) => {
                self.lock_unsaved().insert(info.id);
                tracing::error!(
                    job = info.id, vm = info.vm, %error,
                    "the job is not noted on disk: it is tried again, and no VM of that name may come meanwhile"
                );
            }
        }
    }

    /// Tries again to note the jobs that could not be noted.
    pub(crate) fn save_again(&self) {
        let unsaved = self.lock_unsaved().clone();
        for id in unsaved {
            let job = self.lock().get(&id).cloned();
            let saved = job.is_none_or(|job| self.state.save_job(&job.info()).is_ok());
            if saved {
                self.lock_unsaved().remove(&id);
                tracing::info!(job = id, "the job is noted on disk now");
            }
        }
    }

    fn forget_oldest(&self) -> Vec<u64> {
        let unsaved = self.lock_unsaved().clone();
        let mut table = self.lock();
        let ended: Vec<u64> = table
            .iter()
            .filter(|(id, job)| !job.is_running() && !job.info().in_doubt && !unsaved.contains(id))
            .map(|(id, _)| *id)
            .collect();
        let oldest = ended[..ended.len().saturating_sub(KEPT)].to_vec();
        for id in &oldest {
            table.remove(id);
        }
        oldest
    }

    /// The job of that number.
    ///
    /// # Errors
    /// [`Error::Refused`] if there is none.
    pub fn get(&self, id: u64) -> Result<Arc<Job>> {
        self.lock().get(&id).cloned().ok_or_else(|| {
            Error::refused(
                format!("there is no job {id} on this host"),
                format!("`transhume job list` shows the last {KEPT}"),
            )
        })
    }

    /// All jobs, the oldest first.
    pub fn all(&self) -> Vec<Arc<Job>> {
        self.lock().values().cloned().collect()
    }

    /// The job that moves a VM now.
    pub fn active(&self, vm: &str) -> Option<Arc<Job>> {
        find_active(&self.lock(), vm)
    }
}

/// Milliseconds since 1970.
fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    u64::try_from(since.unwrap_or_default().as_millis()).unwrap_or_default()
}

fn find_active(table: &BTreeMap<u64, Arc<Job>>, vm: &str) -> Option<Arc<Job>> {
    table
        .values()
        .find(|job| job.vm() == vm && job.is_running())
        .cloned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use transhume_relay::progress::Counter;

    fn jobs(folder: &std::path::Path) -> Jobs {
        Jobs::load(Arc::new(State::open(folder).expect("a state"))).expect("jobs")
    }

    fn begun<'a>(vm: &'a str, to: &'a str, dry_run: bool) -> Begun<'a> {
        Begun {
            vm,
            qemu: None,
            from: "hosta",
            to,
            dry_run,
        }
    }

    fn failed() -> Ending {
        Ending::Failed(JobState::Failed, "the link broke".to_owned())
    }

    #[tokio::test]
    async fn one_migration_of_a_vm_at_a_time() {
        let folder = tempfile::tempdir().expect("a folder");
        let jobs = jobs(folder.path());
        let first = jobs.begin(begun("web1", "hostb", false)).expect("a job");
        let error = jobs
            .begin(begun("web1", "hostc", true))
            .expect_err("it moves already");
        assert!(
            error.to_string().contains("job 1 moves web1 already"),
            "{error}"
        );
        jobs.begin(begun("web2", "hostb", false))
            .expect("another VM");
        assert_eq!(jobs.active("web1").expect("a job").id(), 1);

        let cancelled = first.cancelled();
        first.cancel();
        assert!(*cancelled.borrow());
        jobs.finish(&first, failed());
        first.ended().await;
        assert!(jobs.active("web1").is_none());
        let info = first.info();
        assert_eq!(
            (info.state, info.error.as_deref()),
            (JobState::Failed, Some("the link broke"))
        );
        assert_eq!(
            jobs.begin(begun("web1", "hostb", false))
                .expect("again")
                .id(),
            3
        );
    }

    #[test]
    fn keeps_the_last_jobs_over_a_restart() {
        let folder = tempfile::tempdir().expect("a folder");
        let before = jobs(folder.path());
        let runs = before.begin(begun("web0", "hostb", false)).expect("a job");
        for _ in 0..KEPT + 5 {
            let job = before.begin(begun("web1", "hostb", false)).expect("a job");
            before.finish(&job, failed());
        }
        assert!(before.get(2).is_err());
        let after = jobs(folder.path());
        let ids: Vec<u64> = after.all().iter().map(|job| job.id()).collect();
        assert_eq!(ids.len(), KEPT + 1);
        assert_eq!((ids[0], ids[1]), (runs.id(), 7));
        assert!(after.get(1).expect("the first").is_running());
        assert_eq!(
            after
                .begin(begun("web2", "hostb", true))
                .expect("a job")
                .id(),
            107
        );
    }

    #[test]
    fn an_end_that_is_not_on_disk_holds_the_name_back_and_is_written_later() {
        let folder = tempfile::tempdir().expect("a folder");
        let jobs = jobs(folder.path());
        let job = jobs.begin(begun("web1", "hostb", false)).expect("a job");
        // Nothing can be written: the file beside it is a folder.
        let twin = folder.path().join("jobs/1.json.new");
        std::fs::remove_file(&twin).expect("room for the next");
        std::fs::create_dir(&twin).expect("a folder");
        jobs.finish(&job, failed());
        for _ in 0..2 {
            let error = jobs.refuse_in_doubt("web1").expect_err("not on disk");
            assert!(error.to_string().contains("job 1"), "{error}");
            jobs.refuse_in_doubt("web2").expect("another VM");
            jobs.save_again();
        }
        std::fs::remove_dir(&twin).expect("an empty folder");
        jobs.save_again();
        jobs.refuse_in_doubt("web1").expect("on disk");
        let state = State::open(folder.path()).expect("a state");
        let noted = state.jobs().expect("jobs").read.remove(0).state;
        assert_eq!(noted, JobState::Failed);
    }

    #[test]
    fn a_job_that_cannot_be_noted_does_not_begin_and_a_dry_run_holds_nothing_back() {
        let folder = tempfile::tempdir().expect("a folder");
        let jobs = jobs(folder.path());
        let twin = folder.path().join("jobs/1.json.new");
        std::fs::create_dir(&twin).expect("a folder");
        let error = jobs
            .begin(begun("web1", "hostb", true))
            .expect_err("no room");
        assert!(error.to_string().contains("cannot be noted"), "{error}");
        assert!(jobs.all().is_empty() && jobs.active("web1").is_none());
        std::fs::remove_dir(&twin).expect("an empty folder");
        let job = jobs.begin(begun("web1", "hostb", true)).expect("a job");
        std::fs::remove_file(&twin).expect("room for the next");
        std::fs::create_dir(&twin).expect("a folder");
        jobs.finish(&job, failed());
        jobs.refuse_in_doubt("web1").expect("it moved nothing");
    }

    #[test]
    fn what_had_moved_is_known_after_a_restart() {
        let folder = tempfile::tempdir().expect("a folder");
        let before = jobs(folder.path());
        let job = before.begin(begun("web1", "hostb", false)).expect("a job");
        let progress = job.progress();
        progress.enter(Phase::PostCopy);
        progress.set(Counter::WireBytes, 77);
        let offer = Offered {
            number: "7".to_owned(),
            running: true,
            post_copy: true,
        };
        before.note(&job, offer).expect("on disk");
        let after = jobs(folder.path()).get(1).expect("the job").info();
        assert_eq!(after.progress.traffic.wire_bytes, 77);
        assert_eq!(after.progress.phase, Phase::PostCopy);
    }

    #[test]
    fn a_job_knows_the_qemu_that_it_moves() {
        let folder = tempfile::tempdir().expect("a folder");
        let jobs = jobs(folder.path());
        let me = Identity::find(std::process::id()).expect("we run");
        let mut begun = begun("web1", "hostb", false);
        begun.qemu = Some(&me);
        let info = jobs.begin(begun).expect("a job").info();
        let other = Identity {
            started: me.started + 1,
            ..me.clone()
        };
        assert!(info.moves(Some(&me)));
        assert!(!info.moves(Some(&other)) && !info.moves(None));
        // One of a version that noted no process, and began when we did not run yet.
        let unknown = JobInfo {
            qemu: None,
            started_ms: 1,
            ..info
        };
        assert!(!unknown.moves(Some(&me)));
    }

    #[test]
    fn a_file_that_cannot_be_read_holds_its_number_and_its_name() {
        let folder = tempfile::tempdir().expect("a folder");
        jobs(folder.path());
        let path = folder.path().join("jobs/14.json");
        let text = r#"{"version":9,"id":14,"vm":"web1","in_doubt":1}"#;
        std::fs::write(&path, text).expect("written");
        let jobs = jobs(folder.path());
        let info = jobs.get(14).expect("a job").info();
        assert!(info.in_doubt && info.error.is_some_and(|error| error.contains("14.json")));
        assert!(jobs.begin(begun("web1", "hostb", false)).is_err());
        let next = jobs.begin(begun("web2", "hostb", false)).expect("a job");
        assert_eq!(next.id(), 15);
        assert_eq!(std::fs::read_to_string(&path).expect("a file"), text);
    }
}
