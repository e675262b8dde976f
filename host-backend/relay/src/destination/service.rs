//! What this host does for others: takes VMs in, says what became of them, and where a VM is.

use std::sync::Arc;

use tokio::net::TcpListener;
use tracing::{Instrument, field};
use transhume_protocol::link::{Control, Offer};

use super::answer::{refuse, send};
use super::host::Host;
use super::journal::Stage;
use super::outcomes::Outcomes;
use super::peer_access::Peer;
use super::run_directory::label;
use super::{held, incoming, peer_access, resume};
use transhume_base::allocator;
use transhume_link::Connection;
use transhume_link::server::{Arrived, MAX_SERVED, Served, Server, Service};

/// Serves other hosts' daemons. Does not return.
pub async fn serve(listener: TcpListener, host: Arc<dyn Host>) {
    let outcomes = Arc::new(Outcomes::default());
    let (secured, listed) = (Arc::clone(&host), Arc::clone(&host));
    let server = Server {
        name: host.name().to_owned(),
        security: Box::new(move || secured.security()),
        name_of: Box::new(move |connection| peer_access::name_of(connection, &*listed)),
        sessions: outcomes.sessions.clone(),
        services: vec![
            Box::new(Migrations {
                host: Arc::clone(&host),
                outcomes,
            }),
            Box::new(Whereabouts { host }),
        ],
    };
    server.serve(listener).await;
}

/// Takes VMs in, and says what became of them.
struct Migrations {
    host: Arc<dyn Host>,
    outcomes: Arc<Outcomes>,
}

impl Service for Migrations {
    fn takes(&self, first: &Control) -> bool {
        matches!(
            first,
            Control::Offer(_) | Control::Query { .. } | Control::Resume { .. }
        )
    }

    fn serve(&self, arrived: Arrived) -> Served<'_> {
        Box::pin(self.answer(arrived))
    }
}

impl Migrations {
    async fn answer(&self, arrived: Arrived) -> Result<(), String> {
        let Arrived {
            mut connection,
            first,
            address,
            // Held as long as this is served.
            permit,
        } = arrived;
        let (host, outcomes) = (&self.host, &*self.outcomes);
        let peer = Peer::greet(&connection, &address, &**host);
        match first {
            Control::Offer(_) if permit.is_none() => {
                let busy = format!(
                    "{} takes {MAX_SERVED} VMs at once already; try again later",
                    host.name()
                );
                refuse(&mut connection, vec![busy])
            }
            Control::Offer(_) | Control::Resume { .. } if host.is_closing() => {
                let closing = format!("{}'s transhumed is about to end; try again", host.name());
                refuse(&mut connection, vec![closing])
            }
            _ if permit.is_none() => Err("too many are served at once".to_owned()),
            Control::Offer(offer) => {
                take_offer(connection, *offer, &peer, Arc::clone(host), outcomes).await
            }
            Control::Query { job, vm } => {
                may_ask_of(&connection, job, &vm, &peer, &**host, outcomes)?;
                tell_outcome(connection, job, vm, host, outcomes).await
            }
            Control::Resume {
                job,
                vm,
                connections,
                patience,
            } => {
                may_ask_of(&connection, job, &vm, &peer, &**host, outcomes)?;
                let asked = resume::Asked {
                    job,
                    vm,
                    connections,
                    patience,
                };
                let served = resume::serve(connection, asked, Arc::clone(host), outcomes).await;
                allocator::give_back();
                served
            }
            _ => Err("it began with no offer, query or resumption".to_owned()),
        }
    }
}

/// Says whether this host has a VM.
struct Whereabouts {
    host: Arc<dyn Host>,
}

impl Service for Whereabouts {
    fn takes(&self, first: &Control) -> bool {
        matches!(first, Control::Locate { .. })
    }

    fn serve(&self, arrived: Arrived) -> Served<'_> {
        Box::pin(async move {
            let Arrived {
                mut connection,
                first,
                address,
                ..
            } = arrived;
            let Control::Locate { vm } = first else {
                return Err("it asked for no VM".to_owned());
            };
            let peer = Peer::greet(&connection, &address, &*self.host);
            peer.may_ask(&vm, false, &*self.host)?;
            let presence = self.host.presence(&vm);
            send(&mut connection, &Control::Located(presence))
        })
    }
}

/// Whether the peer may ask of a migration of that number, and that VM.
fn may_ask_of(
    connection: &Connection,
    job: u64,
    vm: &str,
    peer: &Peer,
    host: &dyn Host,
    outcomes: &Outcomes,
) -> Result<(), String> {
    let of_others = outcomes.is_of_others(job, |from| connection.peer_is(from));
    peer.may_ask(vm, of_others, host)
}

async fn take_offer(
    mut connection: Connection,
    offer: Offer,
    peer: &Peer,
    host: Arc<dyn Host>,
    outcomes: &Outcomes,
) -> Result<(), String> {
    let is_from = connection.peer_is(&offer.from);
    if let Err(reasons) = peer.admit(is_from, &offer, &*host).await {
        return refuse(&mut connection, reasons);
    }
    let job = label(&offer);
    let span = tracing::info_span!("arrival", vm = field::Empty, job);
    let taken = incoming::take(connection, offer, host, outcomes);
    let taken = taken.instrument(span).await;
    allocator::give_back();
    taken
}

/// Tells a source what became of a migration, whose session it has given up.
async fn tell_outcome(
    mut connection: Connection,
    job: u64,
    vm: String,
    host: &Arc<dyn Host>,
    outcomes: &Outcomes,
) -> Result<(), String> {
    outcomes.attempts.end(job);
    let taken = match outcomes.of(job, |from| connection.peer_is(from)).await {
        // It may be from before a restart.
        None => host.arrivals().owns(&vm, job),
        known => known,
    };
    let Some(taken) = taken else {
        let arrival = host.arrivals().of(job).filter(|one| one.vm == vm);
        let Some(held) = arrival.filter(|one| one.stage == Stage::Loaded) else {
            return Ok(());
        };
        return held::serve(connection, held, host, outcomes).await;
    };
    send(&mut connection, &Control::Outcome { taken })
}
