//! Takes one VM in.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::broadcast;
use tokio::time::timeout;
use transhume_protocol::link::{Control, Offer};

use super::answer::send;
use super::decision::{Decision, Reservation};
use super::engine::{Engine, FAREWELL, MOST_CONNECTIONS};
use super::host::Host;
use super::journal::Stage;
use super::offer_check::{self, Fit};
use super::outcomes::Outcomes;
use super::post_copy;
use super::preparation::{Prepared, rehearse};
use super::sessions::Open;
use super::{endings, held, run_directory};
use crate::error::{CutOff, RelayError};
use crate::moved_guest;
use crate::storage::shown::Shown;
use transhume_hypervisor::Event;
use transhume_hypervisor::definition::Definition;
use transhume_hypervisor::{self as hypervisor, LaunchSettings, Vm};
use transhume_link::session::{Ready, Session};
use transhume_link::{self as link, Connection};
use transhume_pages::digest::Digester;

/// How long QEMU may take to load the VM once all of it is there, and how often it is looked at.
const LOAD_PATIENCE: Duration = Duration::from_secs(5);
const LOAD_GLANCE: Duration = Duration::from_millis(1);
/// How long an earlier migration of the VM may take to end, and how often it is looked at.
const ENDING_PATIENCE: Duration = Duration::from_secs(2);
const ENDING_GLANCE: Duration = Duration::from_millis(50);
/// How long a QEMU that closed its socket may take to end.
const END_PATIENCE: Duration = Duration::from_secs(2);

/// Answers an offer, and takes the VM if it comes.
pub(crate) async fn take(
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
        tracing::Span::current().record("vm", &definition.name);
        outcomes.sessions.end_earlier(&definition.name, &offer.from);
        held::end_earlier(&definition.name, &offer.from, &host).await;
    }
    let (fit, mut reservation) = match admit(&offer, &host, &settings).await {
        Ok(admitted) => admitted,
        Err(reasons) => return send(&mut connection, &Control::Refused { reasons }),
    };
    let name = fit.definition.name.clone();
    let (mut shown, storage) = match Shown::of(&fit.definition, &settings.host, offer.signs).await {
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
    let begun = transhume_base::task::blocking(move || {
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
    tracing::info!(offer = offer.job, "the migration arrives");
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
    if offer.running {
        moved_guest::of(&vm).note_clock(engine.guest_clock());
    }
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
                endings::forget_when_gone(host.arrivals(), &vm, offer.job);
                match post_copy::complete(&engine, &vm, events).await {
                    Ok(()) => {
                        endings::whole(host.arrivals(), &vm, offer.job);
                        let stalls = post_copy::stalls(vm.qmp(), gate).await;
                        engine.send(Control::Stalled(stalls));
                    }
                    Err(CutOff::GuestEnded(how)) => {
                        post_copy::guest_ended(&engine, host.arrivals(), &vm, offer.job, how).await;
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
                moved_guest::of(&vm).greet(engine.guest_clock());
            }
            decision.end(Stage::Taken);
            if let Err(error) = run_directory::settle(vm.files().folder()) {
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
        let refused = match offer_check::at(offer, settings).await {
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
    let follows = engine.is_post_copy();
    decision.note(Stage::Committed { runs, follows })?;
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
