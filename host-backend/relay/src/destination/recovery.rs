//! What a restarted daemon does with the QEMUs that it had prepared: see [`Arrivals`].

use std::sync::Arc;
use std::time::Duration;

use super::journal::{Arrival, Arrivals, Stage};
use super::run_directory::{ARRIVAL, DEFINITION};
use super::{endings, run_directory};
use transhume_base::durable;
use transhume_hypervisor::{Error, LaunchSettings, Vm};
use transhume_machine::Definition;

/// How often, and after which time each, a QEMU that answers wrongly is looked at again.
const ENDING_LOOKS: u32 = 20;
const ENDING_POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Between two tries of what could not be done when this process began.
const RETRY_INTERVAL: Duration = Duration::from_secs(2);
/// How long a QEMU may take to answer before others are looked at, and the hosts served that ask for them.
const TIMEOUT: Duration = Duration::from_secs(12);
/// How long a QEMU in post-copy may take to answer.
const WAITING_TIMEOUT: Duration = Duration::from_secs(5);

/// What became of the migrations that an earlier daemon of this host was in.
#[derive(Debug)]
pub struct Recovered {
    /// VMs that belong to this host.
    pub arrived: Vec<Arc<Vm>>,
    /// Migrations whose QEMU could not be spoken to.
    pub left: Vec<Left>,
}

/// A migration whose QEMU could not be spoken to; its VM's name is to be kept.
#[derive(Debug)]
pub struct Left(Arrival);

/// Finishes or undoes what an earlier daemon of this host had begun. Call it before serving peers. A VM
/// that was committed is returned, running unless it was paused; one that was not has its QEMU killed.
pub async fn recover(settings: &LaunchSettings, arrivals: &Arrivals) -> Recovered {
    let mut recovered = Recovered {
        arrived: Vec::new(),
        left: Vec::new(),
    };
    for arrival in arrivals.unfinished() {
        match finish(settings, arrivals, &arrival).await {
            Ok(found) => recovered.arrived.extend(found),
            Err(error) => {
                let Arrival { vm, stage, .. } = &arrival;
                tracing::error!(
                    vm, ?stage, %error,
                    "the QEMU of an unfinished migration could not be recovered: it is tried again; look at it"
                );
                // In post-copy the source asks for it, again and again.
                if arrival.stage != Stage::PostCopy {
                    recovered.left.push(Left(arrival));
                }
            }
        }
    }
    recovered
}

impl Left {
    /// The VM.
    pub fn vm(&self) -> &str {
        &self.0.vm
    }

    /// Tries until it is known what becomes of it: the VM, if it belongs to this host and its QEMU is there.
    pub async fn recover(self, settings: &LaunchSettings, arrivals: &Arrivals) -> Option<Arc<Vm>> {
        loop {
            tokio::time::sleep(RETRY_INTERVAL).await;
            match finish(settings, arrivals, &self.0).await {
                Ok(found) => return found,
                Err(error) => tracing::debug!(vm = self.0.vm, %error, "not recovered yet"),
            }
        }
    }
}

/// Finishes or undoes one, which is noted.
pub(crate) async fn finish(
    settings: &LaunchSettings,
    arrivals: &Arrivals,
    arrival: &Arrival,
) -> Result<Option<Arc<Vm>>, Error> {
    let Arrival { job, vm, .. } = arrival;
    let (stage, found) = recover_one(settings, arrival).await?;
    let found = found.map(Arc::new);
    match (stage, &found) {
        (Stage::PostCopy, Some(vm)) => endings::forget_when_gone(arrivals, vm, *job),
        (Stage::Committed { .. }, Some(vm)) => run_later(arrivals, vm, *job),
        _ => {}
    }
    arrivals.note_surely(*job, vm, stage);
    Ok(found)
}

/// Tells a VM to run that belongs here and could not be told so at once, until it does or its QEMU has ended.
fn run_later(arrivals: &Arrivals, vm: &Arc<Vm>, job: u64) {
    let (arrivals, vm) = (arrivals.clone(), Arc::clone(vm));
    transhume_base::task::spawn(async move {
        let mut told = String::new();
        while !vm.qmp().is_closed() {
            tokio::time::sleep(RETRY_INTERVAL).await;
            match run(&vm).await {
                Ok(()) => break,
                Err(error) => {
                    let error = error.to_string();
                    if error != told {
                        tracing::error!(
                            vm = vm.name(),
                            error,
                            "it belongs here, and does not run yet"
                        );
                        told = error;
                    }
                }
            }
        }
        arrivals.note_surely(job, vm.name(), Stage::Taken);
        if let Err(error) = run_directory::settle(vm.files().folder()) {
            tracing::warn!(vm = vm.name(), %error, "run directory of the VM that arrived");
        }
        tracing::info!(vm = vm.name(), "it belongs here, and was told to run");
    });
}

async fn run(vm: &Vm) -> Result<(), Error> {
    // An operator may have told it to already.
    if vm.qmp().status().await?.running {
        return Ok(());
    }
    vm.qmp().cont().await
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
    if !run_directory::is_by(folder, *job)? {
        // It is another one's by now, or was begun and no more; or the host has been restarted since.
        let _ = durable::give_room_up(&folder.join(ARRIVAL));
        let _ = std::fs::remove_dir(folder);
        return Ok((stage.without_qemu(), None));
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
            if let Stage::Committed { runs, .. } = stage {
                tracing::info!(vm, "it had been handed over: it belongs here");
                if *runs && let Err(error) = run(&adopted).await {
                    tracing::error!(vm, %error, "it cannot be told to run: it is tried again");
                    return Ok((*stage, Some(adopted)));
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
            run_directory::settle(folder).map_err(|error| Error::file("remove", folder, error))?;
            Ok((Stage::Taken, Some(adopted)))
        }
        (Stage::Loaded, Some(adopted)) => {
            tracing::warn!(
                vm,
                pid = adopted.pid(),
                "its devices are loaded here: it is kept, without running, until its source says whether it runs here"
            );
            Ok((Stage::Loaded, None))
        }
        (Stage::Committed { .. } | Stage::PostCopy, None) => {
            tracing::error!(
                vm,
                "it had been handed over to this host, and its QEMU has ended"
            );
            Ok((stage.without_qemu(), None))
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
pub(crate) async fn find(
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
    let patience = match stage {
        Stage::PostCopy => WAITING_TIMEOUT,
        _ => TIMEOUT,
    };
    match tokio::time::timeout(patience, adopt(definition, settings)).await {
        Ok(adopted) => adopted,
        Err(_) => Err(Error::Timeout {
            command: "qmp_capabilities".to_owned(),
            waited: patience,
        }),
    }
}

async fn adopt(definition: &Definition, settings: &LaunchSettings) -> Result<Option<Vm>, Error> {
    let qmp = settings.files(&definition.name).qmp();
    let mut looks = 0;
    loop {
        match Vm::adopt(definition, &qmp, settings).await {
            Ok(vm) => return Ok(Some(vm)),
            Err(Error::Connect { source, .. }) if is_nobody(&source) => return Ok(None),
            // Its stream has just ended, and it may be about to end itself.
            Err(_) if looks < ENDING_LOOKS => {}
            Err(error) => return Err(error),
        }
        looks += 1;
        tokio::time::sleep(ENDING_POLL_INTERVAL).await;
    }
}

/// Whether a connection failed because nobody listens.
fn is_nobody(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionRefused, NotFound};
    matches!(error.kind(), NotFound | ConnectionRefused)
}

#[cfg(test)]
mod tests {
    use super::super::run_directory::{arriving_job, begin};
    use super::*;
    use transhume_hypervisor::fake;

    #[tokio::test]
    async fn whatever_was_made_for_an_arrival_goes() {
        let run = tempfile::tempdir().unwrap();
        let settings = LaunchSettings {
            host: "hosta".into(),
            run_directory: run.path().into(),
            log_directory: run.path().join("log"),
            qemu: "qemu-system-x86_64".into(),
            user: None,
        };
        let arrivals = Arrivals::open(run.path()).unwrap();
        let folder = |vm: &str| run.path().join("vms").join(vm);
        for (job, vm) in [(1, "noted"), (2, "begun"), (3, "defined")] {
            arrivals.note(job, vm, Stage::Waiting).unwrap();
        }
        std::fs::create_dir_all(folder("begun")).unwrap();
        std::fs::write(folder("begun").join("arrival.new"), "").unwrap();
        begin(&folder("defined"), "name = \"", 3, "hosta/1").unwrap();
        // Its note could not be changed, and another one came by that name.
        arrivals.note(5, "again", Stage::Waiting).unwrap();
        begin(&folder("again"), "name = \"", 6, "hosta/2").unwrap();
        std::fs::create_dir_all(folder("in-use")).unwrap();
        arrivals
            .note(
                4,
                "rebooted",
                Stage::Committed {
                    runs: true,
                    follows: false,
                },
            )
            .unwrap();
        let committed = Stage::Committed {
            runs: true,
            follows: true,
        };
        arrivals.note(8, "half-here", committed).unwrap();
        let recovered = recover(&settings, &arrivals).await;
        assert!(recovered.arrived.is_empty());
        let left: Vec<&str> = recovered.left.iter().map(Left::vm).collect();
        assert_eq!(left, ["defined"]);
        let stage = |job| arrivals.of(job).unwrap().stage;
        assert_eq!([stage(1), stage(2)], [Stage::Refused; 2]);
        assert_eq!((stage(4), stage(5)), (Stage::Taken, Stage::Refused));
        // The rest of its memory is of no use to anybody: to call it taken would be a success that is none.
        assert_eq!(stage(8), Stage::Lost);
        assert!(folder("again").exists());
        // What cannot be read is left for a person to look at.
        assert_eq!(stage(3), Stage::Waiting);
        assert!(folder("defined").exists() && folder("in-use").exists());
        assert!(!folder("begun").exists());
        // Whoever asks must not run it again.
        assert_eq!(arrivals.owns("rebooted", 4), Some(true));
    }

    #[tokio::test]
    async fn a_vm_that_cannot_be_told_to_run_is_told_again() {
        let run = tempfile::tempdir().unwrap();
        let settings = fake::settings(run.path());
        let arrivals = Arrivals::open(run.path()).unwrap();
        let qemu = fake::FakeQemu::start(run.path(), "web1");
        let vm = Arc::new(qemu.vm(&fake::definition("web1"), &settings).await);
        let folder = vm.files().folder().to_owned();
        begin(&folder, "", 7, "hosta/14").unwrap();
        assert_eq!(arriving_job(&folder).as_deref(), Some("hosta/14"));
        let committed = Stage::Committed {
            runs: true,
            follows: false,
        };
        arrivals.note(7, "web1", committed).unwrap();
        qemu.refuse(2);
        run_later(&arrivals, &vm, 7);
        while arrivals.of(7).unwrap().stage == committed {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert_eq!(arrivals.of(7).unwrap().stage, Stage::Taken);
        let told = qemu.commands().iter().filter(|one| *one == "cont").count();
        assert_eq!(told, 3);
    }

    #[test]
    fn whose_run_directory_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let by = |text: &str| {
            std::fs::write(folder.path().join(ARRIVAL), text).unwrap();
            run_directory::is_by(folder.path(), 7)
        };
        assert!(!run_directory::is_by(folder.path(), 7).unwrap());
        assert!(by("0000000000000007").unwrap());
        assert!(by("1 0000000000000007 hosta/14").unwrap());
        assert!(!by("1 0000000000000008 hosta/14").unwrap());
        assert!(by("2 0000000000000007 x y").is_err());
    }
}
