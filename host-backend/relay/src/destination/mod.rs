//! The destination's end: looks at an offer, prepares a QEMU, takes memory in, takes the VM over.
//!
//! Contract: this host runs the VM only after the source's commit. Until then every end of a migration,
//! also that of this process, ends in the QEMU being killed that was prepared for it.

mod access;
mod arrivals;
mod attempts;
mod decision;
mod disks;
mod engine;
mod forgotten;
mod gate;
mod held;
mod incoming;
mod look;
#[cfg(test)]
mod models;
mod output;
mod placement;
#[cfg(test)]
mod placement_tests;
mod postcopy;
mod prepared;
mod reads;
mod receive;
mod recovery;
mod reply;
mod resume;
mod sessions;
mod storage;
mod waiting;

pub use arrivals::Arrivals;
pub use recovery::{Left, Recovered, arriving_job, recover};

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use attempts::Attempts;
use sessions::{Open, Sessions};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tracing::{Instrument, field};
use transhume_protocol::link::{Control, Presence};
use waiting::{GREETING, Waiting};

use transhume_base::allocator;
use transhume_base::sync;
use transhume_hypervisor::{Definition, LaunchSettings, Limits, Vm};
use transhume_link::{Connection, PATIENCE, Security};

/// Offers and queries served at once.
const SERVED: usize = 32;
/// Migrations whose end is remembered.
const REMEMBERED: usize = 256;
/// How long a query waits for a migration that is being decided.
const DECISION_PATIENCE: Duration = Duration::from_secs(8);

/// The daemon, as far as arriving VMs need it.
pub trait Host: Send + Sync + 'static {
    /// This host's name.
    fn name(&self) -> &str;
    /// How connections of other hosts are protected.
    fn security(&self) -> Security;
    /// The hosts that this one lists.
    fn peers(&self) -> Vec<&str>;
    /// What VMs from that host may use here.
    ///
    /// # Errors
    /// Why it may send none, with the cure, for people.
    fn may_send(&self, peer: &str) -> Result<Limits, String>;
    /// How VMs are started here.
    fn launch_settings(&self) -> LaunchSettings;
    /// The journal of arriving VMs.
    fn arrivals(&self) -> &Arrivals;
    /// Keeps the name for an arriving VM.
    ///
    /// # Errors
    /// Why the name cannot be had, for people.
    fn reserve(&self, vm: &Definition) -> Result<(), String>;
    /// Notes the VM that arrives by that migration, for when it is committed; `autostart`: it is started with the host.
    ///
    /// # Errors
    /// If it cannot be noted, for people.
    fn expect(&self, vm: &Vm, job: u64, autostart: bool) -> Result<(), String>;
    /// Whether this host has a VM, for another one that asks.
    fn presence(&self, vm: &str) -> Presence;
    /// Whether the name is kept for a VM that has not arrived.
    fn is_coming(&self, vm: &str) -> bool;
    /// Whether this host's daemon is about to end, and begins nothing new.
    fn is_closing(&self) -> bool;
    /// Gives the name back: the VM did not come.
    fn release(&self, vm: &str);
    /// The VM belongs to this host now.
    fn arrived(&self, vm: Arc<Vm>, autostart: bool);
    /// A VM that this host has.
    fn vm(&self, name: &str) -> Option<Arc<Vm>>;
}

/// What became of the last migrations, for a source that asks.
struct Outcomes {
    served: Semaphore,
    attempts: Attempts,
    sessions: Sessions,
    known: Mutex<VecDeque<Migration>>,
}

struct Migration {
    job: u64,
    from: String,
    outcome: watch::Receiver<Option<bool>>,
}

impl Outcomes {
    /// Begins to remember a migration; `true` is sent when the VM was taken, `false` when not.
    fn begin(&self, job: u64, from: &str) -> watch::Sender<Option<bool>> {
        let (sender, outcome) = watch::channel(None);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= REMEMBERED {
            known.pop_front();
        }
        known.push_back(Migration {
            job,
            from: from.to_owned(),
            outcome,
        });
        sender
    }

    /// Whether migrations of that number are known, and all came from other hosts.
    fn is_of_others(&self, job: u64, is_from: impl Fn(&str) -> bool) -> bool {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let mut same = known.iter().filter(|one| one.job == job).peekable();
        same.peek().is_some() && !same.any(|one| is_from(&one.from))
    }

    /// Whether the VM was taken; waits for a migration that is being decided. `None` when it is still
    /// not, or unknown.
    async fn of(&self, job: u64, is_from: impl Fn(&str) -> bool) -> Option<bool> {
        let receiver = {
            let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known
                .iter()
                .rev()
                .find(|one| one.job == job && is_from(&one.from))
                .map(|one| one.outcome.clone())
        };
        let mut receiver = receiver?;
        let decided =
            tokio::time::timeout(DECISION_PATIENCE, receiver.wait_for(Option::is_some)).await;
        match decided {
            Ok(Ok(outcome)) => *outcome,
            // It cannot be decided, or not yet.
            Ok(Err(_)) | Err(_) => None,
        }
    }
}

impl Default for Outcomes {
    fn default() -> Self {
        Self {
            served: Semaphore::new(SERVED),
            attempts: Attempts::default(),
            sessions: Sessions::default(),
            known: Mutex::default(),
        }
    }
}

/// Serves other hosts' daemons. Returns only if the listener fails.
pub async fn serve(listener: TcpListener, host: Arc<dyn Host>) {
    let outcomes = Arc::new(Outcomes::default());
    let waiting = Waiting::default();
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, most likely: wait for some to be closed.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(500)).await;
                continue;
            }
        };
        let (host, outcomes) = (Arc::clone(&host), Arc::clone(&outcomes));
        let waiting = waiting.clone();
        let span = tracing::info_span!("peer", %peer);
        transhume_base::task::spawn(
            async move {
                if let Err(reason) = greet(stream, host, &outcomes, &waiting).await {
                    tracing::warn!(reason, "connection dropped");
                }
            }
            .instrument(span),
        );
    }
}

async fn greet(
    stream: tokio::net::TcpStream,
    host: Arc<dyn Host>,
    outcomes: &Outcomes,
    waiting: &Waiting,
) -> Result<(), String> {
    let address = stream
        .peer_addr()
        .map_or_else(|_| "unknown".to_owned(), |address| address.to_string());
    let stream = stream.into_std().map_err(|error| error.to_string())?;
    let place = waiting.enter(&stream).map_err(|error| error.to_string())?;
    let security = host.security();
    let mut greeted = transhume_base::task::blocking(move || {
        let mut connection = Connection::accept(stream, &security)?;
        let first = connection.receive(PATIENCE)?;
        Ok::<_, transhume_link::Error>((connection, first))
    });
    let greeted = if let Ok(greeted) = tokio::time::timeout(GREETING, &mut greeted).await {
        greeted
    } else {
        // However it went on until now.
        place.end();
        greeted.await
    };
    drop(place);
    let (mut connection, first) = match greeted {
        Ok(Ok(greeted)) => greeted,
        Ok(Err(error)) => {
            let reason = error.to_string();
            access::unserved(&address, &reason);
            return Err(reason);
        }
        Err(error) => return Err(error.to_string()),
    };
    let peer = access::Peer::greet(&connection, &address, &*host);
    let served = outcomes.served.try_acquire();
    match first {
        Control::Offer(_) if served.is_err() => {
            let reasons = vec![format!(
                "{} takes {SERVED} VMs at once already; try again later",
                host.name()
            )];
            send(&mut connection, &Control::Refused { reasons })
        }
        Control::Offer(_) | Control::Resume { .. } if host.is_closing() => {
            let reasons = vec![format!(
                "{}'s transhumed is about to end; try again",
                host.name()
            )];
            send(&mut connection, &Control::Refused { reasons })
        }
        Control::Query { .. } | Control::Resume { .. } if served.is_err() => {
            Err("too many are served at once".to_owned())
        }
        Control::Offer(offer) => {
            let is_from = connection.peer_is(&offer.from);
            match peer.admit(is_from, &offer, &*host).await {
                Ok(()) => {
                    let job = prepared::label(&offer);
                    let span = tracing::info_span!("arrival", vm = field::Empty, job);
                    let taken = incoming::take(connection, *offer, host, outcomes);
                    let taken = taken.instrument(span).await;
                    allocator::give_back();
                    taken
                }
                Err(reasons) => send(&mut connection, &Control::Refused { reasons }),
            }
        }
        Control::Query { job, vm } => {
            let of_others = outcomes.is_of_others(job, |from| connection.peer_is(from));
            peer.may_ask(&vm, of_others, &*host)?;
            outcomes.attempts.end(job);
            let taken = match outcomes.of(job, |from| connection.peer_is(from)).await {
                // It may be from before a restart.
                None => host.arrivals().owns(&vm, job),
                known => known,
            };
            let Some(taken) = taken else {
                let arrival = host.arrivals().of(job).filter(|one| one.vm == vm);
                let Some(held) = arrival.filter(|one| one.stage == arrivals::Stage::Loaded) else {
                    return Ok(());
                };
                return held::serve(connection, held, &host, outcomes).await;
            };
            send(&mut connection, &Control::Outcome { taken })
        }
        Control::Resume {
            job,
            vm,
            connections,
            patience,
        } => {
            let of_others = outcomes.is_of_others(job, |from| connection.peer_is(from));
            peer.may_ask(&vm, of_others, &*host)?;
            let asked = resume::Asked {
                job,
                vm,
                connections,
                patience,
            };
            let served = resume::serve(connection, asked, host, outcomes).await;
            allocator::give_back();
            served
        }
        Control::Locate { vm } => {
            peer.may_ask(&vm, false, &*host)?;
            let presence = host.presence(&vm);
            send(&mut connection, &Control::Located(presence))
        }
        Control::Join {
            job,
            token,
            connection: index,
            received,
        } => {
            let open = outcomes.sessions.of(job).filter(|open| {
                open.token == token && index < open.connections && connection.peer_is(&open.from)
            });
            let Some(Open { session, vm, .. }) = open else {
                let reasons = vec![format!(
                    "{} knows nothing of this migration any more; was its transhumed restarted?",
                    host.name()
                )];
                return send(&mut connection, &Control::Refused { reasons });
            };
            // It goes on as part of that one.
            let span = tracing::info_span!("arrival", vm, offer = job);
            let joined = span.in_scope(|| {
                tracing::info!(index, "a connection joins its migration");
                transhume_base::task::blocking(move || session.join(index, connection, received))
            });
            match joined.await {
                Ok(joined) => joined.map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            }
        }
        _ => Err("it began with no offer, query, resumption or join".to_owned()),
    }
}

fn send(connection: &mut Connection, message: &Control) -> Result<(), String> {
    connection.send(message).map_err(|error| error.to_string())
}
