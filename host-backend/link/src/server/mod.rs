//! The one door for other hosts: accepts their connections, hears who they are and what they want, and hands each to the
//! service that takes it. Connections that join a session are its own business.

mod pending_connections;
mod sessions;

pub use sessions::{Claim, Entry, Open, Sessions};

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::Instrument as _;
use transhume_base::audit::{self, Who};
use transhume_base::task;
use transhume_protocol::link::Control;

use crate::{Connection, Security, TIMEOUT};
use pending_connections::{GREETING_TIMEOUT, PendingConnections};

/// Connections that services serve at once, of those that they bound.
pub const MAX_SERVED: usize = 32;
/// How long nothing is accepted after that failed: most likely descriptors are short.
const ACCEPT_PAUSE: Duration = Duration::from_millis(500);

/// What a service does with a connection; an error is why it was dropped.
pub type Served<'a> = Pin<Box<dyn Future<Output = Result<(), String>> + Send + 'a>>;

/// Tells what a connection's peer is called, if that is known.
pub type NameOf = dyn Fn(&Connection) -> Option<String> + Send + Sync;

/// A connection of another host that has said what it wants.
pub struct Arrived {
    /// Who it is, and the way to answer.
    pub connection: Connection,
    /// What it said first.
    pub first: Control,
    /// Where it comes from.
    pub address: String,
    /// Held while it is served by a service that bounds how many it serves at once; none is left when there are
    /// [`MAX_SERVED`] of them.
    pub permit: Option<OwnedSemaphorePermit>,
}

/// What a host does for others.
pub trait Service: Send + Sync + 'static {
    /// Whether it is for this service what begins so.
    fn takes(&self, first: &Control) -> bool;

    /// Serves one.
    fn serve(&self, arrived: Arrived) -> Served<'_>;
}

/// See the module.
pub struct Server {
    /// This host's name.
    pub name: String,
    /// How connections are protected, asked for each: certificates can be renewed meanwhile.
    pub security: Box<dyn Fn() -> Security + Send + Sync>,
    /// What a connection's peer is called, where its certificate is for a host that this one lists.
    pub name_of: Box<NameOf>,
    /// Those that connections may join.
    pub sessions: Sessions,
    /// The first that takes a connection serves it.
    pub services: Vec<Box<dyn Service>>,
}

impl Server {
    /// Serves other hosts. Does not return.
    pub async fn serve(self, listener: TcpListener) {
        let server = Arc::new(self);
        let pending = PendingConnections::default();
        let permits = Arc::new(Semaphore::new(MAX_SERVED));
        loop {
            let (stream, peer) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let (server, pending) = (Arc::clone(&server), pending.clone());
            let permits = Arc::clone(&permits);
            let serving = async move {
                if let Err(reason) = server.take(stream, &pending, permits).await {
                    tracing::warn!(reason, "connection dropped");
                }
            };
            task::spawn(serving.instrument(tracing::info_span!("peer", %peer)));
        }
    }

    /// Hears the first word of a connection, and has done what it asks for.
    async fn take(
        &self,
        stream: TcpStream,
        pending: &PendingConnections,
        permits: Arc<Semaphore>,
    ) -> Result<(), String> {
        let address = stream
            .peer_addr()
            .map_or_else(|_| "unknown".to_owned(), |address| address.to_string());
        let (connection, first) = self.hear(stream, &address, pending).await?;
        if let Control::Join {
            job,
            token,
            connection: index,
            received,
        } = first
        {
            return self
                .join(connection, &address, job, token, index, received)
                .await;
        }
        let Some(service) = self.services.iter().find(|one| one.takes(&first)) else {
            let reason = "it began with nothing that this host does for others";
            self.note(&connection, &address, Err(reason));
            return Err(reason.to_owned());
        };
        let arrived = Arrived {
            connection,
            first,
            address,
            permit: permits.try_acquire_owned().ok(),
        };
        service.serve(arrived).await
    }

    /// The first word of a connection, if it comes soon enough.
    async fn hear(
        &self,
        stream: TcpStream,
        address: &str,
        pending: &PendingConnections,
    ) -> Result<(Connection, Control), String> {
        let stream = stream.into_std().map_err(|error| error.to_string())?;
        let slot = pending.enter(&stream).map_err(|error| error.to_string())?;
        let security = (self.security)();
        let mut heard = task::blocking(move || {
            let mut connection = Connection::accept(stream, &security)?;
            let first = connection.receive(TIMEOUT)?;
            Ok::<_, crate::Error>((connection, first))
        });
        let heard = if let Ok(heard) = tokio::time::timeout(GREETING_TIMEOUT, &mut heard).await {
            heard
        } else {
            // However it went on until now.
            slot.end();
            heard.await
        };
        drop(slot);
        match heard {
            Ok(Ok(heard)) => Ok(heard),
            Ok(Err(error)) => {
                let reason = error.to_string();
                let who = Who::Peer {
                    name: None,
                    proven: false,
                    address,
                };
                audit::note(who, "connection", None, Err(&reason));
                Err(reason)
            }
            Err(error) => Err(error.to_string()),
        }
    }

    /// Notes in the audit who connected, and whether it gets what it wants.
    fn note(&self, connection: &Connection, address: &str, verdict: Result<(), &str>) {
        let name = (self.name_of)(connection);
        let who = Who::Peer {
            name: name.as_deref(),
            proven: name.is_some(),
            address,
        };
        audit::note(who, "connection", None, verdict);
    }

    /// Makes a connection one of a session's, if it is by whom that is with.
    async fn join(
        &self,
        mut connection: Connection,
        address: &str,
        job: u64,
        token: [u8; 16],
        index: u8,
        received: u64,
    ) -> Result<(), String> {
        let open = self.sessions.of(job).filter(|open| {
            open.token == token && index < open.connections && connection.peer_is(&open.from)
        });
        let Some(open) = open else {
            let reason = "it joins a migration that is not known";
            self.note(&connection, address, Err(reason));
            let reasons = vec![format!(
                "{} knows nothing of this migration any more; was its transhumed restarted?",
                self.name
            )];
            let refused = connection.send(&Control::Refused { reasons });
            return refused.map_err(|error| error.to_string());
        };
        self.note(&connection, address, Ok(()));
        let Open { session, vm, .. } = open;
        // It goes on as part of that one.
        let span = tracing::info_span!("arrival", vm, offer = job);
        let joined = span.in_scope(|| {
            tracing::info!(index, "a connection joins its migration");
            task::blocking(move || session.join(index, connection, received))
        });
        match joined.await {
            Ok(joined) => joined.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        }
    }
}
