//! The threads of a session's connections: one that sends, one that receives, and at the source the
//! making of new connections.

use std::sync::Arc;

use std::time::{Duration, Instant};

use transhume_protocol::link::{Control, FrameKind};

use super::core::{Core, Job};
use super::outbox::Carrier;
use super::{Make, Prepare};
use crate::{Connection, Error, REFUSALS, Receiver, Security, Sender};
use transhume_base::task;

/// How long a connection may be silent, the making of one included.
const SILENCE: Duration = Duration::from_secs(6);
/// How long a new connection's answer may take.
const JOIN_TIMEOUT: Duration = Duration::from_secs(3);
/// Between two attempts to connect.
const RETRY_INTERVAL: Duration = Duration::from_millis(200);

/// What it takes to make another connection of a session.
pub struct Rejoin {
    /// `host:port`.
    pub address: String,
    /// The peer's name.
    pub host: String,
    /// How it is protected.
    pub security: Security,
    /// The number of the offer.
    pub job: u64,
    /// The session's.
    pub token: [u8; 16],
}

/// Keeps one connection of a session.
pub(super) struct Keeper<R> {
    pub(super) core: Arc<Core<R>>,
    pub(super) index: u8,
    pub(super) rejoin: Option<Arc<Rejoin>>,
}

impl<R: Send + 'static> Keeper<R> {
    /// Starts the threads. Without a connection one is made.
    pub(super) fn spawn<P: Prepare<Raw = R>>(
        self,
        first: Option<Connection>,
        make: Arc<Make<P>>,
    ) -> Result<(), Error> {
        let keep = move || {
            let mut preparer = make();
            preparer.begin();
            self.keep(first, &mut preparer);
        };
        task::thread("link-out", keep)
            .map(drop)
            .map_err(Error::Broken)
    }

    fn keep<P: Prepare<Raw = R>>(&self, first: Option<Connection>, preparer: &mut P) {
        let mut next = first;
        loop {
            let connection = match (next.take(), &self.rejoin) {
                (Some(connection), _) => Some(connection),
                (None, Some(rejoin)) => self.connect(rejoin),
                (None, None) => None,
            };
            let Some(connection) = connection else { return };
            self.serve(connection, preparer);
            if self.core.is_over() {
                return;
            }
        }
    }

    /// Uses a connection until it breaks or the session is over.
    fn serve<P: Prepare<Raw = R>>(&self, connection: Connection, preparer: &mut P) {
        if let Err(error) = connection.set_patience(SILENCE) {
            tracing::debug!(%error, "patience of a connection");
        }
        let (sender, receiver, closer) = connection.split();
        let Some(carrier) = self.core.attach(self.index, closer.clone()) else {
            return;
        };
        let core = Arc::clone(&self.core);
        let reader = move || receive(&core, carrier, receiver);
        match task::thread("link-in", reader) {
            Ok(reader) => {
                self.send(carrier, sender, preparer);
                if self.core.is_over() {
                    // With unread bytes left a closed socket forgets what it has still to send.
                    closer.close_sending();
                } else {
                    closer.close();
                }
                // It cannot panic; and if it did, the connection is over all the same.
                let _ = reader.join();
                self.core.forget(carrier);
            }
            Err(error) => self.core.broken(carrier, Error::Broken(error)),
        }
    }

    fn send<P: Prepare<Raw = R>>(&self, carrier: Carrier, mut sender: Sender, preparer: &mut P) {
        let core = &self.core;
        loop {
            let before = sender.bytes();
            let sent = match core.next(carrier) {
                Job::Gone => return,
                Job::Bye(numbering) => {
                    // It is over whether the peer hears it or not.
                    let _ = sender.send(FrameKind::Bye, numbering, &[]);
                    return;
                }
                Job::Alive(numbering) => sender.send(FrameKind::Alive, numbering, &[]),
                Job::Again(numbering, frame) => sender.send(frame.kind, numbering, &frame.slices()),
                Job::Fresh(numbering, raw) => {
                    let started = Instant::now();
                    match preparer.prepare(raw, before, sender.backlog()) {
                        Ok(frame) => {
                            let frame = Arc::new(frame);
                            core.prepared(numbering.number, Arc::clone(&frame));
                            let sent = sender.send(frame.kind, numbering, &frame.slices());
                            preparer.sent(started);
                            sent
                        }
                        Err(error) => return core.fail(error),
                    }
                }
            };
            core.count(sender.bytes() - before);
            match sent {
                Ok(()) => {}
                // It was ours to keep to the protocol: another connection would not help.
                Err(error @ Error::Protocol(_)) => return core.fail(error),
                Err(error) => return core.broken(carrier, error),
            }
        }
    }

    /// Makes a new connection, as long as the session goes on.
    fn connect(&self, rejoin: &Rejoin) -> Option<Connection> {
        let core = &self.core;
        let mut refused: Option<Instant> = None;
        while !core.is_over() {
            match self.attempt(rejoin) {
                Ok(Some(connection)) => return Some(connection),
                Ok(None) => return None,
                Err(error) => {
                    tracing::debug!(%error, "no new connection");
                    let since = *refused.get_or_insert_with(Instant::now);
                    if !error.is_refusal() {
                        refused = None;
                    } else if since.elapsed() >= REFUSALS && core.away().is_some() {
                        core.fail(error);
                        return None;
                    }
                }
            }
            core.pause(RETRY_INTERVAL);
        }
        None
    }

    /// Tries once. `None`: the session is over, for the reason that the peer gave.
    fn attempt(&self, rejoin: &Rejoin) -> Result<Option<Connection>, Error> {
        let Rejoin {
            address,
            host,
            security,
            job,
            token,
        } = rejoin;
        let mut connection = Connection::open_within(address, host, security, JOIN_TIMEOUT)?;
        connection.send(&Control::Join {
            job: *job,
            token: *token,
            connection: self.index,
            received: self.core.received(),
        })?;
        match connection.receive(JOIN_TIMEOUT)? {
            Control::Joined { received } => {
                self.core.peer_received(received)?;
                Ok(Some(connection))
            }
            Control::Refused { reasons } => {
                self.core.fail(Error::Forgotten(reasons.join("; ")));
                Ok(None)
            }
            _ => Err(Error::Unexpected("no answer to a join")),
        }
    }
}

fn receive<R>(core: &Core<R>, carrier: Carrier, mut receiver: Receiver) {
    let mut over: Option<Instant> = None;
    loop {
        if core.is_over() && over.get_or_insert_with(Instant::now).elapsed() > SILENCE {
            return;
        }
        let before = receiver.bytes();
        let result = receiver.receive_numbered();
        core.count(receiver.bytes() - before);
        match result {
            Ok((frame, numbering)) => {
                if let Err(error) = core.arrive(frame, numbering) {
                    return core.fail(error);
                }
            }
            Err(error @ Error::Protocol(_)) => return core.fail(error),
            Err(error) => return core.broken(carrier, error),
        }
    }
}
