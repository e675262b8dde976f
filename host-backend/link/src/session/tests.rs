//! Frames arrive once and in order, whatever breaks.

use std::collections::{BTreeMap, VecDeque};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use proptest::prelude::*;
use transhume_protocol::link::{Control, FrameKind, SESSION_FRAME_ROOM, SESSION_WINDOW};

use super::inbox::Inbox;
use super::outbox::{Outbox, Piece, Prepared, Room, Task};
use super::{Ready, Rejoin, Session};
use crate::window::Window;
use crate::{Connection, Error, Frame, Security, TIMEOUT};

const TOKEN: [u8; 16] = [9; 16];

fn frame(kind: FrameKind, payload: Vec<u8>) -> Frame {
    Frame {
        kind,
        payload: payload.into(),
    }
}

/// What may happen between two sides without threads.
#[derive(Debug, Clone)]
enum Step {
    /// A frame of 8 bytes that keeps so many until it is prepared, and for good or not.
    Push(usize, bool),
    /// A connection takes a frame, which then is on its way.
    Send(u64),
    /// The oldest frame on a connection arrives.
    Arrive(u64),
    /// The receiver works a frame off.
    Pop,
    /// The sender hears how many were worked off.
    Acknowledge,
    /// A connection breaks; what was on its way is lost.
    Break(u64),
    /// The same, and the sender hears what had been received.
    Rejoin(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let carrier = 1_u64..4;
    let step = prop_oneof![
        4 => (0_usize..WINDOW * 3 / 2, any::<bool>()).prop_map(|(held, stays)| Step::Push(held, stays)),
        6 => carrier.clone().prop_map(Step::Send),
        6 => carrier.clone().prop_map(Step::Arrive),
        4 => Just(Step::Pop),
        2 => Just(Step::Acknowledge),
        1 => carrier.clone().prop_map(Step::Break),
        1 => carrier.prop_map(Step::Rejoin),
    ];
    prop::collection::vec(step, 0..400)
}

/// Of the model, in bytes.
const WINDOW: usize = 4096;

/// A frame before it is prepared.
#[derive(Clone, Copy)]
struct Raw {
    value: u64,
    held: usize,
    stays: bool,
}

/// A sender, a receiver, and what is on its way.
struct Model {
    outbox: Outbox<Raw>,
    window: Window,
    inbox: Inbox,
    wires: [Vec<(u64, Vec<u8>)>; 4],
    /// What had no room yet.
    pending: VecDeque<Raw>,
    pushed: u64,
    taken: u64,
    /// What each frame keeps, by its number.
    holds: BTreeMap<u64, u64>,
}

impl Model {
    fn new() -> Self {
        Self {
            outbox: Outbox::new(),
            window: Window::new(WINDOW as u64),
            inbox: Inbox::new(),
            wires: Default::default(),
            pending: VecDeque::new(),
            pushed: 0,
            taken: 0,
            holds: BTreeMap::new(),
        }
    }

    fn push(&mut self) -> bool {
        let Some(raw) = self.pending.front().copied() else {
            return false;
        };
        let room = Room::new(8, raw.held);
        if !self.window.try_acquire(room.raw).unwrap() {
            return false;
        }
        self.pending.pop_front();
        self.outbox.push(raw, room);
        self.pushed += 1;
        self.holds.insert(self.pushed, raw.held as u64);
        true
    }

    fn acknowledge(&mut self) -> bool {
        let taken = self.inbox.taken();
        let freed = self.outbox.acknowledge(taken).unwrap();
        self.window.release(freed).unwrap();
        self.holds = self.holds.split_off(&(taken + 1));
        freed > 0
    }

    /// What is kept is in the window, and the window is no wider than it may be.
    fn check(&self) {
        let held: u64 = self.holds.values().sum();
        let out = self.window.out();
        assert!(
            held <= out,
            "{held} bytes are kept, {out} are in the window"
        );
        assert!(out <= WINDOW as u64 || self.holds.len() == 1, "{out} bytes");
    }

    fn send(&mut self, carrier: u64) -> bool {
        let wire = &mut self.wires[usize::try_from(carrier).unwrap()];
        match self.outbox.next(carrier) {
            None => return false,
            Some(Task::Again(number, frame)) => wire.push((number, frame.slices().concat())),
            Some(Task::Fresh(number, raw)) => {
                let payload = raw.value.to_le_bytes().to_vec();
                wire.push((number, payload.clone()));
                let mut frame = Prepared::new(FrameKind::Batch, payload);
                if raw.stays && raw.held >= 8 {
                    let mut kept = raw.value.to_le_bytes().to_vec();
                    kept.resize(raw.held, 0);
                    let own = std::iter::once(0..8).collect();
                    frame.pieces = vec![Piece::Shared(Arc::new(kept), own)];
                }
                self.holds.insert(number, frame.held());
                let surplus = self.outbox.prepared(number, Arc::new(frame));
                self.window.release(surplus).unwrap();
            }
        }
        true
    }

    fn arrive(&mut self, carrier: u64) -> bool {
        let wire = &mut self.wires[usize::try_from(carrier).unwrap()];
        if wire.is_empty() {
            return false;
        }
        let (number, payload) = wire.remove(0);
        self.inbox
            .insert(number, frame(FrameKind::Batch, payload))
            .unwrap();
        true
    }

    fn pop(&mut self) -> bool {
        let Some(frame) = self.inbox.pop() else {
            return false;
        };
        assert_eq!(*frame.payload, self.taken.to_le_bytes());
        self.taken += 1;
        true
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Push(held, stays) => {
                let value = self.pushed + self.pending.len() as u64;
                self.pending.push_back(Raw { value, held, stays });
                self.push();
            }
            Step::Send(carrier) => drop(self.send(carrier)),
            Step::Arrive(carrier) => drop(self.arrive(carrier)),
            Step::Pop => drop(self.pop()),
            Step::Acknowledge => drop(self.acknowledge()),
            Step::Break(carrier) => {
                self.wires[usize::try_from(carrier).unwrap()].clear();
                self.outbox.broken(carrier);
            }
            Step::Rejoin(carrier) => {
                self.wires[usize::try_from(carrier).unwrap()].clear();
                self.outbox.broken(carrier);
                self.outbox.received(self.inbox.received()).unwrap();
            }
        }
    }
}

mod model {
    use super::*;

    proptest! {
        #[test]
        fn every_frame_arrives_once_and_in_order_and_nothing_stalls(steps in steps()) {
            let mut model = Model::new();
            let pushes = steps.iter().filter(|step| matches!(step, Step::Push(..))).count();
            for step in &steps {
                model.step(step);
                model.check();
            }
            // Connection 1 works from now on; the others are over.
            for carrier in 1..4 {
                model.step(&Step::Rejoin(carrier));
            }
            while model.push() | model.send(1) | model.arrive(1) | model.pop() | model.acknowledge() {
                model.check();
            }
            prop_assert_eq!(model.taken, pushes as u64);
            prop_assert!(model.outbox.is_empty());
            prop_assert_eq!(model.window.out(), 0);
        }
    }
}

#[test]
fn false_counts_are_noticed() {
    let mut outbox = Outbox::new();
    outbox.push((), Room::new(100, 0));
    outbox.push((), Room::new(10, 0));
    assert!(outbox.acknowledge(1).is_err());
    let Some(Task::Fresh(1, ())) = outbox.next(1) else {
        panic!("no frame");
    };
    // It is not sent yet.
    assert!(outbox.acknowledge(1).is_err());
    assert!(outbox.received(1).is_err());
    outbox.prepared(1, Arc::new(Prepared::new(FrameKind::Ack, Vec::new())));
    assert_eq!(outbox.acknowledge(1), Ok(100 + SESSION_FRAME_ROOM));
    assert_eq!(outbox.acknowledge(0), Ok(0));
    assert!(outbox.acknowledge(2).is_err());
}

#[test]
fn a_peer_that_ignores_the_window_is_refused() {
    let mut inbox = Inbox::new();
    let mut number = 2;
    let refused = loop {
        let result = inbox.insert(number, frame(FrameKind::Batch, vec![0; 1 << 20]));
        if result.is_err() {
            break result;
        }
        number += 1;
    };
    assert!(refused.is_err() && number << 20 < 2 * SESSION_WINDOW);
    assert!(
        inbox
            .insert(u64::MAX, frame(FrameKind::Ack, Vec::new()))
            .is_err()
    );
}

/// A way between two hosts that can be cut. Connections through it are broken, or none can be made.
struct Way {
    address: String,
    down: Arc<AtomicBool>,
    open: Arc<Mutex<Vec<TcpStream>>>,
}

impl Way {
    fn to(target: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let down = Arc::new(AtomicBool::new(false));
        let open = Arc::new(Mutex::new(Vec::new()));
        let way = Self {
            address,
            down: Arc::clone(&down),
            open: Arc::clone(&open),
        };
        thread::spawn(move || {
            for one in listener.incoming() {
                let one = one.unwrap();
                if down.load(Ordering::SeqCst) {
                    continue;
                }
                let other = TcpStream::connect(&target).unwrap();
                open.lock()
                    .unwrap()
                    .extend([one.try_clone().unwrap(), other.try_clone().unwrap()]);
                for (from, to) in [(&one, &other), (&other, &one)] {
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    thread::spawn(move || carry(from, to));
                }
            }
        });
        way
    }

    fn cut(&self) {
        for stream in self.open.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn carry(mut from: TcpStream, mut to: TcpStream) {
    let mut buffer = [0; 10_000];
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..read]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}

type Both = (Session<Ready>, Session<Ready>, Way);

/// A session between two sides, the first of which connects. `patience` is the second one's too.
fn sessions(connections: u8, patience: Duration) -> Both {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let way = Way::to(listener.local_addr().unwrap().to_string());
    let address = way.address.clone();
    let connecting =
        thread::spawn(move || Connection::open(&address, "hostb", &Security::Plain).unwrap());
    let first = Connection::accept(listener.accept().unwrap().0, &Security::Plain).unwrap();
    let rejoin = Rejoin {
        address: way.address.clone(),
        host: "hostb".into(),
        security: Security::Plain,
        job: 1,
        token: TOKEN,
    };
    let far = Session::begin(first, patience, None, Ready::default).unwrap();
    let near = Session::begin(
        connecting.join().unwrap(),
        patience,
        Some((rejoin, connections)),
        Ready::default,
    )
    .unwrap();
    let joined = far.clone();
    thread::spawn(move || {
        for socket in listener.incoming() {
            let Ok(mut connection) = Connection::accept(socket.unwrap(), &Security::Plain) else {
                continue;
            };
            if let Ok(Control::Join {
                token: TOKEN,
                connection: index,
                received,
                ..
            }) = connection.receive(TIMEOUT)
            {
                let _ = joined.join(index, connection, received);
            }
        }
    });
    (near, far, way)
}

/// Numbered frames of various lengths, from one side to the other.
fn flow(from: &Session<Ready>, to: &Session<Ready>, frames: u32) -> thread::JoinHandle<()> {
    let (from, to) = (from.clone(), to.clone());
    thread::spawn(move || {
        let sending = thread::spawn(move || {
            for n in 0..frames {
                let mut payload = vec![0; 4 + (n as usize * 7919) % 50_000];
                payload[..4].copy_from_slice(&n.to_le_bytes());
                let length = payload.len();
                let frame = Prepared::new(FrameKind::Batch, payload);
                from.send(frame, length, length).unwrap();
            }
        });
        for n in 0..frames {
            let frame = to.receive().unwrap();
            assert_eq!(frame.payload[..4], n.to_le_bytes());
            assert_eq!(frame.payload.len(), 4 + (n as usize * 7919) % 50_000);
        }
        sending.join().unwrap();
    })
}

#[test]
fn a_session_survives_its_connections() {
    for connections in [1, 3] {
        let (near, far, way) = sessions(connections, Duration::from_secs(20));
        let flows = [flow(&near, &far, 3000), flow(&far, &near, 500)];
        for _ in 0..5 {
            thread::sleep(Duration::from_millis(30));
            way.cut();
        }
        for flow in flows {
            flow.join().unwrap();
        }
        assert!(near.breaks() > 0 && far.breaks() > 0);
        near.close();
        assert!(matches!(far.receive(), Err(Error::Session(_))));
    }
}

#[test]
fn a_link_that_stays_away_ends_the_session() {
    let (near, far, way) = sessions(1, Duration::from_secs(1));
    way.down.store(true, Ordering::SeqCst);
    way.cut();
    for session in [near, far] {
        let error = session.receive().unwrap_err();
        assert!(error.to_string().contains("away for 1 seconds"), "{error}");
        assert!(
            session
                .send(Prepared::new(FrameKind::Ack, Vec::new()), 0, 0)
                .is_err()
        );
    }
}

#[test]
fn what_came_before_the_end_counts() {
    let (near, far, _way) = sessions(1, Duration::from_secs(5));
    for n in 0..10 {
        near.send(Prepared::new(FrameKind::Batch, vec![n]), 1, 1)
            .unwrap();
    }
    let first = far.receive().unwrap();
    assert_eq!(*first.payload, [0]);
    thread::sleep(Duration::from_millis(200));
    near.close();
    for n in 1..10 {
        assert_eq!(*far.receive().unwrap().payload, [n]);
    }
    assert!(far.receive().is_err());
}
