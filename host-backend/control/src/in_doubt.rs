//! Migrations whose end is not known: those that an earlier process was in, and those whose destination
//! fell silent after the commit. The VM stays as it is until the destination answers, or an operator
//! who has looked says where it runs.

use super::daemon::Daemon;
use super::job::messages::in_doubt;
use super::job::{Ending, Job};
use super::vm_table::Entry;
use super::{Error, Result};
use std::sync::Arc;
use std::time::Duration;
use tracing::Instrument;
use transhume_api::migration::Phase;
use transhume_api::{JobInfo, JobState, Offered, Response};
use transhume_base::process_identity::Identity;
use transhume_hypervisor::{self as hypervisor, Vm};
use transhume_relay::source::{Destination, Keeper, Rest, ask};

/// How long QEMU may take to notice that its migration was cut off.
const INTERRUPTED_TIMEOUT: Duration = Duration::from_secs(5);
/// For how long a destination is told at most that its migration was cut off.
const WITHDRAWAL: Duration = Duration::from_secs(60);
/// How long the link may be away while the rest of a VM's memory follows, before QEMU has to resume it.
const REST_TIMEOUT: Duration = Duration::from_secs(30);
/// How long one round of questions takes, and the pause behind it.
const ROUND: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_secs(3);

/// What there is here of the QEMU that a job moved.
enum Moved {
    /// It is here.
    Here(Arc<Vm>),
    /// It has ended.
    Gone,
    /// It may be here, and cannot be spoken to now.
    Silent(String),
    /// It has ended, and the VM of its name that is here now is another one.
    Another,
}

impl Daemon {
    /// Looks for the QEMU that a job moved. Another one of that name, which came since, is none of its business.
    fn moved(&self, info: &JobInfo) -> Moved {
        let lives = info.qemu.as_ref().is_some_and(Identity::is_alive);
        match self.table.entry(&info.vm) {
            Ok(Entry::Here(vm)) if info.moves(vm.identity().as_ref()) => Moved::Here(vm),
            Ok(Entry::Lost { reason, .. }) if lives || info.qemu.is_none() => Moved::Silent(reason),
            _ if lives => Moved::Silent("its process lives, and is not known here".to_owned()),
            // It ended, and stays defined.
            Ok(entry) if entry.was_moved_by(info) => Moved::Gone,
            Ok(_) => Moved::Another,
            Err(_) => Moved::Gone,
        }
    }

    /// Begins to finish or undo the migrations that an earlier process was in, as far as that can be said
    /// here, and to ask about the others.
    pub(super) fn finish_interrupted(self: &Arc<Self>) {
        for job in self.jobs.all() {
            let daemon = Arc::clone(self);
            let span = tracing::info_span!("migration", vm = job.vm(), job = job.id());
            let finishing = async move {
                if job.is_running() {
                    daemon.finish_one(&job).await;
                }
                daemon.ask_on(&job);
            };
            transhume_base::task::spawn(finishing.instrument(span));
        }
    }

    async fn finish_one(self: &Arc<Self>, job: &Arc<Job>) {
        let info = job.info();
        let (vm, id) = (job.vm(), job.id());
        let ending = match &info.offer {
            // Nothing had been done to the VM.
            None => Ending::Failed(
                JobState::Failed,
                format!(
                    "transhumed ended before this migration had begun; start it again for {vm}"
                ),
            ),
            Some(offered) if !info.may_be_handed_over() => {
                self.withdraw(&info, offered);
                self.take_back(&info, offered).await
            }
            Some(_) => Ending::InDoubt(in_doubt(&info, "transhumed ended during this migration")),
        };
        tracing::warn!(
            job = id,
            vm,
            "a migration was cut off when transhumed ended: {ending}"
        );
        self.jobs.finish(job, ending);
    }

    /// A VM that was not given away goes on here.
    async fn take_back(&self, info: &JobInfo, offered: &Offered) -> Ending {
        let vm = &info.vm;
        let here = match self.moved(info) {
            Moved::Here(here) => here,
            Moved::Gone => {
                let error = format!(
                    "transhumed ended during this migration, and {vm}'s QEMU has ended since: start {vm} again"
                );
                return Ending::Failed(JobState::Failed, error);
            }
            Moved::Another => {
                let error = format!("transhumed ended during this migration; {}", another(vm));
                return Ending::Failed(JobState::Failed, error);
            }
            // Settled when both answer.
            Moved::Silent(why) => {
                let cause = format!(
                    "transhumed ended during this migration, and its QEMU here is silent: {why}"
                );
                return Ending::InDoubt(in_doubt(info, &cause));
            }
        };
        // It holds the disks, perhaps, until it hears of that.
        match run_on(&here, offered.running).await {
            Ok(stays) => Ending::Failed(
                JobState::Failed,
                format!(
                    "transhumed ended during this migration; {vm} {stays} here; start the migration again"
                ),
            ),
            Err(error) => Ending::Failed(
                JobState::Unresolved,
                format!(
                    "transhumed ended during this migration, and {vm} does not run on: {error}; look at \
                     `transhume vm show {vm}` and at qemu.log in its run directory"
                ),
            ),
        }
    }

    fn destination(&self, info: &JobInfo) -> Option<Destination> {
        let peer = self.config().hosts.get(&info.to)?;
        Some(Destination {
            host: info.to.clone(),
            address: peer.address.clone(),
            security: self.config().security(),
        })
    }

    /// Tells a destination that its migration was cut off, so that it ends its QEMU.
    fn withdraw(self: &Arc<Self>, info: &JobInfo, offered: &Offered) {
        if let (Some(destination), Some(number)) = (self.destination(info), offered.number()) {
            let vm = info.vm.clone();
            transhume_base::task::spawn(async move {
                ask(&destination, &vm, number, &Keeper::Source, WITHDRAWAL).await
            });
        }
    }

    /// Goes on asking who has the VM of a job that is in doubt.
    pub(super) fn ask_on(self: &Arc<Self>, job: &Arc<Job>) {
        let info = job.info();
        if !info.in_doubt {
            return;
        }
        let number = info.offer.as_ref().and_then(Offered::number);
        let (Some(destination), Some(number)) = (self.destination(&info), number) else {
            tracing::error!(
                job = info.id,
                vm = info.vm,
                to = info.to,
                "nobody can be asked: see `transhume job show`"
            );
            return;
        };
        let span =
            tracing::info_span!(parent: None, "doubt", vm = info.vm, job = info.id, to = info.to);
        let (daemon, job) = (Arc::clone(self), Arc::clone(job));
        let asking = async move {
            while job.info().in_doubt {
                let keeper = match daemon.moved(&job.info()) {
                    Moved::Here(vm) => Some(Keeper::Qemu(vm)),
                    Moved::Gone | Moved::Another => Some(Keeper::Source),
                    Moved::Silent(_) => None,
                };
                if let Some(keeper) = keeper
                    && let Some(taken) = ask(&destination, job.vm(), number, &keeper, ROUND).await
                {
                    let says = format!("{} answered", destination.host);
                    match daemon.settle(&job, taken, Word::Of(&says)).await {
                        Ok(()) => return,
                        Err(error) => tracing::error!(%error, taken, "cannot be settled yet"),
                    }
                }
                tokio::time::sleep(PAUSE).await;
            }
        };
        transhume_base::task::spawn(asking.instrument(span));
    }

    /// Settles a job that is in doubt.
    async fn settle(self: &Arc<Self>, job: &Arc<Job>, taken: bool, word: Word<'_>) -> Result<()> {
        let _alone = self.settling.lock().await;
        let info = job.info();
        if !info.in_doubt {
            return Ok(());
        }
        let moved = self.moved(&info);
        if let Moved::Silent(why) = &moved {
            return Err(Error::refused(
                format!("{}'s QEMU cannot be spoken to: {why}", info.vm),
                format!("see `transhume vm show {}`, and try again", info.vm),
            ));
        }
        let what = if !taken {
            self.settle_as_kept(&info, moved, word).await?
        } else if let Moved::Here(here) = &moved
            && has_rest(&info, here).await?
        {
            tracing::warn!(
                says = word.says(),
                "it was taken over, and the rest of its memory is to follow"
            );
            self.jobs.go_on(job);
            self.send_rest(job, Arc::clone(here));
            return Ok(());
        } else {
            self.settle_as_taken(&info, moved).await?
        };
        let (state, what) = what;
        let ending = Ending::Settled(state, format!("{}: {what}", word.says()));
        tracing::warn!("settled: {ending}");
        self.jobs.finish(job, ending);
        Ok(())
    }

    /// The destination has the VM, and no memory of it is in its QEMU here.
    async fn settle_as_taken(&self, info: &JobInfo, moved: Moved) -> Result<(JobState, String)> {
        let JobInfo { id, vm, to, .. } = info;
        let taken = format!("{vm} was taken over by {to}");
        match moved {
            Moved::Here(here) => here.discard().await?,
            Moved::Another => {
                return Ok((JobState::Completed, format!("{taken}; {}", another(vm))));
            }
            // Its QEMU has ended already.
            Moved::Gone | Moved::Silent(_) if info.is_in_post_copy() => {
                return Ok((
                    JobState::Unresolved,
                    format!(
                        "{taken} in post-copy, and its QEMU here has ended; if part of its memory had not moved yet, \
                         {vm} stands still there: see `transhume vm show {vm}` on {to}"
                    ),
                ));
            }
            Moved::Gone | Moved::Silent(_) => self.launch_settings().files(vm).remove()?,
        }
        self.table
            .depart(vm, info, format!("it moved to {to} (job {id})"));
        Ok((JobState::Completed, taken))
    }

    /// The destination does not have the VM.
    async fn settle_as_kept(
        &self,
        info: &JobInfo,
        moved: Moved,
        word: Word<'_>,
    ) -> Result<(JobState, String)> {
        let JobInfo { vm, to, .. } = info;
        let kept = format!("{to} did not take {vm} over");
        let running = info.offer.as_ref().is_none_or(|offer| offer.running);
        let here = match moved {
            Moved::Here(here) => here,
            Moved::Another => return Ok((JobState::Failed, format!("{kept}; {}", another(vm)))),
            Moved::Gone | Moved::Silent(_) => {
                let what = format!("{kept}; its QEMU has ended here: start {vm} again");
                return Ok((JobState::Failed, what));
            }
        };
        let cannot_go_back = here.qmp().query_migrate().await?.is_in_post_copy();
        if cannot_go_back && word == Word::Operator {
            // What is in it is of use as long as the destination may have the VM after all.
            return Err(Error::refused(
                format!(
                    "{vm} was handed over to {to} in post-copy, and its QEMU here can run it no more"
                ),
                format!(
                    "if it runs on {to}, say `--runs-at {to}`: the rest of its memory follows; if it is lost there, \
                     `transhume vm stop {vm} --force` gives it up"
                ),
            ));
        }
        match run_on(&here, running).await {
            Ok(what) => Ok((JobState::Failed, format!("{kept}; {vm} {what} here"))),
            // It had sent its devices' state.
            Err(error) if cannot_go_back || info.is_in_post_copy() => Ok((
                JobState::Unresolved,
                format!(
                    "{kept}; its QEMU here cannot take it back ({error}). What its guest had not written to disk is \
                     lost: `transhume vm stop {vm} --force` ends what is left of it; then start it again"
                ),
            )),
            Err(error) => Err(error.into()),
        }
    }

    /// Sends the rest of a VM's memory after the one that was handed over, in the background.
    fn send_rest(self: &Arc<Self>, job: &Arc<Job>, vm: Arc<Vm>) {
        let info = job.info();
        let number = info.offer.as_ref().and_then(Offered::number);
        let (Some(destination), Some(number)) = (self.destination(&info), number) else {
            let error = format!(
                "part of {}'s memory is here, and {} is not in [hosts] of transhumed.toml any more; put it there, and \
                 restart transhumed",
                info.vm, info.to
            );
            return self.jobs.finish(job, Ending::InDoubt(error));
        };
        let rest = Rest {
            vm: Arc::clone(&vm),
            from: info.from.clone(),
            destination,
            number,
            link_patience: REST_TIMEOUT,
        };
        let span = tracing::info_span!(parent: None, "migration", vm = info.vm, job = info.id, to = info.to);
        let (daemon, job) = (Arc::clone(self), Arc::clone(job));
        let sending = async move {
            let cause = "transhumed ended while it followed".to_owned();
            let ending = match rest.send(cause, job.progress()).await {
                Ok(_) => {
                    if let Err(error) = vm.discard_whole().await {
                        tracing::warn!(%error, "QEMU of the VM that has moved cannot be ended");
                    }
                    job.progress().enter(Phase::Completed);
                    let to = &info.to;
                    let how = format!("it moved to {to} (job {})", info.id);
                    daemon.table.depart(&info.vm, &info, how);
                    let what = format!("{} runs on {to}, and all of its memory is there", info.vm);
                    Ending::Settled(JobState::Completed, what)
                }
                Err(error) => daemon.failed(&info, &error),
            };
            tracing::info!("ended: {ending}");
            daemon.jobs.finish(&job, ending);
            transhume_base::allocator::give_back();
        };
        transhume_base::task::spawn(sending.instrument(span));
    }

    /// An operator says where the VM of a job runs.
    pub(super) async fn resolve(self: &Arc<Self>, id: u64, runs_at: &str) -> Result<Response> {
        let job = self.jobs.get(id)?;
        let info = job.info();
        if !info.in_doubt {
            return Err(Error::refused(
                format!("job {id} is not in doubt"),
                format!("see `transhume job show {id}`"),
            ));
        }
        let taken = match runs_at {
            host if host == info.to => true,
            host if host == info.from => false,
            other => {
                return Err(Error::refused(
                    format!(
                        "job {id} moves {} from {} to {}, not {other}",
                        info.vm, info.from, info.to
                    ),
                    "name one of the two by --runs-at",
                ));
            }
        };
        self.settle(&job, taken, Word::Operator).await?;
        Ok(Response::Job(Box::new(job.info())))
    }
}

/// Whose word a matter is settled by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Word<'a> {
    /// The destination's, in words.
    Of(&'a str),
    Operator,
}

impl Word<'_> {
    fn says(&self) -> &str {
        match self {
            Self::Of(says) => says,
            Self::Operator => "an operator said so",
        }
    }
}

fn another(vm: &str) -> String {
    format!("the {vm} that is here now is another one, with another QEMU, and was left alone")
}

/// Whether part of the memory of a VM that was taken over in post-copy is still in its QEMU here, which that
/// itself says, whatever is noted.
async fn has_rest(info: &JobInfo, here: &Vm) -> Result<bool> {
    let said = here.qmp().query_migrate().await?;
    let is_complete = said.status.as_deref() == Some("completed");
    Ok(said.is_in_post_copy() || (info.is_in_post_copy() && !is_complete))
}

/// Sees to it that a VM whose migration was cut off goes on as before.
async fn run_on(vm: &Vm, running: bool) -> std::result::Result<&'static str, hypervisor::Error> {
    vm.migration_over(INTERRUPTED_TIMEOUT).await?;
    if !running {
        return Ok("stays paused");
    }
    vm.run_on().await?;
    Ok("runs on")
}

#[cfg(test)]
#[path = "in_doubt_tests.rs"]
mod tests;
