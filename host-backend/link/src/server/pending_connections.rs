//! Connections whose first message has not come: few at once, and none for long. When there are too many, the
//! oldest goes for the newest: those of hosts that have something to say are never the oldest for long.

use std::collections::VecDeque;
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Such connections, at most.
const LIMIT: usize = 32;
/// How long the first message may take, the handshake included.
pub(super) const GREETING_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Default)]
struct State {
    /// The last number that was given.
    numbers: u64,
    sockets: VecDeque<(u64, Arc<TcpStream>)>,
}

/// See the module.
#[derive(Clone, Default)]
pub(super) struct PendingConnections(Arc<Mutex<State>>);

/// One of them, until this is dropped.
pub(super) struct Slot {
    waiting: PendingConnections,
    number: u64,
    socket: Arc<TcpStream>,
}

impl PendingConnections {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a connection, and ends the oldest one if there are too many.
    ///
    /// # Errors
    /// If the socket cannot be referred to twice.
    pub(super) fn enter(&self, socket: &TcpStream) -> std::io::Result<Slot> {
        let socket = Arc::new(socket.try_clone()?);
        let mut state = self.lock();
        if state.sockets.len() >= LIMIT
            && let Some((_, oldest)) = state.sockets.pop_front()
        {
            shut(&oldest);
        }
        state.numbers += 1;
        let number = state.numbers;
        state.sockets.push_back((number, Arc::clone(&socket)));
        drop(state);
        Ok(Slot {
            waiting: self.clone(),
            number,
            socket,
        })
    }
}

impl Slot {
    /// Ends the connection: whoever waits for it gets an error.
    pub(super) fn end(&self) {
        shut(&self.socket);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut state = self.waiting.lock();
        state.sockets.retain(|(number, _)| *number != self.number);
    }
}

fn shut(socket: &TcpStream) {
    // Fails only when it is closed already.
    let _ = socket.shutdown(Shutdown::Both);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::net::TcpListener;

    #[test]
    fn the_oldest_goes_for_the_newest() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let waiting = PendingConnections::default();
        let connect = || {
            let far = TcpStream::connect(address).unwrap();
            let (near, _) = listener.accept().unwrap();
            let place = waiting.enter(&near).unwrap();
            (far, near, place)
        };
        let is_open = |mut far: &TcpStream| {
            far.set_nonblocking(true).unwrap();
            far.read(&mut [0]).is_err()
        };
        let greeted = connect();
        let mut all: Vec<_> = (1..LIMIT).map(|_| connect()).collect();
        // Whoever has spoken is none of them any more.
        let (spoken, _near, place) = greeted;
        drop(place);
        all.push(connect());
        assert!(all.iter().all(|(far, ..)| is_open(far)));
        all.push(connect());
        assert!(is_open(&spoken));
        assert!(!is_open(&all[0].0));
        assert!(all[1..].iter().all(|(far, ..)| is_open(far)));
        all[1].2.end();
        assert!(!is_open(&all[1].0) && is_open(&all[2].0));
    }
}
