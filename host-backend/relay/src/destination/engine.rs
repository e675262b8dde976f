//! The destination's threads, started and ended together.

use std::io::Read;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use transhume_protocol::link::Control;

use crate::error::RelayError;
use crate::moved_guest;
use crate::qemu::return_path::{Filter, page_requests, ping};
use crate::qemu::stream_writer::Writer;
use crate::receive::disk_reader::{self, DiskReader};
use crate::receive::fault_gate::{self, Gate};
use crate::receive::frames::Intake;
use crate::receive::output::Output;
use crate::receive::placement::Placement;
use crate::receive::replies::{self, Replies, Reply};
use crate::receive::resume_state::ResumeState;
use crate::storage::shown::{Comparer, Questions};
use crate::threads;
use transhume_base::process_memory::GuestMemory;
use transhume_guest::Known;
use transhume_hypervisor::{Layout, Vm};
use transhume_link::session::{Ready, Session};
use transhume_pages::bitmap::Bitmap;
use transhume_pages::digest::Digester;
use transhume_volume as volume;

/// Connections of a session, at most: one takes a CPU.
pub(crate) const MAX_CONNECTIONS: u8 = 8;
/// How long the last words to the source may take.
pub(crate) const FAREWELL: Duration = Duration::from_millis(500);
/// Bytes read from QEMU's return path at once.
const RETURN_PATH_LEN: usize = 4096;
/// Bytes of it that go on at once.
const MAX_RETURN_PATH: usize = 64 << 10;
/// How often the end of the link is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

#[derive(Default)]
struct State {
    failure: Option<RelayError>,
    committed: bool,
    /// See [`Engine::guest_clock`].
    guest_clock: Option<Known>,
    /// QEMU has loaded the devices.
    loaded: bool,
    /// QEMU has closed its socket, and all that it said is on its way.
    closed: bool,
}

/// What memory goes into, and the disks that it is read from.
pub(crate) struct Target {
    /// The socket of a QEMU that waits for its stream.
    pub(crate) qemu: UnixStream,
    pub(crate) volumes: Vec<Box<dyn volume::Reader>>,
    /// Reads them for a source that compares.
    pub(crate) comparer: Option<Comparer>,
    /// The guest's memory, where it can be reached.
    pub(crate) memory: Option<GuestMemory>,
    /// Its length by the definition.
    pub(crate) memory_bytes: u64,
    /// How the VM comes.
    pub(crate) way: Way,
}

/// How a VM comes.
pub(crate) enum Way {
    /// It runs here when all of it is here.
    PreCopy,
    /// It may run here before.
    PostCopy {
        /// The source can take it back until its devices are loaded: they need not wait for the commit.
        loads_first: bool,
    },
    /// It does, and its stream broke.
    Resumed(ResumeState),
}

/// The running threads.
pub(crate) struct Engine {
    placement: Arc<Placement>,
    output: Arc<Output>,
    replies: Arc<Replies>,
    qemu: UnixStream,
    session: Session<Ready>,
    state: Mutex<State>,
    changed: Notify,
}

impl Engine {
    /// Starts the threads between a link and a QEMU that waits for its stream.
    pub(crate) fn start(
        session: Session<Ready>,
        target: Target,
        digester: &Digester,
    ) -> Result<Arc<Self>, RelayError> {
        let Target {
            qemu,
            volumes,
            comparer,
            memory,
            memory_bytes,
            way,
        } = target;
        let post_copy = !matches!(way, Way::PreCopy);
        let loads_first = matches!(way, Way::PostCopy { loads_first: true });
        let replies = Arc::<Replies>::default();
        let output = Arc::new(Output::new());
        let placement = Arc::new(Placement::new(
            Arc::clone(&output),
            Arc::clone(&replies),
            volumes.len(),
            memory,
            post_copy,
            ping().filter(|_| post_copy),
        ));
        if loads_first {
            output.release();
        }
        let (mut filter, resumed) = (Filter::default(), matches!(way, Way::Resumed(_)));
        if let Way::Resumed(forgotten) = way {
            let longest = forgotten.pages.iter().map(Bitmap::len).max();
            filter = Filter::resumed(longest.unwrap_or(0));
            placement.resume(forgotten);
        }
        let socket = || qemu.try_clone().map_err(RelayError::Socket);
        let (write_half, read_half) = (socket()?, socket()?);
        let engine = Arc::new(Self {
            placement: Arc::clone(&placement),
            output: Arc::clone(&output),
            replies: Arc::clone(&replies),
            qemu,
            session: session.clone(),
            state: Mutex::default(),
            changed: Notify::new(),
        });
        let disk_bytes = Arc::new(AtomicU64::new(0));
        let mut questions = Questions::none();
        if let Some(comparer) = comparer {
            let (asked, replies) = (Questions::new(), Arc::clone(&replies));
            questions = asked.0;
            engine.spawn("relay-compare", move || {
                comparer.run(&asked.1, |read| {
                    // The receiver ends only when the engine does.
                    let _ = replies.send(Reply::Control(Control::Compared(read)));
                })
            })?;
        }
        let mut intake = Intake::new(
            session.clone(),
            Arc::clone(&placement),
            Arc::clone(&replies),
            Arc::clone(&disk_bytes),
            memory_bytes,
            questions,
        )?;
        let writer = Writer::new(write_half, output);
        let this = Arc::clone(&engine);
        engine.spawn("relay-link-in", move || {
            if !resumed {
                intake.run()?;
                this.commit(intake.guest_clock());
            }
            if this.is_post_copy() {
                intake.run()?;
            }
            Ok(())
        })?;
        engine.spawn("relay-stream", move || writer.run())?;
        let queue = Arc::clone(&replies);
        engine.spawn("relay-link-out", move || replies::run(&session, &queue))?;
        let this = Arc::clone(&engine);
        engine.spawn("relay-return", move || {
            if !post_copy {
                return return_path(read_half, |bytes| pass(&replies, bytes.to_vec()));
            }
            this.answers(read_half, filter, &replies)?;
            this.lock().closed = true;
            Ok(())
        })?;
        let volumes = Arc::new(volumes);
        let pool = Arc::default();
        for _ in 0..disk_reader::THREADS {
            let reader = DiskReader {
                placement: Arc::clone(&placement),
                volumes: Arc::clone(&volumes),
                digester: digester.clone(),
                pool: Arc::clone(&pool),
                disk_bytes: Arc::clone(&disk_bytes),
            };
            engine.spawn("relay-disk", move || reader.run())?;
        }
        Ok(engine)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn spawn(
        self: &Arc<Self>,
        name: &str,
        run: impl FnOnce() -> Result<(), RelayError> + Send + 'static,
    ) -> Result<(), RelayError> {
        let engine = Arc::clone(self);
        threads::spawn(name, run, move |error| engine.fail(error))
    }

    /// Sends a control message behind all replies before it.
    pub(crate) fn send(&self, message: Control) {
        // Nobody takes it when the engine has ended.
        let _ = self.replies.send(Reply::Control(message));
    }

    /// Waits until the source has heard everything, or has ended the session; so long at most. Then all
    /// threads end, and the link.
    pub(crate) async fn finish(&self, patience: Duration) {
        let deadline = Instant::now() + patience;
        let _ = self.replies.send(Reply::Last(patience));
        while !self.session.is_over() && Instant::now() < deadline {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        self.stop(RelayError::Stopped);
    }

    /// How far the guest's clock would be ahead of this host's, had the guest not stood still, if the source
    /// told it with its commit.
    pub(crate) fn guest_clock(&self) -> Option<Known> {
        self.lock().guest_clock
    }

    /// Has processes of a VM in post-copy sleep where its CPUs would stop.
    pub(crate) fn gate(&self, vm: &Arc<Vm>) -> Gate {
        let setting = fault_gate::Setting {
            guest: moved_guest::of(vm),
            placement: Arc::clone(&self.placement),
            replies: Arc::clone(&self.replies),
            clock: self.guest_clock(),
            page_requests,
        };
        let vm = Arc::clone(vm);
        fault_gate::start(setting, async move {
            let layout = Layout::read(vm.qmp()).await.ok()?;
            Some(layout.regions().to_vec())
        })
    }

    /// Whether the VM is handed over while part of its memory is at the source.
    pub(crate) fn is_post_copy(&self) -> bool {
        self.placement.is_packaged()
    }

    /// What must be known of a VM in post-copy to resume it; once.
    pub(crate) fn take_resume_state(&self) -> Option<ResumeState> {
        self.placement.take_resume_state()
    }

    /// From now on the link may be away for so long.
    pub(crate) fn set_link_patience(&self, patience: Duration) {
        self.session.set_patience(patience);
    }

    /// The hand-over is noted: QEMU may load the devices, and run the VM.
    pub(crate) fn release(&self) {
        self.output.release();
    }

    /// Whether QEMU has said all that it will say to the source.
    pub(crate) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Takes the first error.
    pub(crate) fn failed(&self) -> Option<RelayError> {
        self.lock().failure.take()
    }

    /// Waits for the first error.
    pub(crate) async fn failure(&self) -> RelayError {
        loop {
            let changed = self.changed.notified();
            if let Some(error) = self.failed() {
                return error;
            }
            changed.await;
        }
    }

    /// Carries what QEMU says to the link, but for answers to pings that are not for the source.
    fn answers(
        &self,
        qemu: UnixStream,
        mut filter: Filter,
        replies: &Replies,
    ) -> Result<(), RelayError> {
        let received = |block: &str, bitmap: &[u8]| self.placement.received(block, bitmap);
        return_path(qemu, |bytes| {
            let (passed, kept) = filter.filter(bytes, received)?;
            if kept.ping {
                self.placement.may_write();
            }
            if kept.loaded {
                self.lock().loaded = true;
                self.changed.notify_waiters();
            }
            for piece in passed.chunks(MAX_RETURN_PATH) {
                if !pass(replies, piece.to_vec())? {
                    return Ok(false);
                }
            }
            Ok(true)
        })
    }

    fn commit(&self, guest_clock: Option<Known>) {
        let mut state = self.lock();
        state.guest_clock = guest_clock;
        state.committed = true;
        drop(state);
        self.changed.notify_waiters();
    }

    /// Waits until QEMU has loaded the devices of a VM that the source can still take back.
    pub(crate) async fn loaded(&self) {
        loop {
            let changed = self.changed.notified();
            if self.lock().loaded {
                return;
            }
            changed.await;
        }
    }

    /// Waits for the source's commit, or for the first error.
    pub(crate) async fn committed(&self) -> Result<(), RelayError> {
        loop {
            let changed = self.changed.notified();
            {
                let mut state = self.lock();
                // A commit that came counts, whatever happened to the link behind it.
                if state.committed {
                    return Ok(());
                }
                if let Some(error) = state.failure.take() {
                    return Err(error);
                }
            }
            changed.await;
        }
    }

    /// Ends the threads between link and QEMU. What is on its way to the source still gets there, and so
    /// does the reason, by [`Engine::send`].
    fn fail(&self, error: RelayError) {
        let mut state = self.lock();
        if state.failure.is_none() {
            state.failure = Some(error);
        }
        drop(state);
        self.placement.stop();
        self.output.stop();
        // Fails only when QEMU has closed it already.
        let _ = self.qemu.shutdown(Shutdown::Both);
        self.changed.notify_waiters();
    }

    /// Ends all threads, and the link.
    pub(crate) fn stop(&self, error: RelayError) {
        self.fail(error);
        self.session.close();
        let _ = self.replies.send(Reply::Last(Duration::ZERO));
    }
}

/// Says whether anybody listens.
fn pass(replies: &Replies, bytes: Vec<u8>) -> Result<bool, RelayError> {
    replies.wait_for_room()?;
    Ok(replies.send(Reply::ReturnPath(bytes)))
}

/// Carries what QEMU says to the link, until QEMU closes its socket, as it does when it has loaded the VM.
fn return_path(
    mut qemu: UnixStream,
    mut pass: impl FnMut(&[u8]) -> Result<bool, RelayError>,
) -> Result<(), RelayError> {
    let mut buffer = [0; RETURN_PATH_LEN];
    loop {
        match qemu.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(read) => {
                if !pass(&buffer[..read])? {
                    return Ok(());
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(RelayError::Socket(error)),
        }
    }
}
