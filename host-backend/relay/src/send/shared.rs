//! What the source's threads and the one who drives them share.

use std::io::Write;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use transhume_protocol::link::{Control, GuestEnd, Stalls, encode_control};
use transhume_protocol::memory::PageRequest;

use super::clocks::Clocks;
use super::doubt::Doubt;
use super::hand_over::HandOver;
use super::hints::Hints;
use super::link_rate::LinkRate;
use super::packer::Packer;
use super::page_requests::Requests;
use super::prefetch::Prefetch;
use super::queue::SendQueue;
use crate::SWITCHOVER_LINK_TIMEOUT;
use crate::error::RelayError;
use crate::progress::{Counter, Progress};
use transhume_api::migration::Traffic;
use transhume_link::session::Session;

struct State {
    hand_over: HandOver,
    /// The destination waits for the link however long it is away.
    keeps_waiting: bool,
    /// The VM goes over to post-copy as soon as it can.
    near: bool,
    /// QEMU's end of its socket, until the stream may hand the VM over.
    theirs: Option<OwnedFd>,
    /// What post-copy cost the guest.
    stalls: Option<Stalls>,
    /// Lets threads go that wait for one another.
    at_stop: Option<Box<dyn FnOnce() + Send>>,
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
pub(crate) struct Sockets {
    pub(crate) stream: UnixStream,
    /// Those of its channels, if it has some.
    pub(crate) channels: Vec<UnixStream>,
}

/// See the module.
pub(crate) struct Shared {
    pub(crate) flow: Arc<SendQueue>,
    pub(crate) hints: Arc<Hints>,
    pub(crate) order: Arc<Prefetch>,
    pub(crate) progress: Arc<Progress>,
    /// What had moved before: more than nothing where post-copy goes on after a break.
    before: Traffic,
    /// What the guest waits for, in post-copy.
    pub(crate) requests: Requests,
    /// Whether both hosts have the same storage, where memory may come from it.
    pub(crate) doubt: Option<Arc<Doubt>>,
    qemu: Sockets,
    /// Makes a message to the hypervisor of requests.
    page_requests: fn(&[PageRequest]) -> Vec<u8>,
    /// Held while a message is written: messages must not mix.
    telling: Mutex<()>,
    session: Session<Packer>,
    rate: Arc<LinkRate>,
    pub(crate) clocks: Arc<Clocks>,
    state: Mutex<State>,
    changed: Notify,
}

impl Shared {
    #[expect(clippy::too_many_arguments, reason = "they are its fields")]
    pub(crate) fn new(
        flow: Arc<SendQueue>,
        hints: Arc<Hints>,
        order: Arc<Prefetch>,
        progress: Arc<Progress>,
        qemu: Sockets,
        session: Session<Packer>,
        rate: Arc<LinkRate>,
        keeps_until_loaded: bool,
        doubt: Option<Doubt>,
        clocks: Arc<Clocks>,
        page_requests: fn(&[PageRequest]) -> Vec<u8>,
    ) -> Self {
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
            page_requests,
            telling: Mutex::new(()),
            session,
            rate,
            clocks,
            state: Mutex::new(State {
                hand_over: HandOver::new(keeps_until_loaded),
                keeps_waiting: false,
                near: false,
                theirs: None,
                stalls: None,
                at_stop: None,
                failure: None,
                answer: None,
                memory_sent: None,
                guest_ended: None,
                switchover: None,
            }),
            changed: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The sockets into which QEMU migrates.
    pub(crate) fn sockets(&self) -> &Sockets {
        &self.qemu
    }

    /// The link.
    pub(crate) fn session(&self) -> &Session<Packer> {
        &self.session
    }

    /// Has something done when the relay ends, or at once if it has ended.
    pub(crate) fn at_stop(&self, run: impl FnOnce() + Send + 'static) {
        let mut state = self.lock();
        if state.failure.is_none() {
            state.at_stop = Some(Box::new(run));
            return;
        }
        drop(state);
        run();
    }

    /// The VM was handed over before this relay began.
    pub(crate) fn set_committed(&self) {
        self.lock().hand_over.set_committed();
    }

    /// Waits until doubts about storage are looked into: before a hand-over. The relay fails where it is not the same.
    pub(crate) async fn settle_doubts(&self) {
        if let Some(doubt) = self.doubt.clone() {
            // It waits for a bounded time, and does not panic.
            let _ = transhume_base::task::blocking(move || doubt.settle()).await;
        }
    }

    /// Ends the relay. QEMU's sockets close, so that its migration fails if it was not complete.
    pub(crate) fn stop(&self, error: RelayError) {
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
        let at_stop = self.lock().at_stop.take();
        if let Some(at_stop) = at_stop {
            at_stop();
        }
        // QEMU may have to be told something before it can take the VM back: see `take_back`.
        let waits = self.lock().hand_over.waits_for_word();
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
    pub(crate) fn hang_up(&self) {
        self.shut(Shutdown::Both);
    }

    /// Whether QEMU keeps the VM until it is told that its devices are loaded at the destination.
    pub(crate) fn keeps_until_loaded(&self) -> bool {
        self.lock().hand_over.keeps_until_loaded()
    }

    /// Whether the destination may hold the VM, loaded, and the VM may still stay here.
    pub(crate) fn may_be_held(&self) -> bool {
        self.lock().hand_over.may_be_held()
    }

    pub(crate) fn set_loaded(&self) {
        self.lock().hand_over.set_loaded();
        self.changed.notify_waiters();
    }

    /// Waits until the destination has loaded the devices.
    pub(crate) async fn loaded(&self) {
        loop {
            let changed = self.changed.notified();
            if self.lock().hand_over.is_loaded() {
                return;
            }
            changed.await;
        }
    }

    /// Tells QEMU, by that message, that the devices are loaded at the destination: from then on it may be unable to run
    /// the VM. The journal says so.
    pub(crate) fn tell_loaded(&self, message: &[u8]) -> Result<(), RelayError> {
        self.lock().hand_over.tell_loaded()?;
        self.tell_hypervisor(message)
    }

    /// Takes the first error.
    pub(crate) fn take_failure(&self) -> Option<RelayError> {
        self.lock().failure.take()
    }

    /// Whether the relay has ended.
    pub(crate) fn failed(&self) -> bool {
        self.lock().failure.is_some()
    }

    /// Waits until the relay failed.
    pub(crate) async fn failure(&self) {
        loop {
            let changed = self.changed.notified();
            if self.failed() {
                return;
            }
            changed.await;
        }
    }

    pub(crate) fn answer(&self, answer: Result<(), String>) {
        self.lock().answer = Some(answer);
        self.changed.notify_waiters();
    }

    /// Waits for the destination's answer to the commit; `None` when the link failed first.
    pub(crate) async fn answered(&self) -> Option<Result<(), String>> {
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
    pub(crate) fn set_memory_sent(&self) {
        self.lock().memory_sent.get_or_insert_with(Instant::now);
    }

    /// Keeps QEMU's end of its socket for [`Shared::arm`].
    pub(crate) fn keep(&self, theirs: OwnedFd) {
        self.lock().theirs = Some(theirs);
    }

    /// From here on the stream may hand the VM over, and QEMU does not go back. The journal says so. QEMU's end of
    /// its socket is closed here, if it was kept, after `narrow` has made it short.
    pub(crate) fn arm(&self, narrow: impl FnOnce(&OwnedFd)) -> Result<(), RelayError> {
        let mut state = self.lock();
        state.hand_over.arm()?;
        self.session.set_patience(SWITCHOVER_LINK_TIMEOUT);
        if let Some(theirs) = state.theirs.take() {
            narrow(&theirs);
        }
        Ok(())
    }

    /// The guest has ended at the destination.
    pub(crate) fn set_guest_ended(&self, how: GuestEnd) {
        self.lock().guest_ended = Some(how);
        self.changed.notify_waiters();
    }

    /// What the guest did at the destination, if it has ended there.
    pub(crate) fn guest_ended(&self) -> Option<GuestEnd> {
        self.lock().guest_ended
    }

    pub(crate) fn set_stalls(&self, stalls: Stalls) {
        self.lock().stalls = Some(stalls);
        self.changed.notify_waiters();
    }

    /// Waits until the destination has told what post-copy cost the guest; `None` when the link ended first.
    pub(crate) async fn stalls(&self) -> Option<Stalls> {
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
    pub(crate) fn stay_near(&self) {
        self.lock().near = true;
    }

    /// Whether it does not.
    pub(crate) fn stays_near(&self) -> bool {
        self.lock().near
    }

    /// The destination has agreed to wait for the link however long it is away.
    pub(crate) fn set_keeps_waiting(&self) {
        self.lock().keeps_waiting = true;
    }

    /// Whether it has.
    pub(crate) fn keeps_waiting(&self) -> bool {
        self.lock().keeps_waiting
    }

    /// Whether the stream may hand the VM over.
    pub(crate) fn is_armed(&self) -> bool {
        self.lock().hand_over.is_armed()
    }

    /// Hands the VM over, unless it was decided that it stays, and tells the destination.
    pub(crate) fn hand_over(&self) -> Result<(), RelayError> {
        let commit = encode_control(&Control::Commit)?;
        self.lock().hand_over.commit()?;
        self.push_commit(commit);
        self.changed.notify_waiters();
        Ok(())
    }

    /// Asks the destination for its clock, if it is time for that.
    pub(crate) fn ask_for_clock(&self) -> Result<(), RelayError> {
        if self.clocks.asks() {
            self.flow
                .push_control(encode_control(&Control::ClockWanted)?);
        }
        Ok(())
    }

    /// Tells the destination that the VM is its own, and before that how the guest's clock went.
    pub(crate) fn push_commit(&self, commit: Vec<u8>) {
        let clock = self.clocks.message();
        if let Some(clock) = clock.and_then(|clock| encode_control(&clock).ok()) {
            self.flow.push_control(clock);
        }
        self.flow.push_control(commit);
    }

    /// Keeps the VM here. Returns when it was handed over, if it is too late.
    pub(crate) fn abort(&self) -> Option<Instant> {
        self.lock().hand_over.abort()
    }

    /// Waits until the stream has handed the VM over, and returns when that was.
    pub(crate) async fn handed_over(&self) -> Instant {
        loop {
            let changed = self.changed.notified();
            if let Some(at) = self.lock().hand_over.committed() {
                return at;
            }
            changed.await;
        }
    }

    /// Whether the stream has handed the VM over.
    pub(crate) fn is_committed(&self) -> bool {
        self.lock().hand_over.committed().is_some()
    }

    pub(crate) fn memory_sent(&self) -> Option<Instant> {
        self.lock().memory_sent
    }

    pub(crate) fn hold_switchover(&self, message: &[u8]) {
        self.lock().switchover = Some(message.to_vec());
    }

    /// Writes a whole message to QEMU's return path. A QEMU in post-copy that listens no more has sent all, or its
    /// reader finds that it has not.
    pub(crate) fn tell_hypervisor(&self, message: &[u8]) -> Result<(), RelayError> {
        let _whole = self.telling.lock().unwrap_or_else(PoisonError::into_inner);
        match (&self.qemu.stream).write_all(message) {
            Err(_) if self.is_committed() => Ok(()),
            written => written.map_err(RelayError::Socket),
        }
    }

    /// Asks for pages out of the hypervisor's order.
    pub(crate) fn request_pages(&self, requests: &[PageRequest]) -> Result<(), RelayError> {
        self.tell_hypervisor(&(self.page_requests)(requests))
    }

    /// Lets QEMU switch over, if the destination said that it may.
    pub(crate) fn release_switchover(&self) -> Result<(), RelayError> {
        if let Some(message) = self.lock().switchover.take() {
            tracing::debug!("switch-over allowed");
            self.tell_hypervisor(&message)?;
        }
        Ok(())
    }

    /// From now on the link may be away for so long.
    pub(crate) fn set_link_patience(&self, patience: Duration) {
        self.session.set_patience(patience);
    }

    /// For how long the link has been away.
    pub(crate) fn link_away(&self) -> Option<Duration> {
        self.session.away()
    }

    /// How often a connection of the link broke.
    pub(crate) fn link_breaks(&self) -> u32 {
        self.session.breaks()
    }

    pub(crate) fn count_wire_bytes(&self) {
        let bytes = self.before.wire_bytes + self.session.bytes();
        self.progress.set(Counter::WireBytes, bytes);
    }

    /// `read`: by the destination since this session began.
    pub(crate) fn count_disk_bytes(&self, read: u64) {
        let bytes = self.before.disk_bytes.saturating_add(read);
        self.progress.set(Counter::DiskBytes, bytes);
    }

    pub(crate) fn count_late_pages(&self) {
        let pages = self.before.late_pages + self.flow.late();
        self.progress.set(Counter::LatePages, pages);
    }

    /// Page data a second that the path takes when it is busy, in bytes.
    pub(crate) fn rate(&self) -> Option<f64> {
        self.rate.get()
    }
}
