//! What the destination says to the source while memory moves.

use std::sync::mpsc::{Receiver, RecvTimeoutError};

use transhume_protocol::link::{Ack, Control, FrameKind, Verdict};

use crate::link::{ALIVE_INTERVAL, Sender};
use crate::relay::error::RelayError;

/// A message to the source.
#[derive(Debug)]
pub(super) enum Reply {
    Verdict(Verdict),
    Ack(Ack),
    ReturnPath(Vec<u8>),
    Control(Control),
    /// Ends the thread when everything before was sent.
    Stop,
}

/// Sends replies until it is told to stop.
pub(super) fn run(mut sender: Sender, replies: &Receiver<Reply>) -> Result<(), RelayError> {
    loop {
        match replies.recv_timeout(ALIVE_INTERVAL) {
            Ok(Reply::Verdict(verdict)) => sender.send(FrameKind::Verdict, &[&verdict.encode()])?,
            Ok(Reply::Ack(ack)) => sender.send(FrameKind::Ack, &[&ack.encode()])?,
            Ok(Reply::ReturnPath(bytes)) => sender.send(FrameKind::ReturnPath, &[&bytes])?,
            Ok(Reply::Control(message)) => sender.send_control(&message)?,
            Err(RecvTimeoutError::Timeout) => sender.send(FrameKind::Alive, &[])?,
            Ok(Reply::Stop) | Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
    }
}
