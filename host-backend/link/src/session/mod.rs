//! A session: frames in order between two hosts, over connections that may break.
//!
//! Each frame is kept until the peer has worked it off. When a connection breaks, what it carried goes
//! over another one, or over the one that the source makes in its place: nothing starts over. Only when
//! there was no connection at all for longer than the session's patience it fails. What is kept and what
//! is on its way is bounded by [`SESSION_WINDOW`](transhume_protocol::link::SESSION_WINDOW).

mod connections;
mod core;
#[cfg(test)]
mod core_models;
mod inbox;
mod outbox;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use self::connections::Keeper;
pub use self::connections::Rejoin;
use self::core::Core;
pub use self::outbox::{Piece, Prepared};
use super::{Backlog, Closer, Connection, Error, Frame, sync, window};

/// Makes frames ready to be sent; one for each connection, in its thread.
pub trait Prepare: Send + 'static {
    /// A frame before.
    type Raw: Send + 'static;

    /// Called once, in the connection's thread.
    fn begin(&mut self) {}

    /// Makes a frame ready. `sent`: bytes that the connection was given so far, of which the kernel has
    /// `backlog`. The payload is no longer than was announced to [`Session::send`].
    fn prepare(&mut self, raw: Self::Raw, sent: u64, backlog: Backlog) -> Result<Prepared, Error>;

    /// The frame that was prepared last has been sent since `started`.
    fn sent(&mut self, _started: Instant) {}
}

/// Frames that are ready already.
#[derive(Debug, Clone, Copy, Default)]
pub struct Ready;

impl Prepare for Ready {
    type Raw = Prepared;

    fn prepare(&mut self, raw: Prepared, _: u64, _: Backlog) -> Result<Prepared, Error> {
        Ok(raw)
    }
}

type Make<P> = dyn Fn() -> P + Send + Sync;

/// See the module. Its clones are the same session.
pub struct Session<P: Prepare> {
    core: Arc<Core<P::Raw>>,
    make: Arc<Make<P>>,
}

impl<P: Prepare> Clone for Session<P> {
    fn clone(&self) -> Self {
        Self {
            core: Arc::clone(&self.core),
            make: Arc::clone(&self.make),
        }
    }
}

impl<P: Prepare> Session<P> {
    /// Makes a session of a connection whose handshake is over. It lives without any for `patience`.
    /// With `rejoin` this side makes new connections for those that break, and up to `connections` of
    /// them from the start; the other side has them joined.
    ///
    /// # Errors
    /// If a thread cannot be started.
    pub fn begin(
        connection: Connection,
        patience: Duration,
        rejoin: Option<(Rejoin, u8)>,
        make: impl Fn() -> P + Send + Sync + 'static,
    ) -> Result<Self, Error> {
        let session = Self {
            core: Arc::new(Core::new(patience)),
            make: Arc::new(make),
        };
        let (rejoin, connections) = match rejoin {
            Some((rejoin, connections)) => (Some(Arc::new(rejoin)), connections),
            None => (None, 1),
        };
        let mut first = Some(connection);
        for index in 0..connections.max(1) {
            let keeper = Keeper {
                core: Arc::clone(&session.core),
                index,
                rejoin: rejoin.clone(),
            };
            keeper.spawn(first.take(), Arc::clone(&session.make))?;
        }
        Ok(session)
    }

    /// Takes a connection that the peer made for one that broke, or as a further one, and answers it.
    /// `received`: by the peer's word. Blocks for as long as the answer takes.
    ///
    /// # Errors
    /// If the connection breaks at once, or the peer's count is wrong.
    pub fn join(&self, index: u8, mut connection: Connection, received: u64) -> Result<(), Error> {
        self.core.displace(index);
        self.core.peer_received(received)?;
        connection.send(&transhume_protocol::link::Control::Joined {
            received: self.core.received(),
        })?;
        let keeper = Keeper {
            core: Arc::clone(&self.core),
            index,
            rejoin: None,
        };
        keeper.spawn(Some(connection), Arc::clone(&self.make))
    }

    /// Sends a frame behind all others; waits until it is about to be sent. `length`: of its payload, in
    /// bytes, at most. `held`: bytes of memory that it keeps before it is prepared, and after that at most.
    /// The window is as wide as what is kept.
    ///
    /// # Errors
    /// If the session is over.
    pub fn send(&self, raw: P::Raw, length: usize, held: usize) -> Result<(), Error> {
        self.core.push(raw, length, held)
    }

    /// Waits until the peer has worked off all that was sent, so long at most.
    pub fn drain(&self, patience: Duration) {
        self.core.drain(patience);
    }

    /// From now on there may be no connection for so long.
    pub fn set_patience(&self, patience: Duration) {
        self.core.set_patience(patience);
    }

    /// Receives the next frame. What came before the session's end is still handed out.
    ///
    /// # Errors
    /// If the session is over, or there was no connection for too long.
    pub fn receive(&self) -> Result<Frame, Error> {
        self.core.receive()
    }

    /// For how long there has been no connection; none while there is one.
    pub fn away(&self) -> Option<Duration> {
        self.core.away()
    }

    /// How many connections broke so far.
    pub fn breaks(&self) -> u32 {
        self.core.breaks()
    }

    /// Bytes sent and received so far, framing included.
    pub fn bytes(&self) -> u64 {
        self.core.bytes.load(Ordering::Relaxed)
    }

    /// Whether it has ended.
    pub fn is_over(&self) -> bool {
        self.core.is_over()
    }

    /// Ends the session, and tells the peer if it can be reached.
    pub fn close(&self) {
        self.core.close();
    }

    /// After [`Session::close`]: waits until the peer was told, so long at most.
    pub fn wait_for_end(&self, patience: Duration) {
        self.core.wait_for_end(patience);
    }
}
