//! Serves other hosts: offers, queries, resumptions and joins.

use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tracing::{Instrument, field};
use transhume_protocol::link::Control;

use super::answer::send;
use super::host::Host;
use super::journal::Stage;
use super::outcomes::{Outcomes, SERVED};
use super::run_directory::label;
use super::sessions::Open;
use super::waiting::{GREETING, Waiting};
use super::{held, incoming, peer_access, resume};
use transhume_base::allocator;
use transhume_link::{Connection, PATIENCE};

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
            peer_access::unserved(&address, &reason);
            return Err(reason);
        }
        Err(error) => return Err(error.to_string()),
    };
    let peer = peer_access::Peer::greet(&connection, &address, &*host);
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
                    let job = label(&offer);
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
                let Some(held) = arrival.filter(|one| one.stage == Stage::Loaded) else {
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
