//! What a guest's users ask it for, from a namespace of their own: values of a key-value store, files of a web
//! server.
//!
//! Each connection sends its next request when it has the answer to the last. Every answer is compared with what it
//! must be. The connections live through the migration.
//!
//! Servers alone write little memory. So that some of it is absent when the guest is handed over, a job works beside
//! them from the command until the guest has moved: it moves the store's values to fresh memory, or has the page cache read anew.
//! Neither the pace before nor that after it has the job in it.

mod store;
mod web;

pub(super) use store::Store;
pub(super) use web::{Pieces, Web};

use super::course::Course;
use crate::bench::measure::as_f64;
use crate::hosts::{GUEST, Users};
use crate::qemu::serial::{Console, Side as At};
use crate::{Error, Result};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

/// Connections at a time.
pub(super) const CONNECTIONS: u64 = 4;
/// How often requests are counted.
const EVERY: Duration = Duration::from_millis(20);
/// What a server may take until it listens, and what it may take for one answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// MiB a second of its page cache that the guest reads anew.
const RENEWED: u64 = 120;

/// One connection's way of asking.
pub(super) trait Client: Send + 'static {
    /// Asks once, and compares the answer.
    fn ask(&mut self) -> io::Result<()>;
    /// Compares all that it knows of; how many things were right.
    fn check(&mut self) -> io::Result<u64>;
}

/// Users, and what else asks beside them.
pub(super) type Clients = (Vec<Box<dyn Client>>, Vec<Box<dyn Client>>);

/// Users at work.
pub(super) struct Traffic {
    over: Arc<AtomicBool>,
    clients: Vec<JoinHandle<io::Result<Box<dyn Client>>>>,
    counter: Option<JoinHandle<()>>,
    points: Arc<Mutex<Vec<(SystemTime, f64)>>>,
    /// What stands beside the users may work.
    job: Arc<AtomicBool>,
}

/// An answer that is not what it must be.
fn wrong(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

fn failed(error: io::Error) -> Error {
    Error::system("be served by the guest")(error)
}

/// Connects to the guest, as soon as it listens there.
fn connect(users: &Users, port: u16) -> Result<TcpStream> {
    let address = GUEST.split('/').next().unwrap_or_default();
    let address: IpAddr = address
        .parse()
        .map_err(|_| Error::Check(format!("{address} is no address")))?;
    let begun = Instant::now();
    loop {
        let one = || TcpStream::connect_timeout(&SocketAddr::new(address, port), PATIENCE);
        match users.inside(one)? {
            Ok(stream) => {
                let set = stream
                    .set_nodelay(true)
                    .and_then(|()| stream.set_read_timeout(Some(PATIENCE)))
                    .and_then(|()| stream.set_write_timeout(Some(PATIENCE)));
                return set.map(|()| stream).map_err(failed);
            }
            Err(error) if begun.elapsed() > PATIENCE => return Err(failed(error)),
            Err(_) => {
                crate::cleanup::still_time()?;
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

impl Traffic {
    /// Lets clients ask until it is ended. The requests of those beside them do not count.
    pub(super) fn start((clients, beside): Clients, console: &Console) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let job = Arc::new(AtomicBool::new(false));
        let count = Arc::new(AtomicU64::new(0));
        let points = Arc::new(Mutex::new(Vec::new()));
        let always = Arc::new(AtomicBool::new(true));
        let users = clients.into_iter().map(|client| (client, 1, &always));
        let clients = users
            .chain(beside.into_iter().map(|client| (client, 0, &job)))
            .map(|(mut client, counts, may)| {
                let (over, count) = (Arc::clone(&over), Arc::clone(&count));
                let may = Arc::clone(may);
                std::thread::spawn(move || {
                    while !over.load(Ordering::Relaxed) {
                        if !may.load(Ordering::Relaxed) {
                            std::thread::sleep(EVERY);
                            continue;
                        }
                        client.ask()?;
                        count.fetch_add(counts, Ordering::Relaxed);
                    }
                    Ok(client)
                })
            })
            .collect();
        let (flag, sink) = (Arc::clone(&over), Arc::clone(&points));
        let (console, working) = (console.clone(), Arc::clone(&job));
        let counter = std::thread::spawn(move || {
            while !flag.load(Ordering::Relaxed) {
                if working.load(Ordering::Relaxed) && console.beats_at(At::Destination) {
                    working.store(false, Ordering::Relaxed);
                    // It has just spoken from there, so somebody listens.
                    let _ = console.tell(At::Destination, "renew 0");
                }
                let done = as_f64(count.load(Ordering::Relaxed));
                sink.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push((SystemTime::now(), done));
                std::thread::sleep(EVERY);
            }
        });
        Self {
            over,
            clients,
            counter: Some(counter),
            points,
            job,
        }
    }

    /// Lets the job work until the guest has moved.
    pub(super) fn begin_job(&self, console: &Console) -> Result<()> {
        self.job.store(true, Ordering::Relaxed);
        console.tell(At::Source, &format!("renew {RENEWED}"))
    }

    /// Ends it; what was served when, and how many things were right in the end.
    pub(super) fn end(mut self) -> Result<(Course, u64)> {
        self.stop();
        let mut right = 0;
        for client in self.clients.drain(..) {
            let client = client
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("a thread failed")));
            right += client
                .and_then(|mut client| client.check())
                .map_err(failed)?;
        }
        let points = self.points.lock().unwrap_or_else(PoisonError::into_inner);
        Ok((Course::new(points.clone()), right))
    }

    fn stop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(counter) = self.counter.take() {
            // Nothing depends on how it ended.
            let _ = counter.join();
        }
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.stop();
    }
}
