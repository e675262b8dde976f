//! Waits until the rest of a VM's memory has followed it, in post-copy.

use std::time::{Duration, Instant};

use tokio::time::{MissedTickBehavior, interval, timeout};
use transhume_protocol::link::Stalls;

use crate::error::CutOff;
use crate::progress::{Counter, Progress};
use crate::send::shared::Shared;
use transhume_hypervisor::Vm;
use transhume_hypervisor::qmp_commands::Migration as Said;
use transhume_link::TIMEOUT;

/// How often QEMU is asked how far it is.
pub(crate) const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// How long the destination may take to say what post-copy cost the guest.
const STALLS_TIMEOUT: Duration = Duration::from_secs(2);

/// Waits until QEMU has sent the rest and the destination's has it.
pub(crate) async fn rest(vm: &Vm, shared: &Shared, progress: &Progress) -> Result<(), CutOff> {
    let qmp = vm.qmp();
    let mut poll = interval(POLL_INTERVAL);
    poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut events = qmp.events();
    let mut failed: Option<Instant> = None;
    loop {
        tokio::select! {
            // An event is only a reason to look at once.
            event = events.recv() => if event.is_err() && qmp.is_closed() {
                return Err(qmp.closed().await.into());
            },
            () = shared.failure(), if failed.is_none() => failed = Some(Instant::now()),
            _ = poll.tick() => {}
        }
        if let Some(how) = shared.guest_ended() {
            return Err(CutOff::GuestEnded(how));
        }
        let said = qmp
            .query_migrate()
            .await
            .map_err(|error| error.to_string())?;
        show(shared, Some(&said), progress);
        match said.status.as_deref() {
            Some("completed") => return Ok(()),
            // It waits for somebody to resume it.
            Some("postcopy-paused" | "failed" | "cancelled") => {
                let cause = shared.take_failure();
                let cause = match (cause, said.error_desc) {
                    (Some(cause), _) => cause.to_string(),
                    (None, Some(said)) => format!("QEMU: {said}"),
                    (None, None) => "QEMU's stream broke".to_owned(),
                };
                return Err(cause.into());
            }
            // QEMU before 8.0 may wait for the end of its return path for ever.
            _ if failed.is_some_and(|since| since.elapsed() > TIMEOUT) => {
                let cause = shared.take_failure();
                return Err(cause
                    .map_or_else(String::new, |cause| cause.to_string())
                    .into());
            }
            _ => {}
        }
    }
}

/// What post-copy cost the guest, if the destination says so in time.
pub(crate) async fn stalls(shared: &Shared) -> Option<Stalls> {
    let told = timeout(STALLS_TIMEOUT, shared.stalls()).await;
    told.ok().flatten()
}

pub(crate) fn show(shared: &Shared, said: Option<&Said>, progress: &Progress) {
    let away = shared.link_away().map_or(0, |away| away.as_millis());
    let away = u64::try_from(away).unwrap_or(u64::MAX);
    progress.set(Counter::LinkAwayMs, away);
    if let Some(ram) = said.and_then(|said| said.ram) {
        progress.set(Counter::RemainingBytes, ram.remaining.saturating_add(1));
    }
}
