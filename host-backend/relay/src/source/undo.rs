//! Undoes a migration that was not handed over: the VM runs on here, or it is said why not.

use super::migration::Migration;
use super::request::{Keeper, Request, ask};
use super::stop::Stop;
use crate::error::RelayError;
use crate::qemu::return_path;
use crate::send::shared::Shared;
use crate::{Error, SWITCHOVER_LINK_TIMEOUT, Stays, moved_guest};
use std::time::{Duration, Instant};
use tokio::time::timeout;
use transhume_api::migration::Phase;
use transhume_hypervisor::qmp_commands::keeps_vm;
use transhume_hypervisor::{self as hypervisor, Shutdown, Vm};

/// How long QEMU may take to run a VM again after a failure.
const QEMU_TIMEOUT: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 15 });
/// How long a QEMU that cannot be asked any more, or said that it ends, may take to end.
const END_TIMEOUT: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 5 });
const TAKE_BACK_POLL_INTERVAL: Duration = Duration::from_millis(50);
/// How long a destination that can be reached may take to hear that the migration has ended.
const FAREWELL: Duration = Duration::from_secs(1);

impl Migration {
    /// Lets a destination that does not hear of the end on the session end its QEMU as soon as it can be
    /// reached: a source that asks has given its session up. Without that it would wait for the link as long as it was told to.
    fn withdraw(&self, patience: Duration) {
        let (request, job) = (self.request.clone(), self.facts.offer.job);
        transhume_base::task::spawn(async move {
            let Request {
                vm, destination, ..
            } = &request;
            ask(destination, vm.name(), job, &Keeper::Source, patience).await
        });
    }

    pub(crate) fn give_up(&mut self, shared: &Shared, stop: Option<Stop>) -> Error {
        let failure = shared.take_failure().map(|error| error.to_string());
        let cause = match stop {
            Some(Stop::Failed(cause)) => Some(cause),
            Some(Stop::Cancelled) => Some("it was cancelled".to_owned()),
            Some(Stop::Ended) => Some("its QEMU says that it ends, and has not".to_owned()),
            None => failure,
        };
        shared.stop(RelayError::Stopped);
        self.progress.enter(Phase::Unresolved);
        Error::Unresolved {
            vm: self.request.vm.name().to_owned(),
            to: self.request.destination.host.clone(),
            cause: cause.unwrap_or_else(|| "no answer".to_owned()),
        }
    }

    /// Ends what was begun; the VM runs on here. The destination, which was not given the VM, ends its
    /// QEMU when the link ends.
    pub(crate) async fn undo(&mut self, stop: Stop) -> Error {
        let qmp = self.request.vm.qmp();
        let held = self.shared.clone().filter(|shared| shared.may_be_held());
        if let Some(shared) = &held {
            shared.stop(RelayError::Stopped);
            let wake = || {
                let _ = shared.tell_hypervisor(&return_path::package_loaded());
                shared.hang_up();
            };
            let stays = stays_here(&self.request.vm, wake).await;
            shared.hang_up();
            if !stays {
                return self.give_up(shared, Some(stop));
            }
        }
        let lost = qmp.is_closed();
        let ends = qmp.shutdown().is_some();
        if let Some(shared) = &self.shared {
            shared.abort();
        }
        if !lost && let Err(error) = qmp.migrate_cancel().await {
            tracing::debug!(%error, "migrate_cancel");
        }
        if let Some(shared) = &self.shared {
            shared.stop(RelayError::Stopped);
        }
        if self.session.is_none() && self.may_wait_for_us {
            self.withdraw(self.request.link_patience);
        }
        if let Some(session) = &self.session {
            if held.is_some() {
                self.withdraw(SWITCHOVER_LINK_TIMEOUT);
            } else if session.away().is_some() {
                self.withdraw(self.request.link_patience);
            }
            session.close();
            let session = session.clone();
            let told = transhume_base::task::blocking(move || session.wait_for_end(FAREWELL));
            let _ = told.await;
        }
        drop(self.reports.take());
        let runs = if lost {
            Err(qmp.closed().await)
        } else if ends {
            Err("its QEMU says that it ends, and has not".to_owned())
        } else {
            self.run_again().await
        };
        if runs.is_err()
            && let Some(ended) = self.ended_here(&stop).await
        {
            return ended;
        }
        if let Some(before) = self.before.take() {
            before.restore(qmp).await;
        }
        let clock = self.clocks.guest().filter(|_| self.facts.running);
        if clock.is_some() && runs.is_ok() {
            // It may have been paused for its switch-over.
            moved_guest::of(&self.request.vm).greet(clock);
        }
        let host = self.request.from.clone();
        let stays = if self.facts.running {
            Stays::Running
        } else {
            Stays::Paused
        };
        match stop {
            Stop::Cancelled => {
                self.progress.enter(Phase::Cancelled);
                if let Err(cause) = runs {
                    return self.not_running(format!("it was cancelled, and {cause}"));
                }
                Error::Cancelled { host, stays }
            }
            Stop::Ended => {
                self.progress.enter(Phase::Failed);
                self.not_running("its QEMU was told to end, and has not".to_owned())
            }
            Stop::Failed(cause) => {
                self.progress.enter(Phase::Failed);
                if let Err(not) = runs {
                    return self.not_running(format!("{cause}; {not}"));
                }
                let vm = self.request.vm.name();
                let cure = format!(
                    "when the cause is mended, try `transhume migrate {vm} --to {}` again",
                    self.request.destination.host
                );
                Error::Failed {
                    cause,
                    host,
                    stays,
                    cure,
                }
            }
        }
    }

    /// What is to be said of a VM whose QEMU has ended, or stands still for good; `None` if it may run.
    async fn ended_here(&self, stop: &Stop) -> Option<Error> {
        let Request { vm, from, .. } = &self.request;
        let (name, host) = (vm.name().to_owned(), from.clone());
        let ended = vm.ends_within(END_TIMEOUT).await;
        let said = vm.qmp().shutdown();
        if let Some(how) = said.as_ref().and_then(Shutdown::guest) {
            self.progress.enter(Phase::Ended);
            let next = if ended {
                "`transhume vm start` starts it again".to_owned()
            } else {
                format!(
                    "its QEMU stands still there (-no-shutdown): `transhume vm stop {name} --force` ends it"
                )
            };
            return Some(Error::Ended {
                vm: name,
                host,
                how,
                next,
            });
        }
        if !ended {
            return None;
        }
        tracing::warn!(?stop, "QEMU has ended");
        self.progress.enter(Phase::Lost);
        let cause = match (said, vm.files().logs().last_words()) {
            (Some(Shutdown::Told), _) => "it was told to, by QMP or a signal.".to_owned(),
            (Some(said), _) => format!("{said}."),
            (None, Some(words)) => format!("its last words:\n{words}"),
            (None, None) => {
                "without a word, as when it is killed; `dmesg` tells if memory ran out.".to_owned()
            }
        };
        Some(Error::Died {
            vm: name,
            host,
            cause,
        })
    }

    fn not_running(&self, cause: String) -> Error {
        let vm = self.request.vm.name();
        Error::Lost {
            cause,
            host: self.request.from.clone(),
            cure: format!("look at `transhume vm show {vm}` and at qemu.log in its run directory"),
        }
    }

    /// Sees to it that the VM runs here again.
    async fn run_again(&self) -> Result<(), String> {
        let vm = &self.request.vm;
        let run_again = async {
            // Not before QEMU has done with it: another migration may begin at once.
            vm.migration_over(QEMU_TIMEOUT).await?;
            if self.facts.running {
                vm.run_on().await?;
            }
            Ok(())
        };
        let result: Result<(), hypervisor::Error> = run_again.await;
        result.map_err(|error| error.to_string())
    }
}

/// Whether the VM stays here: its QEMU runs it again, or has ended, so that nobody can. False if QEMU gave it up, or does
/// not say: then it is not for this daemon to say either.
///
/// `wake` is called once if QEMU, which keeps the VM until its devices are loaded, has sent all memory before that: it waits
/// for the word that they are (QEMU 11.1), whatever becomes of its socket. Said on a stream that has broken, it makes the
/// migration fail, as it should.
async fn stays_here(vm: &Vm, wake: impl Fn()) -> bool {
    let deadline = Instant::now() + QEMU_TIMEOUT;
    let mut woken = false;
    while Instant::now() < deadline {
        let Ok(said) = vm.qmp().query_migrate().await else {
            break;
        };
        if let Some(keeps) = keeps_vm(said.status.as_deref()) {
            return keeps;
        }
        let waits = said.status.as_deref() == Some("postcopy-device")
            && said.ram.is_some_and(|ram| ram.remaining == 0);
        if waits && !std::mem::replace(&mut woken, true) {
            tracing::warn!("QEMU waits for a destination that has gone: it is woken");
            wake();
        }
        tokio::time::sleep(TAKE_BACK_POLL_INTERVAL).await;
    }
    timeout(END_TIMEOUT, vm.gone()).await.is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use transhume_hypervisor::fake::{FakeQemu, definition, settings};

    #[tokio::test]
    async fn a_vm_stays_only_if_its_qemu_says_so_or_has_ended() {
        let run = tempfile::tempdir().expect("a folder");
        let settings = settings(run.path());
        let qemu = FakeQemu::start(run.path(), "web1");
        let vm = qemu.vm(&definition("web1"), &settings).await;
        let stays = async || stays_here(&vm, || {}).await;
        for (status, expected) in [
            ("failed", true),
            ("postcopy-active", false),
            ("postcopy-paused", false),
            ("completed", false),
            // It does not say in time.
            ("postcopy-device", false),
        ] {
            qemu.set_migration(status);
            assert_eq!(stays().await, expected, "{status}");
        }
        // Its process is there, and it cannot be asked.
        qemu.hang_up();
        assert!(!stays().await);
        qemu.end(true);
        assert!(stays().await);
    }
}
