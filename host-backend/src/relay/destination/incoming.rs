//! Takes one VM in.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{broadcast, watch};
use tokio::time::timeout;
use transhume_protocol::link::{Control, Offer};

use super::engine::{Engine, Target};
use super::look::{self, Fit};
use super::recovery::{self, Mark};
use super::{Host, Outcomes, send};
use crate::hypervisor::command_line::Start;
use crate::hypervisor::definition::Definition;
use crate::hypervisor::memory::GuestMemory;
use crate::hypervisor::qmp::Event;
use crate::hypervisor::{self, LaunchSettings, Vm, stream};
use crate::link::{Connection, PATIENCE, START_PATIENCE};
use crate::pages::digest::Digester;
use crate::relay::error::RelayError;
use crate::volume;

/// How long QEMU may take to load the VM once all of it is there, and how often it is looked at.
const LOAD_PATIENCE: Duration = Duration::from_secs(5);
const LOAD_GLANCE: Duration = Duration::from_millis(1);
/// How long an earlier migration of the VM may take to end, and how often it is looked at.
const ENDING_PATIENCE: Duration = Duration::from_secs(2);
const ENDING_GLANCE: Duration = Duration::from_millis(50);
/// How long a QEMU that closed its socket may take to end.
const END_PATIENCE: Duration = Duration::from_secs(2);
/// How long the last words to the source may take.
const FAREWELL: Duration = Duration::from_millis(500);

/// Keeps a name until the VM has arrived.
struct Reservation {
    host: Arc<dyn Host>,
    vm: String,
    kept: bool,
}

impl Reservation {
    fn make(host: &Arc<dyn Host>, vm: &str) -> Result<Self, String> {
        host.reserve(vm)?;
        Ok(Self {
            host: Arc::clone(host),
            vm: vm.to_owned(),
            kept: false,
        })
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.kept {
            self.host.release(&self.vm);
        }
    }
}

/// Answers an offer, and takes the VM if it comes.
pub(super) async fn take(
    mut connection: Connection,
    offer: Offer,
    host: Arc<dyn Host>,
    outcomes: &Outcomes,
) -> Result<(), String> {
    let settings = host.launch_settings();
    let (fit, mut reservation) = match admit(&offer, &host, &settings).await {
        Ok(admitted) => admitted,
        Err(reasons) => return send(&mut connection, &Control::Refused { reasons }),
    };
    let name = fit.definition.name.clone();
    let accepted = Control::Accepted {
        qemu: fit.qemu,
        switchover_ack: fit.switchover_ack,
    };
    send(&mut connection, &accepted)?;
    if offer.dry_run {
        return Ok(());
    }
    let begun = tokio::task::spawn_blocking(move || {
        let message = connection.receive(PATIENCE);
        (connection, message)
    });
    let (mut connection, message) = begun.await.map_err(|error| error.to_string())?;
    let switchover_ack = match message {
        Ok(Control::Prepare { switchover_ack }) => switchover_ack,
        Ok(_) => return Err("something else came where the migration should begin".to_owned()),
        Err(error) => return Err(error.to_string()),
    };
    tracing::info!(
        vm = name,
        from = offer.from,
        job = offer.job,
        "migration arrives"
    );
    let outcome = outcomes.begin(offer.job, &offer.from);
    let prepared = Prepared::new(&fit, &settings, &offer, switchover_ack).await;
    let prepared = match prepared {
        Ok(prepared) => prepared,
        Err(reason) => {
            tracing::warn!(vm = name, reason, "QEMU cannot be prepared");
            let _ = outcome.send(Some(false));
            return send(&mut connection, &Control::Abort { reason });
        }
    };
    let vm = Arc::new(prepared.vm);
    let folder = vm.files().folder().to_owned();
    let events = vm.qmp().events();
    let received = async {
        send(&mut connection, &Control::Ready)?;
        let (sender, receiver, closer) = connection.split();
        let digester = Digester::new(&offer.digest_key);
        Engine::start(sender, receiver, closer, prepared.target, &digester)
            .map_err(|error| error.to_string())
    };
    let engine = match received.await {
        Ok(engine) => engine,
        Err(reason) => {
            abandon(&vm, &outcome).await;
            return Err(reason);
        }
    };
    if let Err(reason) = receive(&engine, &vm, events, host.name()).await {
        tracing::warn!(
            vm = name,
            reason,
            "migration ends before the hand-over; QEMU ends"
        );
        abandon(&vm, &outcome).await;
        engine.send(Control::Abort { reason });
        tokio::time::sleep(FAREWELL).await;
        engine.stop(RelayError::Stopped);
        return Ok(());
    }
    match run(&vm, &folder, &offer).await {
        Ok(()) => {
            reservation.kept = true;
            host.arrived(Arc::clone(&vm));
            let _ = outcome.send(Some(true));
            engine.send(Control::Running);
            if let Err(error) = recovery::settle(&folder, offer.job) {
                tracing::warn!(vm = name, %error, "mark of the arrived VM");
            }
            tracing::info!(vm = name, "runs here");
        }
        Err(reason) => {
            let reason = match vm.files().last_words() {
                Some(words) => format!("{reason}: {words}"),
                None => reason,
            };
            tracing::error!(vm = name, reason, "the VM cannot run here; it goes back");
            abandon(&vm, &outcome).await;
            engine.send(Control::Abort { reason });
        }
    }
    // The source closes the link when it has the answer.
    tokio::time::sleep(FAREWELL).await;
    engine.stop(RelayError::Stopped);
    Ok(())
}

/// Looks whether the VM fits here, and keeps its name; or why not. An earlier migration of it that has just
/// failed may still be ending here: that is waited for.
async fn admit(
    offer: &Offer,
    host: &Arc<dyn Host>,
    settings: &LaunchSettings,
) -> Result<(Fit, Reservation), Vec<String>> {
    let name = Definition::parse(&offer.definition).map(|definition| definition.name);
    let is_coming = || name.as_ref().is_ok_and(|name| host.is_coming(name));
    let deadline = Instant::now() + ENDING_PATIENCE;
    loop {
        let was_coming = is_coming();
        let refused = match look::at(offer, settings).await {
            Ok(fit) => match Reservation::make(host, &fit.definition.name) {
                Ok(reservation) => return Ok((fit, reservation)),
                Err(reason) => vec![reason],
            },
            Err(reasons) => reasons,
        };
        if !was_coming || Instant::now() > deadline {
            return Err(refused);
        }
        tokio::time::sleep(ENDING_GLANCE).await;
    }
}

/// Waits for the source's commit, and for QEMU's or the relay's failure.
async fn receive(
    engine: &Engine,
    vm: &Vm,
    mut events: broadcast::Receiver<Event>,
    host: &str,
) -> Result<(), String> {
    let ended = || match vm.files().last_words() {
        Some(words) => format!("QEMU on {host} ended: {words}"),
        None => format!(
            "QEMU on {host} ended without a word, as when it is killed; `dmesg` there tells if memory ran out"
        ),
    };
    loop {
        tokio::select! {
            biased;
            committed = engine.committed() => return match committed {
                // Most likely because it ends.
                Err(RelayError::Socket(_) | RelayError::Memory(_)) if timeout(END_PATIENCE, vm.gone()).await.is_ok() => Err(ended()),
                other => other.map_err(|error| error.to_string()),
            },
            event = events.recv() => match event {
                Ok(event) => {
                    let status = event.data.get("status").and_then(|status| status.as_str());
                    if event.name == "MIGRATION" && status == Some("failed") {
                        return Err(ended());
                    }
                }
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => {
                    return Err(ended());
                }
            },
            () = vm.gone() => return Err(ended()),
        }
    }
}

/// Ends a QEMU that never ran the VM, and removes what was made for it.
async fn abandon(vm: &Vm, outcome: &watch::Sender<Option<bool>>) {
    match vm.kill().await {
        Ok(()) => {
            if let Err(error) = vm.files().remove() {
                tracing::warn!(%error, "run directory of a VM that did not come");
            }
            let _ = outcome.send(Some(false));
        }
        // Without a word the source must not run it either.
        Err(error) => tracing::error!(vm = vm.name(), %error, "QEMU cannot be ended"),
    }
}

/// The source gave the VM up: it runs here from now on, or stays paused as it was there. An error means
/// that it never ran here, and goes back; a QEMU that ends when it is told to run it has lost it.
async fn run(vm: &Vm, folder: &Path, offer: &Offer) -> Result<(), String> {
    let runs = offer.running;
    recovery::mark(folder, Mark::Committed { runs }, offer.job)
        .map_err(|error| error.to_string())?;
    if !runs {
        return Ok(());
    }
    // QEMU answers `cont` at once while it still loads the VM, and may give it up afterwards.
    let deadline = Instant::now() + LOAD_PATIENCE;
    loop {
        let status = vm.qmp().status().await.map_err(|error| error.to_string())?;
        if status.status != "inmigrate" {
            break;
        }
        if Instant::now() > deadline {
            return Err("QEMU does not come to an end of loading the VM".to_owned());
        }
        tokio::time::sleep(LOAD_GLANCE).await;
    }
    match vm.qmp().cont().await {
        Ok(()) => Ok(()),
        Err(refused @ hypervisor::Error::Refused { .. }) => Err(refused.to_string()),
        Err(error) => {
            tracing::error!(vm = vm.name(), %error, "told to run; it may have, so it does not go back");
            Ok(())
        }
    }
}

/// A QEMU that waits for its stream.
struct Prepared {
    vm: Vm,
    target: Target,
}

impl Prepared {
    async fn new(
        fit: &Fit,
        settings: &LaunchSettings,
        offer: &Offer,
        switchover_ack: bool,
    ) -> Result<Self, String> {
        let volumes = open_volumes(fit, settings);
        let files = settings.files(&fit.definition.name);
        let folder = files.folder();
        let text = fit
            .definition
            .to_toml()
            .map_err(|error| error.to_string())?;
        recovery::begin(folder, &text, offer.job)
            .map_err(|error| format!("{}: {error}", folder.display()))?;
        let launched = timeout(
            START_PATIENCE,
            Vm::launch(&fit.definition, settings, Start::Incoming),
        );
        let (launched, volumes) = tokio::join!(launched, volumes);
        let vm = match launched {
            Ok(Ok(vm)) => vm,
            Ok(Err(error)) => {
                let _ = recovery::clear(folder);
                return Err(error.to_string());
            }
            Err(_) => return Err("QEMU did not start in time".to_owned()),
        };
        let stream = connect(&vm, switchover_ack).await;
        match (stream, volumes) {
            (Ok(qemu), Ok(volumes)) => Ok(Self {
                target: Target {
                    qemu,
                    volumes,
                    memory: reach_memory(&vm).await,
                    memory_bytes: fit.definition.memory.bytes(),
                },
                vm,
            }),
            (Err(reason), _) | (_, Err(reason)) => {
                if vm.kill().await.is_ok() {
                    let _ = vm.files().remove();
                }
                Err(reason)
            }
        }
    }
}

/// The guest's memory; without it all pages go by QEMU's stream, which is slower.
async fn reach_memory(vm: &Vm) -> Option<GuestMemory> {
    match GuestMemory::of(vm).await {
        Ok(memory) => Some(memory),
        Err(error) => {
            tracing::warn!(vm = vm.name(), %error, "pages go by QEMU's stream");
            None
        }
    }
}

/// Opens the disks for reading, away from the event loop.
async fn open_volumes(
    fit: &Fit,
    settings: &LaunchSettings,
) -> Result<Vec<Box<dyn volume::Reader>>, String> {
    let run = volume::Settings::new(settings.run_directory.clone())
        .beside(settings.binary(&fit.definition));
    let disks: Vec<_> = fit
        .definition
        .disks
        .iter()
        .map(|disk| {
            let format = match disk.format {
                crate::hypervisor::definition::Format::Raw => volume::Format::Raw,
                crate::hypervisor::definition::Format::Qcow2 => volume::Format::Qcow2,
            };
            (
                fit.definition.disk_path(disk, &settings.host).to_owned(),
                format,
            )
        })
        .collect();
    let opened = tokio::task::spawn_blocking(move || {
        disks
            .iter()
            .map(|(path, format)| volume::open(path, *format, &run))
            .collect::<Result<Vec<_>, _>>()
    });
    opened
        .await
        .map_err(|error| error.to_string())?
        .map_err(|error| error.to_string())
}

/// Lets QEMU take the stream from a socket of ours.
async fn connect(vm: &Vm, switchover_ack: bool) -> Result<UnixStream, String> {
    let text = |error: crate::hypervisor::Error| error.to_string();
    let mut capabilities = vec![("return-path", true), ("events", true)];
    if switchover_ack {
        capabilities.push(("switchover-ack", true));
    }
    vm.qmp()
        .migrate_set_capabilities(&capabilities)
        .await
        .map_err(text)?;
    let (ours, theirs) = stream::pair().map_err(|error| error.to_string())?;
    vm.qmp().migrate_incoming(theirs).await.map_err(text)?;
    Ok(ours)
}
