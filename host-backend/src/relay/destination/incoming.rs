//! Takes one VM in.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{broadcast, watch};
use tokio::time::timeout;
use transhume_protocol::link::{Control, Offer, PostCopy};

use super::agent;
use super::arrivals::Stage;
use super::engine::{Engine, Target, Way};
use super::look::{self, Fit};
use super::postcopy;
use super::recovery;
use super::rehearsal;
use super::resume;
use super::sessions::Open;
use super::storage::{Comparer, Shown};
use super::{Host, Outcomes, held, send};
use crate::hypervisor::command_line::Start;
use crate::hypervisor::definition::Definition;
use crate::hypervisor::memory::GuestMemory;
use crate::hypervisor::qmp::{Event, Version};
use crate::hypervisor::{self, LaunchSettings, OpenedFiles, Vm, stream};
use crate::link::session::{Ready, Session};
use crate::link::{self, Connection};
use crate::pages::digest::Digester;
use crate::relay::error::{CutOff, RelayError};
use crate::volume;

/// How long QEMU may take to load the VM once all of it is there, and how often it is looked at.
const LOAD_PATIENCE: Duration = Duration::from_secs(5);
const LOAD_GLANCE: Duration = Duration::from_millis(1);
/// How long an earlier migration of the VM may take to end, and how often it is looked at.
const ENDING_PATIENCE: Duration = Duration::from_secs(2);
const ENDING_GLANCE: Duration = Duration::from_millis(50);
/// How long a QEMU that closed its socket may take to end.
const END_PATIENCE: Duration = Duration::from_secs(2);
/// Connections of a session, at most: one takes a CPU.
pub(super) const MOST_CONNECTIONS: u8 = 8;
/// How long the last words to the source may take.
pub(super) const FAREWELL: Duration = Duration::from_millis(500);

/// Keeps a name until the VM has arrived.
struct Reservation {
    host: Arc<dyn Host>,
    vm: String,
    kept: bool,
}

impl Reservation {
    fn make(host: &Arc<dyn Host>, vm: &Definition) -> Result<Self, String> {
        host.reserve(vm)?;
        Ok(Self {
            host: Arc::clone(host),
            vm: vm.name.clone(),
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

/// What is decided on a migration: journalled, and told to whoever asks.
struct Decision {
    host: Arc<dyn Host>,
    job: u64,
    vm: String,
    outcome: watch::Sender<Option<bool>>,
}

impl Decision {
    fn note(&self, stage: Stage) -> Result<(), String> {
        let noted = self.host.arrivals().note(self.job, &self.vm, stage);
        noted.map_err(|error| {
            format!(
                "{} cannot write its journal: {error}; is its `state-directory` full?",
                self.host.name()
            )
        })
    }

    /// The VM runs here, and part of its memory is still to come.
    fn follows(&self) {
        let arrivals = self.host.arrivals();
        arrivals.note_surely(self.job, &self.vm, Stage::PostCopy);
        let _ = self.outcome.send(Some(true));
    }

    /// It is decided. A note that cannot be written is made up for later, or after a restart.
    fn end(&self, stage: Stage) {
        let arrivals = self.host.arrivals();
        arrivals.note_surely(self.job, &self.vm, stage);
        let _ = self.outcome.send(Some(stage == Stage::Taken));
    }

    /// Ends a QEMU that never ran the VM, and removes what was made for it.
    async fn abandon(&self, vm: &Vm) {
        match vm.kill().await {
            Ok(()) => {
                if let Err(error) = vm.files().remove() {
                    tracing::warn!(%error, "run directory of a VM that did not come");
                }
                self.end(Stage::Refused);
            }
            // Without a word the source must not run it either.
            Err(error) => tracing::error!(vm = vm.name(), %error, "QEMU cannot be ended"),
        }
    }
}

/// A migration as people know it: its number at its source, by which they find it there.
pub(super) fn label(offer: &Offer) -> String {
    format!("{}/{}", offer.from, offer.source_job)
}

/// Answers an offer, and takes the VM if it comes.
pub(super) async fn take(
    mut connection: Connection,
    offer: Offer,
    host: Arc<dyn Host>,
    outcomes: &Outcomes,
) -> Result<(), String> {
    let settings = host.launch_settings();
    if host.arrivals().of(offer.job).is_some() {
        let reason =
            "this offer came before, and its migration has ended; it may be a recorded one";
        let reasons = vec![reason.to_owned()];
        return send(&mut connection, &Control::Refused { reasons });
    }
    let closer = connection.closer();
    // Dropped last: a later offer of the migration waits until all of this one is gone.
    let entry = match outcomes
        .attempts
        .enter(&offer, move || closer.close())
        .await
    {
        Ok(entry) => entry,
        Err(reason) => {
            let reasons = vec![reason];
            return send(&mut connection, &Control::Refused { reasons });
        }
    };
    if let Ok(definition) = Definition::parse(&offer.definition) {
        outcomes.sessions.end_earlier(&definition.name, &offer.from);
        held::end_earlier(&definition.name, &offer.from, &host).await;
    }
    let (fit, mut reservation) = match admit(&offer, &host, &settings).await {
        Ok(admitted) => admitted,
        Err(reasons) => return send(&mut connection, &Control::Refused { reasons }),
    };
    let name = fit.definition.name.clone();
    let (mut shown, storage) = match Shown::of(&fit.definition, &settings, offer.signs).await {
        Ok(shown) => shown,
        Err(reason) => {
            let reasons = vec![reason];
            return send(&mut connection, &Control::Refused { reasons });
        }
    };
    let accepted = Control::Accepted {
        qemu: fit.qemu,
        switchover_ack: fit.switchover_ack,
        no_post_copy: fit.no_post_copy.clone(),
        storage: Box::new(storage),
    };
    let accepted = if offer.dry_run {
        let decision = Decision {
            host: Arc::clone(&host),
            job: offer.job,
            vm: name.clone(),
            outcome: outcomes.begin(offer.job, &offer.from),
        };
        let comparer = shown.comparer();
        match rehearse(&decision, &fit, &settings, &offer, accepted, comparer).await {
            Ok(accepted) => accepted,
            Err(reason) => {
                let reasons = vec![reason];
                return send(&mut connection, &Control::Refused { reasons });
            }
        }
    } else {
        accepted
    };
    send(&mut connection, &accepted)?;
    let begun = tokio::task::spawn_blocking(move || {
        let message = shown.serve(&mut connection);
        (connection, message, shown.comparer())
    });
    let (mut connection, message, comparer) = begun.await.map_err(|error| error.to_string())?;
    let (switchover_ack, wished, patience, post_copy) = match message {
        Ok(Control::Prepare {
            switchover_ack,
            connections,
            patience,
            post_copy,
        }) if !offer.dry_run => (switchover_ack, connections, patience, post_copy),
        Err(link::Error::Closed) if offer.dry_run => return Ok(()),
        Ok(Control::Abort { reason }) => {
            tracing::info!(
                vm = name,
                from = offer.from,
                reason,
                "the source does not send it"
            );
            return Ok(());
        }
        Ok(_) => return Err("something else came where the migration should begin".to_owned()),
        Err(error) => return Err(error.to_string()),
    };
    tracing::info!(
        vm = name,
        from = offer.from,
        job = offer.job,
        "migration arrives"
    );
    let decision = Decision {
        host: Arc::clone(&host),
        job: offer.job,
        vm: name.clone(),
        outcome: outcomes.begin(offer.job, &offer.from),
    };
    let prepared = Prepared::new(
        &decision,
        &fit,
        &settings,
        &offer,
        switchover_ack,
        post_copy,
        comparer,
    );
    let prepared = match prepared.await {
        Ok(prepared) => prepared,
        Err(reason) => {
            tracing::warn!(vm = name, reason, "QEMU cannot be prepared");
            decision.end(Stage::Refused);
            return send(&mut connection, &Control::Abort { reason });
        }
    };
    let no_post_copy = prepared.no_post_copy;
    let vm = Arc::new(prepared.vm);
    if let Err(reason) = host.expect(&vm, offer.job, offer.autostart) {
        tracing::warn!(vm = name, reason, "the VM that arrives cannot be noted");
        decision.abandon(&vm).await;
        return send(&mut connection, &Control::Abort { reason });
    }
    let events = vm.qmp().events();
    let connections = wished.clamp(1, MOST_CONNECTIONS);
    let patience = Duration::from_secs(patience.max(1).into());
    let received = async {
        let mut token = [0; 16];
        getrandom::fill(&mut token).map_err(|error| error.to_string())?;
        let ready = Control::Ready {
            token,
            connections,
            no_post_copy,
        };
        send(&mut connection, &ready)?;
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let session = Session::begin(connection, patience, None, Ready::default)
            .map_err(|error| text(&error))?;
        let ending = session.clone();
        entry.ends_by(move || ending.close());
        let open = outcomes.sessions.enter(Open {
            job: offer.job,
            token,
            from: offer.from.clone(),
            vm: name.clone(),
            connections,
            session: session.clone(),
        });
        let digester = Digester::new(&offer.digest_key);
        let engine = Engine::start(session, prepared.target, &digester);
        Ok::<_, String>((engine.map_err(|error| text(&error))?, open))
    };
    let (engine, _open) = match received.await {
        Ok(begun) => begun,
        Err(reason) => {
            decision.abandon(&vm).await;
            return Err(reason);
        }
    };
    let mut loaded = false;
    if let Err(reason) = receive(&engine, &vm, events, &decision, &offer, &mut loaded).await {
        if loaded && timeout(END_PATIENCE, vm.gone()).await.is_err() {
            tracing::warn!(
                vm = name,
                reason,
                from = offer.from,
                pid = vm.pid(),
                "the link broke after its devices were loaded: it is kept, without running, until its source says whether \
                 it runs here"
            );
            reservation.kept = true;
            engine.finish(FAREWELL).await;
            return Ok(());
        }
        tracing::warn!(
            vm = name,
            reason,
            "migration ends before the hand-over; QEMU ends"
        );
        decision.abandon(&vm).await;
        drop(reservation);
        engine.send(Control::Abort { reason });
        engine.finish(FAREWELL).await;
        return Ok(());
    }
    let events = vm.qmp().events();
    let gated = offer.running && engine.is_post_copy();
    let gate = gated.then(|| engine.gate(&vm));
    let _under_way = host.arrivals().under_way();
    match run(&vm, &decision, &offer, &engine).await {
        Ok(()) => {
            reservation.kept = true;
            engine.set_link_patience(patience);
            host.arrived(Arc::clone(&vm), offer.autostart);
            engine.send(Control::Running);
            if engine.is_post_copy() {
                tracing::info!(vm = name, "runs here; part of its memory is still to come");
                decision.follows();
                resume::forget_when_gone(host.arrivals(), &vm, offer.job);
                match postcopy::complete(&engine, &vm, events).await {
                    Ok(()) => {
                        resume::whole(&*host, &vm, offer.job);
                        let stalls = postcopy::stalls(vm.qmp(), gate).await;
                        engine.send(Control::Stalled(stalls));
                    }
                    Err(CutOff::GuestEnded(how)) => {
                        postcopy::guest_ended(&engine, host.arrivals(), &vm, offer.job, how).await;
                    }
                    Err(CutOff::Broken(cause)) => tracing::warn!(
                        vm = name,
                        cause,
                        "post-copy is cut off: the VM stands still where it needs memory that has not come, until \
                         the source sends it"
                    ),
                }
                engine.finish(FAREWELL).await;
                return Ok(());
            }
            if offer.running {
                agent::greet(Arc::clone(&vm));
            }
            decision.end(Stage::Taken);
            if let Err(error) = recovery::settle(vm.files().folder()) {
                tracing::warn!(vm = name, %error, "run directory of the VM that arrived");
            }
            tracing::info!(vm = name, "runs here");
        }
        Err(reason) => {
            let reason = match vm.files().logs().last_words() {
                Some(words) => format!("{reason}: {words}"),
                None => reason,
            };
            tracing::error!(vm = name, reason, "the VM cannot run here; it goes back");
            decision.abandon(&vm).await;
            drop(reservation);
            engine.send(Control::Abort { reason });
        }
    }
    // The source closes the link when it has the answer.
    engine.finish(FAREWELL).await;
    Ok(())
}

/// A dry run: prepares a QEMU for the VM, and ends it. What that shows is added to what is `accepted`; an error is why the
/// VM cannot come.
async fn rehearse(
    decision: &Decision,
    fit: &Fit,
    settings: &LaunchSettings,
    offer: &Offer,
    mut accepted: Control,
    comparer: Comparer,
) -> Result<Control, String> {
    let prepared = Prepared::new(
        decision,
        fit,
        settings,
        offer,
        fit.switchover_ack,
        PostCopy::Perhaps,
        comparer,
    )
    .await
    .inspect_err(|_| decision.end(Stage::Refused))?;
    decision.abandon(&prepared.vm).await;
    if let Control::Accepted { no_post_copy, .. } = &mut accepted {
        *no_post_copy = no_post_copy.take().or(prepared.no_post_copy);
    }
    Ok(accepted)
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
            Ok(fit) => match Reservation::make(host, &fit.definition) {
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

/// Whether the source's QEMU keeps the VM until its devices are loaded here.
fn loads_first(offer: &Offer) -> bool {
    Version::from(offer.qemu).keeps_until_loaded()
}

/// Waits for the source's commit, and for QEMU's or the relay's failure. `loaded` tells whether the source may have
/// given the VM up when this returns.
async fn receive(
    engine: &Engine,
    vm: &Vm,
    mut events: broadcast::Receiver<Event>,
    decision: &Decision,
    offer: &Offer,
    loaded: &mut bool,
) -> Result<(), String> {
    let host = decision.host.name();
    let ended = || match vm.files().logs().last_words() {
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
            () = engine.loaded(), if !*loaded => {
                note_forgotten(engine, vm, offer)?;
                decision.note(Stage::Loaded)?;
                *loaded = true;
                engine.send(Control::Loaded);
            }
        }
    }
}

/// Writes down what QEMU forgot at the switch to post-copy, which must be known to resume it.
fn note_forgotten(engine: &Engine, vm: &Vm, offer: &Offer) -> Result<(), String> {
    let Some(forgotten) = engine.take_forgotten() else {
        return Ok(());
    };
    let folder = vm.files().folder();
    let written = forgotten.write(folder, offer.job, &offer.from);
    written.map_err(|error| format!("{}: {error}", folder.display()))
}

/// The source gave the VM up: it runs here from now on, or stays paused as it was there. An error means
/// that it never ran here, and goes back; a QEMU that ends when it is told to run it has lost it.
async fn run(vm: &Vm, decision: &Decision, offer: &Offer, engine: &Engine) -> Result<(), String> {
    let runs = offer.running;
    note_forgotten(engine, vm, offer)?;
    decision.note(Stage::Committed { runs })?;
    engine.release();
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
        if engine.is_post_copy() {
            // Loading may need pages, which come over the link; that ends by itself if it is gone for long.
            if let Some(error) = engine.failed() {
                return Err(error.to_string());
            }
        } else if Instant::now() > deadline {
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
    /// Why it does not wait for one in post-copy, which was left to it.
    no_post_copy: Option<String>,
}

impl Prepared {
    async fn new(
        decision: &Decision,
        fit: &Fit,
        settings: &LaunchSettings,
        offer: &Offer,
        switchover_ack: bool,
        post_copy: PostCopy,
        comparer: Comparer,
    ) -> Result<Self, String> {
        decision.note(Stage::Waiting)?;
        let limits = decision.host.may_send(&offer.from)?;
        // Once for QEMU and for the relay's own reading, and checked as it was opened.
        let opened = OpenedFiles::open_in_time(&fit.definition, settings, Some(&limits)).await;
        let opened = Arc::new(opened.map_err(|error| error.to_string())?);
        let volumes = open_volumes(fit, settings, Arc::clone(&opened));
        let files = settings.files(&fit.definition.name);
        let folder = files.folder();
        let text = fit
            .definition
            .to_toml()
            .map_err(|error| error.to_string())?;
        recovery::begin(folder, &text, offer.job, &label(offer))
            .map_err(|error| format!("{}: {error}", folder.display()))?;
        let logs = files.logs();
        logs.note(&format!("the VM comes from {}", offer.from))
            .map_err(|error| error.to_string())?;
        let launched = Vm::launch(&fit.definition, settings, Start::Incoming, &opened);
        let (launched, volumes) = tokio::join!(launched, volumes);
        // A lock of QEMU's would last as long as these.
        drop(opened);
        let vm = match launched {
            Ok(vm) => vm,
            Err(error) => {
                // The error has QEMU's last words. Another QEMU of that name would keep its files.
                if UnixStream::connect(files.qmp()).is_err()
                    && let Err(error) = files.remove()
                {
                    tracing::warn!(%error, "run directory of a QEMU that did not start");
                }
                return Err(error.to_string());
            }
        };
        let volumes = volumes.and_then(|volumes| check_sizes(fit, offer, volumes));
        let volumes = rehearsal::check_queues(&vm, offer, &settings.host)
            .await
            .and(volumes);
        let taken = take_post_copy(&vm, post_copy, &settings.host).await;
        let stream = match &taken {
            Err(reason) if post_copy == PostCopy::Yes => Err(reason.clone()),
            _ => connect(&vm, switchover_ack, offer.running).await,
        };
        match (stream, volumes) {
            (Ok(qemu), Ok(volumes)) => Ok(Self {
                target: Target {
                    qemu,
                    volumes,
                    comparer: Some(comparer),
                    memory: reach_memory(&vm).await,
                    memory_bytes: fit.definition.memory.bytes(),
                    way: match taken {
                        Ok(true) => Way::PostCopy {
                            loads_first: loads_first(offer),
                        },
                        _ => Way::PreCopy,
                    },
                },
                vm,
                no_post_copy: taken.err(),
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
    files: Arc<OpenedFiles>,
) -> Result<Vec<Box<dyn volume::Reader>>, String> {
    let mut run = volume::Settings::new(settings.run_directory.clone())
        .beside(settings.binary(&fit.definition));
    run.user.clone_from(&settings.user);
    let opened = tokio::task::spawn_blocking(move || {
        let images = files.images.iter();
        images
            .map(|image| volume::open_image(image, &run))
            .collect::<Result<Vec<_>, _>>()
    });
    opened
        .await
        .map_err(|error| error.to_string())?
        .map_err(|error| error.to_string())
}

/// The disks as they were opened: what was looked at before may have been another file.
fn check_sizes(
    fit: &Fit,
    offer: &Offer,
    volumes: Vec<Box<dyn volume::Reader>>,
) -> Result<Vec<Box<dyn volume::Reader>>, String> {
    for (disk, volume) in fit.definition.disks.iter().zip(&volumes) {
        let offered = offer.disks.iter().find(|offered| offered.id == disk.id);
        let (here, there) = (volume.size(), offered.map(|offered| offered.size));
        if there != Some(here) {
            return Err(format!(
                "disk {} has {} bytes at the source, and {here} here; see whether both hosts name the same disk",
                disk.id,
                there.unwrap_or_default(),
            ));
        }
    }
    Ok(volumes)
}

/// Lets QEMU take a VM in post-copy if one may come so, which is returned, or tells why it does not.
async fn take_post_copy(vm: &Vm, post_copy: PostCopy, host: &str) -> Result<bool, String> {
    if post_copy == PostCopy::No {
        return Ok(false);
    }
    // QEMU looks at the kernel then.
    let set = vm.qmp().migrate_set_capabilities(&[("postcopy-ram", true)]);
    set.await
        .map_err(|error| postcopy::unsupported(host, &error))?;
    // How long CPUs stand still then is good to know, and not needed.
    let set = vm
        .qmp()
        .migrate_set_capabilities(&[("postcopy-blocktime", true)]);
    if let Err(error) = set.await {
        tracing::debug!(%error, "postcopy-blocktime");
    }
    Ok(true)
}

/// Lets QEMU take the stream from a socket of ours.
async fn connect(vm: &Vm, switchover_ack: bool, running: bool) -> Result<UnixStream, String> {
    let text = |error: crate::hypervisor::Error| error.to_string();
    let mut capabilities = vec![("return-path", true), ("events", true)];
    if running {
        // The disks' locks are taken by `cont` alone: until then the source can have them back. A VM that
        // stays paused takes them now: QEMU before 8.1 cannot move it again otherwise.
        capabilities.push(("late-block-activate", true));
    }
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
