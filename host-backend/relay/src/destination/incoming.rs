//! Takes one VM in.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::broadcast;
use tokio::time::timeout;
use transhume_protocol::link::{Control, Offer, PostCopy};

use super::answer::{refuse, send};
use super::attempts::Entry;
use super::decision::{Decision, NameReservation};
use super::engine::{Engine, FAREWELL, MAX_CONNECTIONS, Target};
use super::host::Host;
use super::journal::Stage;
use super::offer_check::{self, AcceptedOffer};
use super::outcomes::Outcomes;
use super::preparation::{Prepared, rehearse};
use super::{endings, held, post_copy, run_directory};
use crate::error::RelayError;
use crate::moved_guest;
use crate::receive::fault_gate::Gate;
use crate::storage::shown::{Comparer, Shown};
use transhume_hypervisor::{self as hypervisor, Event, LaunchSettings, Vm};
use transhume_link::server::{self, Open};
use transhume_link::session::{Ready, Session};
use transhume_link::{self as link, Connection};
use transhume_machine::Definition;
use transhume_pages::digest::Digester;

/// How long QEMU may take to load the VM once all of it is there, and how often it is looked at.
const LOAD_TIMEOUT: Duration = Duration::from_secs(5);
const LOAD_POLL_INTERVAL: Duration = Duration::from_millis(1);
/// How long an earlier migration of the VM may take to end, and how often it is looked at.
const ENDING_TIMEOUT: Duration = Duration::from_secs(2);
const ENDING_POLL_INTERVAL: Duration = Duration::from_millis(50);
/// How long a QEMU that closed its socket may take to end.
const END_TIMEOUT: Duration = Duration::from_secs(2);

/// Answers an offer, and takes the VM if it comes.
pub(crate) async fn take(
    mut connection: Connection,
    offer: Offer,
    host: Arc<dyn Host>,
    outcomes: &Outcomes,
) -> Result<(), String> {
    let settings = host.launch_settings();
    // Dropped last: a later offer of the migration waits until all of this one is gone.
    let entry = match enter(&connection, &offer, &host, outcomes).await {
        Ok(entry) => entry,
        Err(reason) => return refuse(&mut connection, vec![reason]),
    };
    let agreed = match agree(&offer, &host, outcomes, &settings).await {
        Ok(agreed) => agreed,
        Err(reasons) => return refuse(&mut connection, reasons),
    };
    let Agreed {
        fit,
        reservation,
        shown,
        accepted,
    } = agreed;
    send(&mut connection, &accepted)?;
    let Some(begun) = wait_for_begin(connection, shown, &offer, &fit).await? else {
        return Ok(());
    };
    tracing::info!(offer = offer.job, "the migration arrives");
    let decision = Decision::begin(&host, &offer, &fit.definition.name, outcomes);
    let Beginning {
        mut connection,
        terms,
        comparer,
    } = begun;
    let prepared = Prepared::new(
        &decision,
        &fit,
        &settings,
        &offer,
        terms.switchover_ack,
        terms.post_copy,
        comparer,
    );
    let prepared = match prepared.await {
        Ok(prepared) => prepared,
        Err(reason) => {
            tracing::warn!(vm = decision.vm, reason, "QEMU cannot be prepared");
            decision.end(Stage::Refused);
            return send(&mut connection, &Control::Abort { reason });
        }
    };
    let Prepared {
        vm,
        target,
        no_post_copy,
    } = prepared;
    let arriving = Arriving {
        decision,
        reservation,
        offer,
        vm: Arc::new(vm),
    };
    if let Err(reason) = arriving.expect() {
        arriving.decision.abandon(&arriving.vm).await;
        return send(&mut connection, &Control::Abort { reason });
    }
    let events = arriving.vm.qmp().events();
    let begun = arriving.begin_session(connection, &terms, no_post_copy, target, outcomes, &entry);
    // `_open`: the session can be joined as long as this is.
    let (engine, _open) = match begun {
        Ok(begun) => begun,
        Err(reason) => {
            arriving.decision.abandon(&arriving.vm).await;
            return Err(reason);
        }
    };
    arriving.take_in(&engine, events, terms.patience()).await;
    Ok(())
}

/// Whether the migration may begin here: it is none that came before, and what is left of earlier ones of its VM ends.
async fn enter(
    connection: &Connection,
    offer: &Offer,
    host: &Arc<dyn Host>,
    outcomes: &Outcomes,
) -> Result<Entry, String> {
    if host.arrivals().of(offer.job).is_some() {
        return Err(
            "this offer came before, and its migration has ended; it may be a recorded one"
                .to_owned(),
        );
    }
    let closer = connection.closer();
    let entered = outcomes.attempts.enter(offer, move || closer.close());
    let entry = entered.await?;
    if let Ok(definition) = Definition::parse(&offer.definition) {
        tracing::Span::current().record("vm", &definition.name);
        outcomes.sessions.end_earlier(&definition.name, &offer.from);
        held::end_earlier(&definition.name, &offer.from, host).await;
    }
    Ok(entry)
}

/// The VM fits here, and its name is kept for it.
struct Agreed {
    fit: AcceptedOffer,
    reservation: NameReservation,
    /// Its disks, for a source that compares them.
    shown: Shown,
    /// What the source is told.
    accepted: Control,
}

/// Looks whether the VM can come; in a dry run with a QEMU that is started and ended.
async fn agree(
    offer: &Offer,
    host: &Arc<dyn Host>,
    outcomes: &Outcomes,
    settings: &LaunchSettings,
) -> Result<Agreed, Vec<String>> {
    let (fit, reservation) = admit(offer, host, settings).await?;
    let one = |reason| vec![reason];
    let shown = Shown::of(&fit.definition, &settings.host, offer.signs);
    let (shown, storage) = shown.await.map_err(one)?;
    let mut accepted = Control::Accepted {
        qemu: fit.qemu,
        switchover_ack: fit.switchover_ack,
        no_post_copy: fit.no_post_copy.clone(),
        storage: Box::new(storage),
    };
    if offer.dry_run {
        let decision = Decision::begin(host, offer, &fit.definition.name, outcomes);
        let rehearsed = rehearse(&decision, &fit, settings, offer, accepted, shown.comparer());
        accepted = rehearsed.await.map_err(one)?;
    }
    Ok(Agreed {
        fit,
        reservation,
        shown,
        accepted,
    })
}

/// What the source wants of the migration.
struct Terms {
    switchover_ack: bool,
    connections: u8,
    /// How long the link may be away, in seconds.
    patience: u16,
    post_copy: PostCopy,
}

impl Terms {
    fn patience(&self) -> Duration {
        Duration::from_secs(self.patience.max(1).into())
    }
}

/// The source begins.
struct Beginning {
    connection: Connection,
    terms: Terms,
    /// Reads the disks for it.
    comparer: Comparer,
}

/// Answers what the source asks of the disks until it begins; `None` if it does not.
async fn wait_for_begin(
    mut connection: Connection,
    mut shown: Shown,
    offer: &Offer,
    fit: &AcceptedOffer,
) -> Result<Option<Beginning>, String> {
    let asked = transhume_base::task::blocking(move || {
        let message = shown.serve(&mut connection);
        (connection, message, shown.comparer())
    });
    let (connection, message, comparer) = asked.await.map_err(|error| error.to_string())?;
    match message {
        Ok(Control::Prepare {
            switchover_ack,
            connections,
            patience,
            post_copy,
        }) if !offer.dry_run => Ok(Some(Beginning {
            connection,
            terms: Terms {
                switchover_ack,
                connections,
                patience,
                post_copy,
            },
            comparer,
        })),
        Err(link::Error::Closed) if offer.dry_run => Ok(None),
        Ok(Control::Abort { reason }) => {
            tracing::info!(
                vm = fit.definition.name,
                from = offer.from,
                reason,
                "the source does not send it"
            );
            Ok(None)
        }
        Ok(_) => Err("something else came where the migration should begin".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// A VM whose QEMU waits here for it.
struct Arriving {
    decision: Decision,
    reservation: NameReservation,
    offer: Offer,
    vm: Arc<Vm>,
}

impl Arriving {
    /// Has the daemon note the VM, for when it is committed.
    fn expect(&self) -> Result<(), String> {
        let Self {
            decision, offer, ..
        } = self;
        let noted = decision.host.expect(&self.vm, offer.job, offer.autostart);
        noted.inspect_err(|reason| {
            tracing::warn!(
                vm = decision.vm,
                reason,
                "the VM that arrives cannot be noted"
            );
        })
    }

    /// Begins the session with the source, and the threads between it and QEMU.
    fn begin_session(
        &self,
        mut connection: Connection,
        terms: &Terms,
        no_post_copy: Option<String>,
        target: Target,
        outcomes: &Outcomes,
        entry: &Entry,
    ) -> Result<(Arc<Engine>, server::Entry), String> {
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let mut token = [0; 16];
        getrandom::fill(&mut token).map_err(|error| text(&error))?;
        let connections = terms.connections.clamp(1, MAX_CONNECTIONS);
        let ready = Control::Ready {
            token,
            connections,
            no_post_copy,
        };
        send(&mut connection, &ready)?;
        let session = Session::begin(connection, terms.patience(), None, Ready::default);
        let session = session.map_err(|error| text(&error))?;
        let ending = session.clone();
        entry.ends_by(move || ending.close());
        let open = outcomes.sessions.enter(Open {
            job: self.offer.job,
            token,
            from: self.offer.from.clone(),
            vm: self.decision.vm.clone(),
            connections,
            session: session.clone(),
        });
        let digester = Digester::new(&self.offer.digest_key);
        let engine = Engine::start(session, target, &digester);
        Ok((engine.map_err(|error| text(&error))?, open))
    }

    /// Takes memory in up to the source's commit, and then the VM.
    async fn take_in(
        self,
        engine: &Arc<Engine>,
        events: broadcast::Receiver<Event>,
        patience: Duration,
    ) {
        let Self {
            decision,
            offer,
            vm,
            ..
        } = &self;
        let mut loaded = false;
        if let Err(reason) = receive(engine, vm, events, decision, offer, &mut loaded).await {
            return self.not_committed(engine, reason, loaded).await;
        }
        let events = vm.qmp().events();
        if offer.running {
            moved_guest::of(vm).note_clock(engine.guest_clock());
        }
        let gated = offer.running && engine.is_post_copy();
        let gate = gated.then(|| engine.gate(vm));
        let host = Arc::clone(&decision.host);
        let _under_way = host.arrivals().under_way();
        match run(vm, decision, offer, engine).await {
            Ok(()) => self.runs_here(engine, events, patience, gate).await,
            Err(reason) => self.goes_back(engine, reason).await,
        }
    }

    /// The migration ended before the source's commit came: QEMU ends, unless the source may have given the VM up.
    async fn not_committed(mut self, engine: &Engine, reason: String, loaded: bool) {
        let (vm, name) = (&self.vm, &self.decision.vm);
        if loaded && timeout(END_TIMEOUT, vm.gone()).await.is_err() {
            tracing::warn!(
                vm = name,
                reason,
                from = self.offer.from,
                pid = vm.pid(),
                "the link broke after its devices were loaded: it is kept, without running, until its source says whether \
                 it runs here"
            );
            self.reservation.kept = true;
            return engine.finish(FAREWELL).await;
        }
        tracing::warn!(
            vm = name,
            reason,
            "migration ends before the hand-over; QEMU ends"
        );
        self.decision.abandon(vm).await;
        drop(self.reservation);
        engine.send(Control::Abort { reason });
        engine.finish(FAREWELL).await;
    }

    /// The VM is this host's. In post-copy the rest of its memory is waited for.
    async fn runs_here(
        mut self,
        engine: &Arc<Engine>,
        events: broadcast::Receiver<Event>,
        patience: Duration,
        gate: Option<Gate>,
    ) {
        self.reservation.kept = true;
        let Self {
            decision,
            offer,
            vm,
            ..
        } = &self;
        let host = &decision.host;
        engine.set_link_patience(patience);
        host.arrived(Arc::clone(vm), offer.autostart);
        engine.send(Control::Running);
        if engine.is_post_copy() {
            tracing::info!(
                vm = decision.vm,
                "runs here; part of its memory is still to come"
            );
            decision.follows();
            endings::forget_when_gone(host.arrivals(), vm, offer.job);
            post_copy::follow(engine, host.arrivals(), vm, offer.job, events, gate).await;
            return engine.finish(FAREWELL).await;
        }
        if offer.running {
            moved_guest::of(vm).greet(engine.guest_clock());
        }
        decision.end(Stage::Taken);
        if let Err(error) = run_directory::settle(vm.files().folder()) {
            tracing::warn!(vm = decision.vm, %error, "run directory of the VM that arrived");
        }
        tracing::info!(vm = decision.vm, "runs here");
        // The source closes the link when it has the answer.
        engine.finish(FAREWELL).await;
    }

    /// QEMU cannot run the VM: the source takes it back.
    async fn goes_back(self, engine: &Engine, reason: String) {
        let vm = &self.vm;
        let reason = match vm.files().logs().last_words() {
            Some(words) => format!("{reason}: {words}"),
            None => reason,
        };
        tracing::error!(
            vm = self.decision.vm,
            reason,
            "the VM cannot run here; it goes back"
        );
        self.decision.abandon(vm).await;
        drop(self.reservation);
        engine.send(Control::Abort { reason });
        // The source closes the link when it has the answer.
        engine.finish(FAREWELL).await;
    }
}

/// Looks whether the VM fits here, and keeps its name; or why not. An earlier migration of it that has just
/// failed may still be ending here: that is waited for.
async fn admit(
    offer: &Offer,
    host: &Arc<dyn Host>,
    settings: &LaunchSettings,
) -> Result<(AcceptedOffer, NameReservation), Vec<String>> {
    let name = Definition::parse(&offer.definition).map(|definition| definition.name);
    let is_coming = || name.as_ref().is_ok_and(|name| host.is_coming(name));
    let deadline = Instant::now() + ENDING_TIMEOUT;
    loop {
        let was_coming = is_coming();
        let refused = match offer_check::check(offer, settings).await {
            Ok(fit) => match NameReservation::make(host, &fit.definition) {
                Ok(reservation) => return Ok((fit, reservation)),
                Err(reason) => vec![reason],
            },
            Err(reasons) => reasons,
        };
        if !was_coming || Instant::now() > deadline {
            return Err(refused);
        }
        tokio::time::sleep(ENDING_POLL_INTERVAL).await;
    }
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
                Err(RelayError::Socket(_) | RelayError::Memory(_)) if timeout(END_TIMEOUT, vm.gone()).await.is_ok() => Err(ended()),
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
                note_resume_state(engine, vm, offer)?;
                decision.note(Stage::Loaded)?;
                *loaded = true;
                engine.send(Control::Loaded);
            }
        }
    }
}

/// Writes down what QEMU forgot at the switch to post-copy, which must be known to resume it.
fn note_resume_state(engine: &Engine, vm: &Vm, offer: &Offer) -> Result<(), String> {
    let Some(forgotten) = engine.take_resume_state() else {
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
    note_resume_state(engine, vm, offer)?;
    let follows = engine.is_post_copy();
    decision.note(Stage::Committed { runs, follows })?;
    engine.release();
    if !runs {
        return Ok(());
    }
    // QEMU answers `cont` at once while it still loads the VM, and may give it up afterwards.
    let deadline = Instant::now() + LOAD_TIMEOUT;
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
        tokio::time::sleep(LOAD_POLL_INTERVAL).await;
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
