//! What the source's threads and the one who drives them share.

use std::io::Write;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use transhume_protocol::link::{Control, GuestEnd, Stalls, encode_control};
use transhume_protocol::qemu::Block;
use transhume_protocol::qemu::return_path::{Message, PACKAGE_LOADED};

use super::answers::Answers;
use super::channel::ChannelReader;
use super::clocks::Clocks;
use super::collect::{Collector, Reading};
use super::doubt::Doubt;
use super::flow::Flow;
use super::hints::Hints;
use super::link_rate::LinkRate;
use super::order::Order;
use super::rendezvous::Rendezvous;
use super::requests::Requests;
use super::stream::StreamReader;
use super::transmit::{Packer, Transmitter};
use crate::IN_BETWEEN;
use crate::error::RelayError;
use crate::progress::{Counter, Progress, Traffic};
use crate::threads;
use transhume_hypervisor::stream;
use transhume_link::session::Session;
use transhume_pages::digest::Digester;

/// Who has the VM, as far as it is decided by the stream: post-copy hands it over in the middle.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Hand {
    /// It stays here whatever the stream says.
    #[default]
    Here,
    /// The stream may hand it over.
    Open,
    /// QEMU was told that the devices are loaded at the destination: whether it can still run the VM, it says.
    Told,
    /// It was handed over.
    Over(Instant),
    /// It stays here, for good.
    Withdrawn,
}

#[derive(Default)]
struct State {
    hand: Hand,
    /// The stream could hand it over at one time.
    opened: bool,
    /// The destination has loaded the devices.
    loaded: bool,
    /// The destination waits for the link however long it is away.
    endures: bool,
    /// The VM goes over to post-copy as soon as it can.
    near: bool,
    /// QEMU's end of its socket, until the stream may hand the VM over.
    theirs: Option<OwnedFd>,
    /// What post-copy cost the guest.
    stalls: Option<Stalls>,
    /// The first error.
    failure: Option<RelayError>,
    /// The destination's answer to the commit: its reason if it did not take the VM.
    answer: Option<Result<(), String>>,
    /// The stream was read to its end and sent.
    memory_sent: Option<Instant>,
    /// What the guest did at the destination, if it has ended there.
    guest_ended: Option<GuestEnd>,
    /// A `SWITCHOVER_ACK` that waits to be passed on.
    switchover: Option<Vec<u8>>,
}

/// The sockets into which QEMU migrates.
pub(super) struct Sockets {
    pub(super) stream: UnixStream,
    /// Those of its channels, if it has some.
    pub(super) channels: Vec<UnixStream>,
}

/// See the module.
pub(super) struct Shared {
    pub(super) flow: Arc<Flow>,
    pub(super) hints: Arc<Hints>,
    pub(super) order: Arc<Order>,
    pub(super) progress: Arc<Progress>,
    /// What had moved before: more than nothing where post-copy goes on after a break.
    before: Traffic,
    /// What the guest waits for, in post-copy.
    pub(super) requests: Requests,
    /// Whether both hosts have the same storage, where memory may come from it.
    pub(super) doubt: Option<Arc<Doubt>>,
    qemu: Sockets,
    /// QEMU keeps the VM until it is told that its devices are loaded at the destination.
    keeps_until_loaded: bool,
    /// Where the readers of stream and channels meet.
    rendezvous: Option<Arc<Rendezvous>>,
    /// Held while a message is written: messages must not mix.
    telling: Mutex<()>,
    session: Session<Packer>,
    rate: Arc<LinkRate>,
    pub(super) clocks: Arc<Clocks>,
    state: Mutex<State>,
    changed: Notify,
}

impl Shared {
    #[expect(clippy::too_many_arguments, reason = "they are its fields")]
    pub(super) fn new(
        flow: Arc<Flow>,
        hints: Arc<Hints>,
        order: Arc<Order>,
        progress: Arc<Progress>,
        qemu: Sockets,
        session: Session<Packer>,
        rate: Arc<LinkRate>,
        keeps_until_loaded: bool,
        doubt: Option<Doubt>,
        clocks: Arc<Clocks>,
    ) -> Self {
        let channels = qemu.channels.len();
        let before = progress.traffic();
        Self {
            before,
            flow,
            hints,
            order,
            progress,
            requests: Requests::default(),
            doubt: doubt.map(Arc::new),
            qemu,
            keeps_until_loaded,
            rendezvous: (channels > 0).then(|| Arc::new(Rendezvous::new(channels))),
            telling: Mutex::new(()),
            session,
            rate,
            clocks,
            state: Mutex::default(),
            changed: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the threads on the stream of a post-copy that is resumed, and a link. The VM was handed over.
    pub(super) fn resume(
        self: &Arc<Self>,
        section: u32,
        blocks: Vec<Block>,
    ) -> Result<(), RelayError> {
        self.lock().hand = Hand::Over(Instant::now());
        let longest = blocks.iter().map(|block| block.length).max();
        let reading = Arc::new(Reading::new(Arc::clone(self)));
        // Nothing is compared any more.
        let collector = Collector::new(reading, Digester::new(&[0; 16]), false);
        let stream = self.qemu.stream.try_clone().map_err(RelayError::Socket)?;
        let reader = StreamReader::resumed(stream, collector, section, blocks);
        let transmitter = Transmitter::new(self.session.clone(), Arc::clone(self));
        let answers = Answers::resumed(
            self.session.clone(),
            Arc::clone(self),
            longest.unwrap_or_default(),
        );
        self.spawn("relay-stream", move || reader.run())?;
        self.spawn("relay-link-out", move || transmitter.run())?;
        self.spawn("relay-link-in", move || answers.run())
    }

    /// Starts the threads on a stream and a link.
    pub(super) fn start(self: &Arc<Self>, digester: &Digester) -> Result<(), RelayError> {
        let reading = Arc::new(Reading::new(Arc::clone(self)));
        let socket = |socket: &UnixStream| socket.try_clone().map_err(RelayError::Socket);
        let collector = || {
            let reading = Arc::clone(&reading);
            Collector::new(reading, digester.clone(), self.rendezvous.is_some())
        };
        let stream = socket(&self.qemu.stream)?;
        let reader = StreamReader::new(stream, collector(), self.rendezvous.clone());
        let transmitter = Transmitter::new(self.session.clone(), Arc::clone(self));
        let answers = Answers::new(self.session.clone(), Arc::clone(self));
        for (channel, rendezvous) in self
            .qemu
            .channels
            .iter()
            .zip(self.rendezvous.iter().cycle())
        {
            let rendezvous = Arc::clone(rendezvous);
            let channel = ChannelReader::new(socket(channel)?, collector(), rendezvous);
            self.spawn("relay-channel", move || channel.run())?;
        }
        if let Some(doubt) = self.doubt.clone() {
            let shared = Arc::clone(self);
            self.spawn("relay-doubt", move || match doubt.run(&shared) {
                // It was handed over while the destination did not answer.
                Err(_) if shared.is_over() => Ok(()),
                result => result,
            })?;
        }
        self.spawn("relay-stream", move || reader.run())?;
        self.spawn("relay-link-out", move || transmitter.run())?;
        self.spawn("relay-link-in", move || answers.run())
    }

    /// Waits until doubts about storage are looked into: before a hand-over. The relay fails where it is not the same.
    pub(super) async fn settle_doubts(&self) {
        if let Some(doubt) = self.doubt.clone() {
            // It waits for a bounded time, and does not panic.
            let _ = transhume_base::task::blocking(move || doubt.settle()).await;
        }
    }

    fn spawn(
        self: &Arc<Self>,
        name: &str,
        run: impl FnOnce() -> Result<(), RelayError> + Send + 'static,
    ) -> Result<(), RelayError> {
        let shared = Arc::clone(self);
        threads::spawn(name, run, move |error| shared.stop(error))
    }

    /// Ends the relay. QEMU's sockets close, so that its migration fails if it was not complete.
    pub(super) fn stop(&self, error: RelayError) {
        let mut state = self.lock();
        if state.failure.is_none() {
            if !matches!(error, RelayError::Stopped) {
                tracing::debug!(%error, "relay stops");
            }
            state.failure = Some(error);
        }
        drop(state);
        self.lock().theirs = None;
        self.flow.stop();
        self.session.close();
        if let Some(doubt) = &self.doubt {
            doubt.stop();
        }
        if let Some(rendezvous) = &self.rendezvous {
            rendezvous.close();
        }
        // QEMU may have to be told something before it can take the VM back: see `take_back`.
        let waits = {
            let state = self.lock();
            let told = matches!(state.hand, Hand::Told | Hand::Over(_));
            self.keeps_until_loaded && state.opened && !told
        };
        self.shut(if waits {
            Shutdown::Read
        } else {
            Shutdown::Both
        });
        self.changed.notify_waiters();
    }

    fn shut(&self, how: Shutdown) {
        for socket in self.qemu.channels.iter().chain([&self.qemu.stream]) {
            // Fails only when QEMU has closed it already.
            let _ = socket.shutdown(how);
        }
    }

    /// Tells QEMU nothing more.
    pub(super) fn hang_up(&self) {
        self.shut(Shutdown::Both);
    }

    /// Whether QEMU keeps the VM until it is told that its devices are loaded at the destination.
    pub(super) fn keeps_until_loaded(&self) -> bool {
        self.keeps_until_loaded
    }

    /// Whether the destination may hold the VM, loaded, and the VM may still stay here.
    pub(super) fn may_be_held(&self) -> bool {
        let state = self.lock();
        self.keeps_until_loaded && state.opened && !matches!(state.hand, Hand::Over(_))
    }

    pub(super) fn set_loaded(&self) {
        self.lock().loaded = true;
        self.changed.notify_waiters();
    }

    /// Waits until the destination has loaded the devices.
    pub(super) async fn loaded(&self) {
        loop {
            let changed = self.changed.notified();
            if self.lock().loaded {
                return;
            }
            changed.await;
        }
    }

    /// Tells QEMU that the devices are loaded at the destination: from then on it may be unable to run the VM. The
    /// journal says so.
    pub(super) fn tell_loaded(&self) -> Result<(), RelayError> {
        let mut state = self.lock();
        if state.hand != Hand::Open {
            return Err(RelayError::Stopped);
        }
        state.hand = Hand::Told;
        drop(state);
        self.pong()
    }

    /// The destination's answer to the ping at the package's end.
    pub(super) fn pong(&self) -> Result<(), RelayError> {
        let mut message = Vec::new();
        let number = PACKAGE_LOADED;
        Message::Pong { number }.encode(&mut message);
        self.tell_qemu(&message)
    }

    /// Takes the first error.
    pub(super) fn take_failure(&self) -> Option<RelayError> {
        self.lock().failure.take()
    }

    /// Whether the relay has ended.
    pub(super) fn failed(&self) -> bool {
        self.lock().failure.is_some()
    }

    /// Waits until the relay failed.
    pub(super) async fn failure(&self) {
        loop {
            let changed = self.changed.notified();
            if self.failed() {
                return;
            }
            changed.await;
        }
    }

    pub(super) fn answer(&self, answer: Result<(), String>) {
        self.lock().answer = Some(answer);
        self.changed.notify_waiters();
    }

    /// Waits for the destination's answer to the commit; `None` when the link failed first.
    pub(super) async fn answered(&self) -> Option<Result<(), String>> {
        loop {
            let changed = self.changed.notified();
            {
                let mut state = self.lock();
                if let Some(answer) = state.answer.take() {
                    return Some(answer);
                }
                if state.failure.is_some() {
                    return None;
                }
            }
            changed.await;
        }
    }

    /// All memory was sent that goes before the VM runs at the destination.
    pub(super) fn set_memory_sent(&self) {
        self.lock().memory_sent.get_or_insert_with(Instant::now);
    }

    /// Keeps QEMU's end of its socket for [`Shared::open_hand`].
    pub(super) fn keep(&self, theirs: OwnedFd) {
        self.lock().theirs = Some(theirs);
    }

    /// From here on the stream may hand the VM over, and QEMU does not go back. The journal says so.
    pub(super) fn open_hand(&self) {
        let mut state = self.lock();
        state.hand = Hand::Open;
        state.opened = true;
        self.session.set_patience(IN_BETWEEN);
        if let Some(theirs) = state.theirs.take() {
            stream::narrow(&theirs);
        }
    }

    /// The guest has ended at the destination.
    pub(super) fn set_guest_ended(&self, how: GuestEnd) {
        self.lock().guest_ended = Some(how);
        self.changed.notify_waiters();
    }

    /// What the guest did at the destination, if it has ended there.
    pub(super) fn guest_ended(&self) -> Option<GuestEnd> {
        self.lock().guest_ended
    }

    pub(super) fn set_stalls(&self, stalls: Stalls) {
        self.lock().stalls = Some(stalls);
        self.changed.notify_waiters();
    }

    /// Waits until the destination has told what post-copy cost the guest; `None` when the link ended first.
    pub(super) async fn stalls(&self) -> Option<Stalls> {
        loop {
            let changed = self.changed.notified();
            {
                let mut state = self.lock();
                if state.stalls.is_some() || state.failure.is_some() {
                    return state.stalls.take();
                }
            }
            changed.await;
        }
    }

    /// From here on the destination does not fall behind by more than it does in post-copy.
    pub(super) fn stay_near(&self) {
        self.lock().near = true;
    }

    /// Whether it does not.
    pub(super) fn stays_near(&self) -> bool {
        self.lock().near
    }

    /// The destination has agreed to wait for the link however long it is away.
    pub(super) fn set_endures(&self) {
        self.lock().endures = true;
    }

    /// Whether it has.
    pub(super) fn endures(&self) -> bool {
        self.lock().endures
    }

    /// Whether the stream may hand the VM over.
    pub(super) fn is_hand_open(&self) -> bool {
        self.lock().hand == Hand::Open
    }

    /// Hands the VM over, unless it was decided that it stays, and tells the destination.
    pub(super) fn hand_over(&self) -> Result<(), RelayError> {
        let mut state = self.lock();
        let ready = match state.hand {
            Hand::Open => !self.keeps_until_loaded,
            Hand::Told => true,
            _ => false,
        };
        if !ready {
            return Err(RelayError::Stopped);
        }
        let commit = encode_control(&Control::Commit)?;
        state.hand = Hand::Over(Instant::now());
        drop(state);
        self.push_commit(commit);
        self.changed.notify_waiters();
        Ok(())
    }

    /// Asks the destination for its clock, if it is time for that.
    pub(super) fn ask_for_clock(&self) -> Result<(), RelayError> {
        if self.clocks.asks() {
            self.flow
                .push_control(encode_control(&Control::ClockWanted)?);
        }
        Ok(())
    }

    /// Tells the destination that the VM is its own, and before that how the guest's clock went.
    pub(super) fn push_commit(&self, commit: Vec<u8>) {
        let clock = self.clocks.message();
        if let Some(clock) = clock.and_then(|clock| encode_control(&clock).ok()) {
            self.flow.push_control(clock);
        }
        self.flow.push_control(commit);
    }

    /// Keeps the VM here. Returns when it was handed over, if it is too late.
    pub(super) fn withdraw(&self) -> Option<Instant> {
        let mut state = self.lock();
        if let Hand::Over(at) = state.hand {
            return Some(at);
        }
        state.hand = Hand::Withdrawn;
        None
    }

    /// Waits until the stream has handed the VM over, and returns when that was.
    pub(super) async fn handed_over(&self) -> Instant {
        loop {
            let changed = self.changed.notified();
            if let Hand::Over(at) = self.lock().hand {
                return at;
            }
            changed.await;
        }
    }

    /// Whether the stream has handed the VM over.
    pub(super) fn is_over(&self) -> bool {
        matches!(self.lock().hand, Hand::Over(_))
    }

    pub(super) fn memory_sent(&self) -> Option<Instant> {
        self.lock().memory_sent
    }

    pub(super) fn hold_switchover(&self, message: &[u8]) {
        self.lock().switchover = Some(message.to_vec());
    }

    /// Writes a whole message to QEMU's return path. A QEMU in post-copy that listens no more has sent all, or its
    /// reader finds that it has not.
    pub(super) fn tell_qemu(&self, message: &[u8]) -> Result<(), RelayError> {
        let _whole = self.telling.lock().unwrap_or_else(PoisonError::into_inner);
        match (&self.qemu.stream).write_all(message) {
            Err(_) if self.is_over() => Ok(()),
            written => written.map_err(RelayError::Socket),
        }
    }

    /// Lets QEMU switch over, if the destination said that it may.
    pub(super) fn release_switchover(&self) -> Result<(), RelayError> {
        if let Some(message) = self.lock().switchover.take() {
            tracing::debug!("switch-over allowed");
            self.tell_qemu(&message)?;
        }
        Ok(())
    }

    /// From now on the link may be away for so long.
    pub(super) fn set_link_patience(&self, patience: Duration) {
        self.session.set_patience(patience);
    }

    /// For how long the link has been away.
    pub(super) fn link_away(&self) -> Option<Duration> {
        self.session.away()
    }

    /// How often a connection of the link broke.
    pub(super) fn link_breaks(&self) -> u32 {
        self.session.breaks()
    }

    pub(super) fn count_wire_bytes(&self) {
        let bytes = self.before.wire_bytes + self.session.bytes();
        self.progress.set(Counter::WireBytes, bytes);
    }

    /// `read`: by the destination since this session began.
    pub(super) fn count_disk_bytes(&self, read: u64) {
        let bytes = self.before.disk_bytes.saturating_add(read);
        self.progress.set(Counter::DiskBytes, bytes);
    }

    pub(super) fn count_late_pages(&self) {
        let pages = self.before.late_pages + self.flow.late();
        self.progress.set(Counter::LatePages, pages);
    }

    /// Page data a second that the path takes when it is busy, in bytes.
    pub(super) fn rate(&self) -> Option<f64> {
        self.rate.get()
    }
}
