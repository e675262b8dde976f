//! Goes on with a VM in post-copy whose stream broke: when the link was away for too long, a daemon or a QEMU's
//! socket ended. The source asks for it. QEMU waits for a new stream then (`postcopy-paused`), in
//! which it first tells which pages it has.

use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::socket::{getsockopt, sockopt};
use tokio::time::timeout;
use transhume_protocol::link::{Control, GuestEnd};

use super::answer::{refuse, send};
use super::engine::{Engine, Target, Way};
use super::engine::{FAREWELL, MAX_CONNECTIONS};
use super::host::Host;
use super::journal::{Arrival, Stage};
use super::outcomes::Outcomes;
use super::{endings, post_copy, recovery, run_directory};
use crate::receive::resume_state::ResumeState;
use transhume_hypervisor::{Error, Vm, stream};
use transhume_link::Connection;
use transhume_link::server::Open;
use transhume_link::session::{Ready, Session};
use transhume_pages::digest::Digester;

/// The name of QEMU's socket in the VM's run directory.
const SOCKET: &str = "resume.sock";
/// How long QEMU may take to notice that its stream broke, and how often it is tried.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(8);
const PAUSE_POLL_INTERVAL: Duration = Duration::from_millis(100);
/// How long a QEMU is asked how far it is whose main loop may wait for a page itself.
const QUESTION: Duration = Duration::from_secs(2);
/// How long what is left of the earlier session may take to end.
const ENDING_TIMEOUT: Duration = Duration::from_secs(5);

/// What a source asks for.
pub(crate) struct Asked {
    pub(crate) job: u64,
    pub(crate) vm: String,
    pub(crate) connections: u8,
    pub(crate) patience: u16,
}

/// Why it does not go on.
enum ResumeRefusal {
    /// All memory is here.
    AlreadyComplete,
    /// The VM's QEMU has ended.
    VmGone,
    /// Its guest has, by itself.
    GuestEnded(GuestEnd),
    /// For this reason; later it may.
    Retry(String),
}

impl From<String> for ResumeRefusal {
    fn from(reason: String) -> Self {
        Self::Retry(reason)
    }
}

/// Answers a source that wants to send the rest of a VM's memory, and takes it.
pub(crate) async fn serve(
    mut connection: Connection,
    asked: Asked,
    host: Arc<dyn Host>,
    outcomes: &Outcomes,
) -> Result<(), String> {
    let Some(alone) = outcomes.sessions.claim(asked.job) else {
        let reasons = vec!["another connection is about to do the same".to_owned()];
        return refuse(&mut connection, reasons);
    };
    let begun = match begin(&connection, &asked, &host, outcomes).await {
        Ok(begun) => begun,
        Err(not) => {
            let answer = match not {
                ResumeRefusal::AlreadyComplete => Control::AlreadyComplete,
                ResumeRefusal::VmGone => Control::Outcome { taken: false },
                ResumeRefusal::GuestEnded(how) => Control::GuestEnded(how),
                ResumeRefusal::Retry(reason) => Control::Refused {
                    reasons: vec![reason],
                },
            };
            return send(&mut connection, &answer);
        }
    };
    let Begun {
        vm,
        forgotten,
        from,
        socket,
    } = begun;
    let name = vm.name().to_owned();
    let label = run_directory::arriving_job(vm.files().folder()).unwrap_or_else(|| from.clone());
    tracing::info!(vm = name, job = label, "post-copy goes on");
    let _under_way = host.arrivals().under_way();
    let events = vm.qmp().events();
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let mut token = [0; 16];
    getrandom::fill(&mut token).map_err(|error| text(&error))?;
    let connections = asked.connections.clamp(1, MAX_CONNECTIONS);
    let blocks = forgotten.blocks.iter();
    let resumed = Control::Resumed {
        token,
        connections,
        section: forgotten.section,
        blocks: blocks
            .map(|block| (block.name.clone(), block.length))
            .collect(),
    };
    send(&mut connection, &resumed)?;
    let patience = Duration::from_secs(asked.patience.max(1).into());
    let session =
        Session::begin(connection, patience, None, Ready::default).map_err(|error| text(&error))?;
    let _open = outcomes.sessions.enter(Open {
        job: asked.job,
        token,
        from,
        vm: name.clone(),
        connections,
        session: session.clone(),
    });
    drop(alone);
    let target = Target {
        qemu: socket,
        volumes: Vec::new(),
        comparer: None,
        memory: None,
        memory_bytes: vm.definition().memory.bytes(),
        way: Way::Resumed(forgotten),
    };
    // Nothing is read from a disk any more.
    let digester = Digester::new(&[0; 16]);
    let engine = Engine::start(session, target, &digester).map_err(|error| text(&error))?;
    // Where there was one before, it has let everybody go.
    let gate = engine.gate(&vm);
    post_copy::follow(&engine, host.arrivals(), &vm, asked.job, events, Some(gate)).await;
    engine.finish(FAREWELL).await;
    Ok(())
}

/// A QEMU that waits for the stream that resumes.
struct Begun {
    vm: Arc<Vm>,
    forgotten: ResumeState,
    from: String,
    socket: UnixStream,
}

async fn begin(
    connection: &Connection,
    asked: &Asked,
    host: &Arc<dyn Host>,
    outcomes: &Outcomes,
) -> Result<Begun, ResumeRefusal> {
    let (job, name) = (asked.job, &asked.vm);
    let here = host.name();
    let arrival = host.arrivals().of(job).filter(|one| one.vm == *name);
    let Some(arrival) = arrival else {
        return Err(format!("{here} knows nothing of this migration").into());
    };
    match arrival.stage {
        Stage::PostCopy => {}
        // Its note could not be written: it was told to run, and QEMU knows the rest.
        Stage::Committed { .. } if host.vm(name).is_some() => {}
        Stage::Taken => return Err(ResumeRefusal::AlreadyComplete),
        Stage::Lost => return Err(ResumeRefusal::VmGone),
        Stage::Ended(how) => return Err(ResumeRefusal::GuestEnded(how)),
        _ => return Err(format!("{here} does not run {name} yet").into()),
    }
    outcomes.sessions.end(job, ENDING_TIMEOUT).await?;
    let vm = find(&arrival, host).await?;
    if is_whole(&vm).await {
        endings::whole(host.arrivals(), &vm, job);
        return Err(ResumeRefusal::AlreadyComplete);
    }
    let folder = vm.files().folder();
    let (forgotten, from) = ResumeState::read(folder, job).map_err(|error| {
        format!(
            "{} at {here} cannot be read: {error}",
            folder.join("post-copy").display()
        )
    })?;
    if !connection.peer_is(&from) {
        return Err(format!("{name} came from another host, {from}").into());
    }
    let socket = new_stream(&vm, here).await?;
    Ok(Begun {
        vm,
        forgotten,
        from,
        socket,
    })
}

/// The VM. A QEMU that did not answer when this daemon was started may do so now.
async fn find(arrival: &Arrival, host: &Arc<dyn Host>) -> Result<Arc<Vm>, ResumeRefusal> {
    if let Some(vm) = host.vm(&arrival.vm) {
        return Ok(vm);
    }
    match recovery::find(&host.launch_settings(), arrival).await {
        Ok(Some(vm)) => {
            let vm = Arc::new(vm);
            endings::forget_when_gone(host.arrivals(), &vm, arrival.job);
            host.arrived(Arc::clone(&vm), false);
            Ok(vm)
        }
        Ok(None) => Err(ResumeRefusal::VmGone),
        Err(error) => Err(format!("the QEMU at {} does not answer: {error}", host.name()).into()),
    }
}

/// Whether QEMU has all memory, as far as it answers.
async fn is_whole(vm: &Vm) -> bool {
    let said = timeout(QUESTION, vm.qmp().query_migrate()).await;
    matches!(said, Ok(Ok(said)) if said.status.as_deref() == Some("completed"))
}

/// Gives QEMU a new stream.
async fn new_stream(vm: &Vm, host: &str) -> Result<UnixStream, ResumeRefusal> {
    // QEMU makes this socket. One that an earlier version started has no folder of its own, and may do it beside.
    let own = vm.files().qemu_folder();
    let folder = if own.is_dir() {
        own
    } else {
        vm.files().folder().to_owned()
    };
    let path = folder.join(SOCKET);
    let deadline = Instant::now() + PAUSE_TIMEOUT;
    loop {
        remove(&path);
        let socket = match vm.qmp().migrate_recover(&path).await {
            Ok(()) => connect(&path, vm.pid()),
            Err(Error::Lost(_)) => return Err(ResumeRefusal::VmGone),
            Err(error) => Err(error.to_string()),
        };
        remove(&path);
        match socket {
            Ok(socket) => {
                stream::widen(&socket);
                return Ok(socket);
            }
            Err(error) if Instant::now() > deadline => {
                return Err(
                    format!("the QEMU at {host} does not wait for a new stream: {error}").into(),
                );
            }
            Err(_) => tokio::time::sleep(PAUSE_POLL_INTERVAL).await,
        }
    }
}

/// Connects to the socket that this process listens at, and no other one: its folder belongs to QEMU's user, who could have
/// put a link to somebody else's there, to whom the daemon would speak as root.
fn connect(path: &Path, process: Option<u32>) -> Result<UnixStream, String> {
    let socket = UnixStream::connect(path).map_err(|error| error.to_string())?;
    let peer = getsockopt(&socket, sockopt::PeerCredentials).map_err(|error| error.to_string())?;
    if process.is_none_or(|process| u32::try_from(peer.pid()) != Ok(process)) {
        return Err(format!(
            "process {} listens at {}, which is not the VM's QEMU",
            peer.pid(),
            path.display()
        ));
    }
    Ok(socket)
}

fn remove(path: &Path) {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            tracing::warn!(%error, path = %path.display(), "a socket stays");
        }
        _ => {}
    }
}
