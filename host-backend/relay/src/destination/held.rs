//! A VM whose devices are loaded here in post-copy, and whose source has not said whether it gave it up: the link
//! broke in between, or this daemon was started again. Until QEMU 10.1 there is no such moment.
//!
//! Contract: its QEMU neither runs the VM nor ends before the source has said so; the source looks at its own QEMU,
//! which alone knows whether it can still run it.

use std::sync::Arc;
use std::time::Duration;

use transhume_protocol::link::Control;

use super::answer::send;
use super::host::Host;
use super::journal::{Arrival, Stage};
use super::outcomes::Outcomes;
use super::recovery;
use crate::receive::resume_state::ResumeState;
use transhume_link::{Connection, TIMEOUT};

/// How long what is left of the session may take to end.
const ENDING_TIMEOUT: Duration = Duration::from_secs(5);

/// Asks the source of a VM that is held what becomes of it, and does that. Answers with [`Control::Outcome`].
pub(crate) async fn serve(
    mut connection: Connection,
    arrival: Arrival,
    host: &Arc<dyn Host>,
    outcomes: &Outcomes,
) -> Result<(), String> {
    let Some(_alone) = outcomes.sessions.claim(arrival.job) else {
        return Err("another connection settles the same".to_owned());
    };
    outcomes.sessions.end(arrival.job, ENDING_TIMEOUT).await?;
    // Whoever asked before may have settled it.
    let now = host.arrivals().of(arrival.job).map(|now| now.stage);
    if now != Some(Stage::Loaded) {
        return Err("it was settled meanwhile".to_owned());
    }
    let folder = host.launch_settings().files(&arrival.vm);
    if let Ok((_, from)) = ResumeState::read(folder.folder(), arrival.job)
        && !connection.peer_is(&from)
    {
        return Err(format!("{} came from another host, {from}", arrival.vm));
    }
    let asked = transhume_base::task::blocking(move || {
        let word = connection
            .send(&Control::Held)
            .and_then(|()| connection.receive(TIMEOUT));
        (connection, word)
    });
    let (mut connection, word) = asked.await.map_err(|error| error.to_string())?;
    let runs_here = match word.map_err(|error| error.to_string())? {
        Control::Commit => true,
        Control::Abort { .. } => false,
        _ => return Err("no word on a VM that is held".to_owned()),
    };
    let taken = settle(&arrival, runs_here, host).await?;
    send(&mut connection, &Control::Outcome { taken })
}

/// Has the VM run here, or ends its QEMU. Whether it was taken.
pub(crate) async fn settle(
    arrival: &Arrival,
    runs_here: bool,
    host: &Arc<dyn Host>,
) -> Result<bool, String> {
    let Arrival { job, vm, .. } = arrival;
    tracing::info!(
        vm,
        runs_here,
        "the source has said what becomes of a VM that is held"
    );
    let stage = if runs_here {
        Stage::Committed {
            runs: true,
            follows: true,
        }
    } else {
        Stage::Waiting
    };
    let noted = host.arrivals().note(*job, vm, stage);
    noted.map_err(|error| error.to_string())?;
    let arrival = Arrival {
        stage,
        ..arrival.clone()
    };
    let found = recovery::finish(&host.launch_settings(), host.arrivals(), &arrival).await;
    if let Some(found) = found.map_err(|error| error.to_string())? {
        host.arrived(found, false);
    } else {
        host.release(vm);
    }
    Ok(runs_here)
}

/// A source that offers a VM has it: what is held of it here from an earlier migration ends.
pub(crate) async fn end_earlier(vm: &str, from: &str, host: &Arc<dyn Host>) {
    let folder = host.launch_settings().files(vm);
    for arrival in host.arrivals().unfinished() {
        let is_held = arrival.vm == vm && arrival.stage == Stage::Loaded;
        let is_from =
            ResumeState::read(folder.folder(), arrival.job).is_ok_and(|(_, host)| host == from);
        if is_held
            && is_from
            && let Err(error) = settle(&arrival, false, host).await
        {
            tracing::error!(
                vm,
                error,
                "what is held of a VM that its source still has cannot be ended"
            );
        }
    }
}
