//! What the destination says to the source while memory moves.

use std::sync::Arc;
use std::sync::mpsc;

use transhume_protocol::link::{Control, FrameKind, Verdict, encode_ack};

use crate::link::{ALIVE_INTERVAL, Sender};
use crate::relay::error::RelayError;

/// A message to the source.
#[derive(Debug)]
pub(super) enum Reply {
    Verdict(Verdict),
    /// Bytes of batches worked off since the start.
    Ack(u64),
    ReturnPath(Vec<u8>),
    Control(Control),
    /// Ends the thread when everything before was sent.
    Stop,
}

/// Sends replies until it is told to stop; then gives the connection back.
pub(super) fn run(
    mut sender: Sender,
    replies: &mpsc::Receiver<Reply>,
    stop: &Arc<dyn Fn() + Send + Sync>,
) -> Result<Sender, RelayError> {
    let result = loop {
        let sent = match replies.recv_timeout(ALIVE_INTERVAL) {
            Ok(Reply::Verdict(verdict)) => sender.send(FrameKind::Verdict, &[&verdict.encode()]),
            Ok(Reply::Ack(bytes)) => sender.send(FrameKind::Ack, &[&encode_ack(bytes)]),
            Ok(Reply::ReturnPath(bytes)) => sender.send(FrameKind::ReturnPath, &[&bytes]),
            Ok(Reply::Control(message)) => sender.send_control(&message),
            Err(mpsc::RecvTimeoutError::Timeout) => sender.send(FrameKind::Alive, &[]),
            Ok(Reply::Stop) | Err(mpsc::RecvTimeoutError::Disconnected) => return Ok(sender),
        };
        if let Err(error) = sent {
            break Err(error.into());
        }
    };
    stop();
    result
}
