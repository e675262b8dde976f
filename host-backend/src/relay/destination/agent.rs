//! What the agent of a VM that came by pre-copy is told: that no memory is absent. The host that it left may have had it
//! get ready for a move by post-copy.
//!
//! In post-copy [`super::gate`] talks to the agent.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::guest;
use crate::hypervisor::Vm;

/// How long the agent may take to answer. QEMU serves its channel to one client at a time, and the VM may move on.
const PATIENCE: Duration = Duration::from_secs(2);

/// Begins to tell it, once the VM runs here. Nothing waits for it.
pub(super) fn greet(vm: Arc<Vm>) {
    let run = move || {
        let Some(socket) = vm.agent_socket() else {
            return;
        };
        if let Err(reason) = tell(socket) {
            tracing::debug!(vm = vm.name(), reason, "the agent was told nothing");
        }
    };
    let thread = std::thread::Builder::new().name("relay-greet".to_owned());
    if let Err(error) = thread.spawn(run) {
        tracing::warn!(%error, "a thread");
    }
}

fn tell(socket: &Path) -> Result<(), String> {
    let mut session = [0; 8];
    getrandom::fill(&mut session).map_err(|error| error.to_string())?;
    let opening = guest::open(socket, u64::from_ne_bytes(session), PATIENCE)?;
    opening.no_gate().map_err(guest::unusable)?;
    // Its answer shows that it has read all that was said.
    opening.agreed(Vec::new(), PATIENCE).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixListener;
    use transhume_protocol::agent::{AgentMessage, Decoder, HostMessage, ReportSource, VERSION};

    #[test]
    fn an_agent_that_has_arrived_hears_that_nothing_is_absent() {
        let folder = tempfile::tempdir().expect("a folder");
        let socket = folder.path().join("agent");
        let listener = UnixListener::bind(&socket).expect("a socket");
        let agent = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a host");
            let (mut decoder, mut byte, mut heard) = (Decoder::new(), [0], Vec::new());
            while stream.read(&mut byte).expect("a host") == 1 {
                assert_eq!(decoder.push(&byte), 1);
                let Some((kind, payload)) = decoder.next_frame() else {
                    continue;
                };
                match HostMessage::decode(kind, payload).expect("a message") {
                    HostMessage::Hello { session, .. } => {
                        heard.push("hello");
                        let mut out = [0; 256];
                        let hello = AgentMessage::Hello {
                            version: VERSION,
                            session,
                            source: ReportSource::Module,
                            page_shift: 12,
                            agent: "fake",
                        };
                        let length = hello.encode(&mut out).expect("it fits");
                        stream.write_all(&out[..length]).expect("a host");
                    }
                    HostMessage::GateClose => heard.push("close"),
                    other => panic!("{other:?}"),
                }
            }
            heard
        });
        assert_eq!(tell(&socket), Ok(()));
        assert_eq!(agent.join().expect("no panic"), ["hello", "close"]);
    }
}
