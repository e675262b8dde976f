//! What a restarted daemon does with the QEMUs that it had prepared: see [`Arrivals`].

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::arrivals::{Arrival, Arrivals, Stage};
use super::{forgotten, resume};
use crate::durable;
use crate::hypervisor::{Definition, Error, LaunchSettings, Vm};

const DEFINITION: &str = "definition.toml";
const ARRIVAL: &str = "arrival";
/// How often, and after which time each, a QEMU that answers wrongly is looked at again.
const ENDING_LOOKS: u32 = 20;
const ENDING_GLANCE: Duration = Duration::from_millis(100);
/// How long a QEMU in post-copy may take to answer.
const WAITING_PATIENCE: Duration = Duration::from_secs(5);

/// Says, in the run directory of a VM that is about to arrive, by which migration it does, and what it is.
/// The journal says before that it waits. The directory is made.
pub(super) fn begin(folder: &Path, definition: &str, job: u64) -> std::io::Result<()> {
    std::fs::create_dir_all(folder)?;
    durable::replace(&folder.join(ARRIVAL), format!("{job:016x}").as_bytes())?;
    durable::replace(&folder.join(DEFINITION), definition.as_bytes())
}

/// The VM is no longer about to arrive: what the journal says of that migration is not about its QEMU any more.
pub(super) fn settle(folder: &Path) -> std::io::Result<()> {
    forgotten::remove(folder)?;
    durable::remove(&folder.join(ARRIVAL))
}

/// Whether a run directory is that of a VM that is about to arrive by that migration.
fn is_by(folder: &Path, job: u64) -> bool {
    let text = std::fs::read_to_string(folder.join(ARRIVAL));
    text.is_ok_and(|text| text == format!("{job:016x}"))
}

/// Finishes or undoes what an earlier daemon of this host had begun. Call it before serving peers. A VM
/// that was committed is returned, running unless it was paused; one that was not has its QEMU killed.
pub async fn recover(settings: &LaunchSettings, arrivals: &Arrivals) -> Vec<Arc<Vm>> {
    let mut arrived = Vec::new();
    for arrival in arrivals.unfinished() {
        let Arrival { job, vm, stage } = &arrival;
        let ended = match recover_one(settings, &arrival).await {
            Ok((ended, found)) => {
                let found = found.map(Arc::new);
                if let (Stage::PostCopy, Some(vm)) = (ended, &found) {
                    resume::forget_when_gone(arrivals, vm, *job);
                }
                arrived.extend(found);
                ended
            }
            Err(error) => {
                tracing::error!(
                    vm, ?stage, %error,
                    "the QEMU of an unfinished migration could not be recovered: look at it"
                );
                continue;
            }
        };
        if let Err(error) = arrivals.note(*job, vm, ended) {
            tracing::warn!(vm, %error, "journal of arriving VMs");
        }
    }
    arrived
}

/// How a migration ends, and the VM if it arrived.
async fn recover_one(
    settings: &LaunchSettings,
    arrival: &Arrival,
) -> Result<(Stage, Option<Vm>), Error> {
    let Arrival { job, vm, stage } = arrival;
    let files = settings.files(vm);
    let folder = files.folder();
    let path = folder.join(DEFINITION);
    if !is_by(folder, *job) {
        // It is another one's by now, or was begun and no more; or the host has been restarted since.
        let _ = std::fs::remove_file(folder.join(ARRIVAL).with_extension("new"));
        let _ = std::fs::remove_dir(folder);
        return Ok(match stage {
            Stage::Committed { .. } => (Stage::Taken, None),
            Stage::PostCopy => (Stage::Lost, None),
            _ => (Stage::Refused, None),
        });
    }
    let adopted = if path.exists() {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        adopt_in_time(&Definition::parse(&text)?, settings, *stage).await?
    } else {
        // No QEMU is started without one.
        None
    };
    match (*stage, adopted) {
        (Stage::Committed { .. } | Stage::PostCopy, Some(adopted)) => {
            if let Stage::Committed { runs } = stage {
                tracing::info!(vm, "it had been handed over: it belongs here");
                if *runs {
                    adopted.qmp().cont().await?;
                }
            }
            let said = adopted.qmp().query_migrate().await?;
            if said.is_in_post_copy() {
                tracing::warn!(
                    vm,
                    "post-copy was cut off: it stands still where it needs memory that has not come, until the \
                     host that it came from sends it"
                );
                return Ok((Stage::PostCopy, Some(adopted)));
            }
            settle(folder).map_err(|error| Error::file("remove", folder, error))?;
            Ok((Stage::Taken, Some(adopted)))
        }
        (Stage::Committed { .. } | Stage::PostCopy, None) => {
            tracing::error!(
                vm,
                "it had been handed over to this host, and its QEMU has ended"
            );
            let ended = match stage {
                Stage::PostCopy => Stage::Lost,
                _ => Stage::Taken,
            };
            Ok((ended, None))
        }
        (_, adopted) => {
            if let Some(adopted) = adopted {
                if adopted.qmp().status().await?.running {
                    // None that waits was ever told to run.
                    return Err(Error::Unfit {
                        cause: format!("{vm} runs, and is noted as one that did not come"),
                        cure: "see whether it is right that it runs here".to_owned(),
                    });
                }
                tracing::info!(vm, "its migration was cut off here: QEMU ends");
                adopted.kill().await?;
            }
            files.remove()?;
            Ok((Stage::Refused, None))
        }
    }
}

/// The QEMU of a VM in post-copy that could not be recovered when this process began; `None` if it has ended.
pub(super) async fn find(
    settings: &LaunchSettings,
    arrival: &Arrival,
) -> Result<Option<Vm>, Error> {
    recover_one(settings, arrival).await.map(|(_, found)| found)
}

/// The VM's QEMU, if there is one. The main loop of one in post-copy may wait for a page.
async fn adopt_in_time(
    definition: &Definition,
    settings: &LaunchSettings,
    stage: Stage,
) -> Result<Option<Vm>, Error> {
    let adopted = adopt(definition, settings);
    if stage != Stage::PostCopy {
        return adopted.await;
    }
    match tokio::time::timeout(WAITING_PATIENCE, adopted).await {
        Ok(adopted) => adopted,
        Err(_) => Err(Error::Timeout {
            command: "qmp_capabilities".to_owned(),
            waited: WAITING_PATIENCE,
        }),
    }
}

async fn adopt(definition: &Definition, settings: &LaunchSettings) -> Result<Option<Vm>, Error> {
    let qmp = settings.files(&definition.name).qmp();
    let mut looks = 0;
    loop {
        match Vm::adopt(definition, &qmp, settings).await {
            Ok(vm) => return Ok(Some(vm)),
            Err(Error::Connect { .. }) => return Ok(None),
            // Its stream has just ended, and it may be about to end itself.
            Err(_) if looks < ENDING_LOOKS => {}
            Err(error) => return Err(error),
        }
        looks += 1;
        tokio::time::sleep(ENDING_GLANCE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn whatever_was_made_for_an_arrival_goes() {
        let run = tempfile::tempdir().unwrap();
        let settings = LaunchSettings {
            host: "hosta".into(),
            run_directory: run.path().into(),
            log_directory: run.path().join("log"),
            qemu: "qemu-system-x86_64".into(),
        };
        let arrivals = Arrivals::open(run.path()).unwrap();
        let folder = |vm: &str| run.path().join("vms").join(vm);
        for (job, vm) in [(1, "noted"), (2, "begun"), (3, "defined")] {
            arrivals.note(job, vm, Stage::Waiting).unwrap();
        }
        std::fs::create_dir_all(folder("begun")).unwrap();
        std::fs::write(folder("begun").join("arrival.new"), "").unwrap();
        begin(&folder("defined"), "name = \"", 3).unwrap();
        // Its note could not be changed, and another one came by that name.
        arrivals.note(5, "again", Stage::Waiting).unwrap();
        begin(&folder("again"), "name = \"", 6).unwrap();
        std::fs::create_dir_all(folder("in-use")).unwrap();
        arrivals
            .note(4, "rebooted", Stage::Committed { runs: true })
            .unwrap();
        assert!(recover(&settings, &arrivals).await.is_empty());
        let stage = |job| arrivals.of(job).unwrap().stage;
        assert_eq!([stage(1), stage(2)], [Stage::Refused; 2]);
        assert_eq!((stage(4), stage(5)), (Stage::Taken, Stage::Refused));
        assert!(folder("again").exists());
        // What cannot be read is left for a person to look at.
        assert_eq!(stage(3), Stage::Waiting);
        assert!(folder("defined").exists() && folder("in-use").exists());
        assert!(!folder("begun").exists());
        // Whoever asks must not run it again.
        assert_eq!(arrivals.owns("rebooted", 4), Some(true));
    }
}
