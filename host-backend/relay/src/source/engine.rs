//! The threads of a relay: those that read QEMU's stream, and those of the link.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use transhume_protocol::memory::Block;

use crate::error::RelayError;
use crate::qemu::multifd_barrier::MultifdBarrier;
use crate::qemu::multifd_reader::ChannelReader;
use crate::qemu::return_path::Passing;
use crate::qemu::stream_reader::StreamReader;
use crate::send::batches::{Collector, Reading};
use crate::send::replies::Answers;
use crate::send::shared::Shared;
use crate::send::transmit::Transmitter;
use crate::threads;
use transhume_pages::digest::Digester;

/// Starts the threads on the stream of a post-copy that is resumed, and a link. The VM was handed over.
pub(crate) fn resume(
    shared: &Arc<Shared>,
    section: u32,
    blocks: Vec<Block>,
) -> Result<(), RelayError> {
    shared.set_committed();
    let longest = blocks.iter().map(|block| block.length).max();
    let reading = Arc::new(Reading::new(Arc::clone(shared)));
    // Nothing is compared any more.
    let collector = Collector::new(reading, Digester::new(&[0; 16]), false);
    let stream = copy(&shared.sockets().stream)?;
    let reader = StreamReader::resumed(stream, collector, section, blocks);
    spawn(shared, "relay-stream", move || reader.run())?;
    spawn_link(shared, Passing::resumed(longest.unwrap_or_default()))
}

/// Starts the threads on a stream and a link.
pub(crate) fn start(shared: &Arc<Shared>, digester: &Digester) -> Result<(), RelayError> {
    let reading = Arc::new(Reading::new(Arc::clone(shared)));
    let channels = &shared.sockets().channels;
    let barrier = (!channels.is_empty()).then(|| Arc::new(MultifdBarrier::new(channels.len())));
    let collector = || {
        let reading = Arc::clone(&reading);
        Collector::new(reading, digester.clone(), barrier.is_some())
    };
    if let Some(barrier) = &barrier {
        let closed = Arc::clone(barrier);
        shared.at_stop(move || closed.close());
        for channel in channels {
            let channel = ChannelReader::new(copy(channel)?, collector(), Arc::clone(barrier));
            spawn(shared, "relay-channel", move || channel.run())?;
        }
    }
    if let Some(doubt) = shared.doubt.clone() {
        let this = Arc::clone(shared);
        spawn(shared, "relay-doubt", move || {
            match doubt.run(&this.hints, &this.flow) {
                // It was handed over while the destination did not answer.
                Err(_) if this.is_committed() => Ok(()),
                result => result,
            }
        })?;
    }
    let stream = copy(&shared.sockets().stream)?;
    let reader = StreamReader::new(stream, collector(), barrier.clone());
    spawn(shared, "relay-stream", move || reader.run())?;
    spawn_link(shared, Passing::default())
}

fn spawn_link(shared: &Arc<Shared>, mut passing: Passing) -> Result<(), RelayError> {
    let transmitter = Transmitter::new(shared.session().clone(), Arc::clone(shared));
    let return_path = Box::new(move |bytes: &[u8], shared: &Shared| passing.pass(bytes, shared));
    let answers = Answers::new(shared.session().clone(), Arc::clone(shared), return_path);
    spawn(shared, "relay-link-out", move || transmitter.run())?;
    spawn(shared, "relay-link-in", move || answers.run())
}

fn copy(socket: &UnixStream) -> Result<UnixStream, RelayError> {
    socket.try_clone().map_err(RelayError::Socket)
}

fn spawn(
    shared: &Arc<Shared>,
    name: &str,
    run: impl FnOnce() -> Result<(), RelayError> + Send + 'static,
) -> Result<(), RelayError> {
    let shared = Arc::clone(shared);
    threads::spawn(name, run, move |error| shared.stop(error))
}
