//! Moves VMs to other hosts, one job each.

use super::daemon::Daemon;
use super::job::messages::in_doubt;
use super::job::{Begun, Ending, Job, JobJournal};
use super::{Error, Result};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tracing::Instrument as _;
use transhume_api::migration::Phase;
use transhume_api::{JobInfo, JobState, Response};
use transhume_relay::{self as relay, ErrorKind, source};

/// How long running migrations may take to end when the service does.
const FAREWELL: Duration = Duration::from_secs(30);

impl Daemon {
    pub(super) async fn cancel(&self, id: u64) -> Result<Response> {
        let job = self.jobs.get(id)?;
        if !job.is_running() {
            return Err(Error::refused(
                format!("job {id} has ended already"),
                format!("see `transhume job show {id}`"),
            ));
        }
        if job.progress().phase() == Phase::PostCopy {
            return Err(Error::refused(
                format!(
                    "{} was handed over to {} and runs there; the rest of its memory follows it, and is nowhere else",
                    job.vm(),
                    job.info().to
                ),
                format!("`transhume job show {id} --follow` shows how it goes"),
            ));
        }
        job.cancel();
        // The answer says what became of the VM, unless that takes long.
        let _ = tokio::time::timeout(FAREWELL, job.ended()).await;
        Ok(Response::Job(Box::new(job.info())))
    }

    pub(super) fn migrate(
        self: &Arc<Self>,
        name: &str,
        to: &str,
        link_patience: Duration,
        goal: transhume_api::Goal,
        dry_run: bool,
    ) -> Result<Response> {
        self.refuse_when_closing()?;
        let vm = self.table.here(name)?;
        let host = &self.config().host;
        if to == host {
            return Err(Error::refused(
                format!("{name} is on {host} already"),
                "name another host by --to",
            ));
        }
        if self.arrivals.is_in_post_copy(name) {
            return Err(Error::refused(
                format!("part of {name}'s memory is still on the host that it came from"),
                "wait until all of it is here",
            ));
        }
        let peer = self.config().may_take(to)?;
        let job = self.jobs.begin(Begun {
            vm: name,
            qemu: vm.identity().as_ref(),
            from: host,
            to,
            dry_run,
        })?;
        let request = source::Request {
            vm,
            from: host.clone(),
            job: job.id(),
            autostart: self.table.is_autostarted(name),
            destination: source::Destination {
                host: to.to_owned(),
                address: peer.address.clone(),
                security: self.config().security(),
            },
            link_patience,
            goal,
            qemu_channels: self.config().qemu_channels,
            dry_run,
        };
        let span = tracing::info_span!("migration", vm = name, job = job.id(), to);
        transhume_base::task::spawn(self.clone().run(job.clone(), request).instrument(span));
        Ok(Response::Job(Box::new(job.info())))
    }

    async fn run(self: Arc<Self>, job: Arc<Job>, request: source::Request) {
        tracing::info!(dry_run = request.dry_run, "begins");
        let (progress, cancel) = (job.progress().clone(), job.cancelled());
        let moved = Arc::clone(&request.vm);
        let journal = Arc::new(JobJournal {
            jobs: self.jobs.clone(),
            job: job.clone(),
        });
        let migration = source::migrate(request, progress, journal, cancel).in_current_span();
        // In a task of its own: a panic in it must not leave a job that never ends.
        let ending = match transhume_base::task::spawn(migration).await {
            Ok(Ok(source::Outcome::Migrated(summary))) => {
                let how = format!("it moved to {} (job {})", job.info().to, job.id());
                self.table.leave(job.vm(), |entry| entry.is(&moved), how);
                Ending::Completed(summary)
            }
            Ok(Ok(source::Outcome::Planned(plan))) => {
                let text = plan.to_string();
                Ending::Planned(serde_json::to_value(plan).unwrap_or_default(), text)
            }
            Ok(Err(relay::Error::Unresolved { cause, .. })) => {
                Ending::InDoubt(in_doubt(&job.info(), &cause))
            }
            Ok(Err(error)) => self.failed(&job.info(), &error),
            Err(error) => Ending::Failed(
                JobState::Unresolved,
                format!(
                    "transhumed has a defect ({error}); see with `transhume vm show {}` where the VM runs",
                    job.vm()
                ),
            ),
        };
        match &ending {
            Ending::Completed(all) => tracing::info!(
                total_ms = all.total_ms.round(),
                downtime_ms = all.downtime.total_ms.round(),
                wire_bytes = all.traffic.wire_bytes,
                stream_bytes = all.traffic.stream_bytes,
                "completed: {ending}"
            ),
            Ending::Planned(..) => tracing::info!("the dry run found that it can move"),
            Ending::Failed(JobState::Cancelled | JobState::Refused, why) => {
                tracing::warn!("not completed: {why}");
            }
            other => tracing::error!("not completed: {other}"),
        }
        self.jobs.finish(&job, ending);
        self.ask_on(&job);
        transhume_base::allocator::give_back();
    }

    /// How a job ends by an error. A VM whose guest ended elsewhere leaves this host.
    pub(super) fn failed(&self, job: &JobInfo, error: &relay::Error) -> Ending {
        if let relay::Error::Ended { vm, host, how, .. } = error
            && *host != self.config().host
        {
            self.table
                .depart(vm, job, format!("its guest {} at {host}", how.did()));
        }
        let state = match error.kind() {
            ErrorKind::Refused => JobState::Refused,
            ErrorKind::Failed => JobState::Failed,
            ErrorKind::Cancelled => JobState::Cancelled,
            ErrorKind::Ended => JobState::Ended,
            ErrorKind::Lost => JobState::Lost,
            ErrorKind::Unresolved => JobState::Unresolved,
        };
        Ending::Failed(state, error.to_string())
    }

    /// Ends what is under way: running migrations are cancelled, so that their VMs run on here. What has been handed
    /// over is waited for, as long as it goes on: VMs from here whose memory follows them, and VMs that come here.
    pub async fn close(&self) {
        self.closing.store(true, Ordering::Relaxed);
        self.close_jobs().await;
        while tokio::time::timeout(FAREWELL, self.arrivals.idle())
            .await
            .is_err()
        {
            tracing::warn!(
                "memory follows a VM that came here: transhumed ends when all of it has, or the link has broken"
            );
        }
    }

    async fn close_jobs(&self) {
        let running: Vec<Arc<Job>> = self
            .jobs
            .all()
            .into_iter()
            .filter(|job| job.is_running())
            .collect();
        for job in &running {
            tracing::info!(job = job.id(), vm = job.vm(), "cancelled: transhumed ends");
            job.cancel();
        }
        let all = async {
            for job in &running {
                job.ended().await;
            }
        };
        tokio::pin!(all);
        while tokio::time::timeout(FAREWELL, &mut all).await.is_err() {
            // One that waits goes on when transhumed is there again.
            let follows = |job: &&Arc<Job>| {
                let progress = job.progress();
                job.is_running()
                    && progress.phase() == Phase::PostCopy
                    && progress.waits_for().is_none()
            };
            let waits = |job: &&Arc<Job>| job.is_running() && job.progress().waits_for().is_some();
            if let Some(job) = running.iter().find(waits) {
                tracing::warn!(
                    job = job.id(),
                    vm = job.vm(),
                    "part of its memory is still here: it follows when transhumed runs again"
                );
            }
            let Some(job) = running.iter().find(follows) else {
                tracing::warn!("a migration did not end in time");
                return;
            };
            tracing::warn!(
                job = job.id(),
                vm = job.vm(),
                "memory follows a VM that was handed over: transhumed ends when all of it has"
            );
        }
    }
}
