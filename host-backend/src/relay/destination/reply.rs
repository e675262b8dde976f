//! What the destination says to the source while memory moves.

use std::sync::mpsc::{Receiver, RecvTimeoutError};

use transhume_protocol::link::{Ack, Control, FrameKind, Verdict};

use crate::link::{ALIVE_INTERVAL, Sender};
use crate::relay::error::RelayError;

/// A message to the source.
#[derive(Debug, PartialEq)]
pub(super) enum Reply {
    Verdict(Verdict),
    Ack(Ack),
    ReturnPath(Vec<u8>),
    Control(Control),
    /// Ends the thread when everything before was sent.
    Stop,
}

/// Replies that are joined before they are sent, at most.
const JOINED: usize = 256;

/// Sends replies until it is told to stop.
pub(super) fn run(mut sender: Sender, replies: &Receiver<Reply>) -> Result<(), RelayError> {
    loop {
        let first = match replies.recv_timeout(ALIVE_INTERVAL) {
            Ok(first) => first,
            Err(RecvTimeoutError::Timeout) => {
                sender.send(FrameKind::Alive, &[])?;
                continue;
            }
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        };
        for reply in join(
            std::iter::once(first)
                .chain(replies.try_iter())
                .take(JOINED),
        ) {
            match reply {
                Reply::Verdict(verdict) => sender.send(FrameKind::Verdict, &[&verdict.encode()])?,
                Reply::Ack(ack) => sender.send(FrameKind::Ack, &[&ack.encode()])?,
                Reply::ReturnPath(bytes) => sender.send(FrameKind::ReturnPath, &[&bytes])?,
                Reply::Control(message) => sender.send_control(&message)?,
                Reply::Stop => return Ok(()),
            }
        }
    }
}

/// Joins verdicts on the same batch, and leaves out acknowledgements that a later one contains.
fn join(replies: impl Iterator<Item = Reply>) -> Vec<Reply> {
    let mut joined: Vec<Reply> = Vec::new();
    for reply in replies {
        let before = joined
            .iter_mut()
            .rev()
            .find(|before| match (before, &reply) {
                (Reply::Verdict(before), Reply::Verdict(verdict)) => before.batch == verdict.batch,
                (Reply::Ack(_), Reply::Ack(_)) => true,
                _ => false,
            });
        match (before, reply) {
            (Some(Reply::Verdict(before)), Reply::Verdict(verdict)) => {
                before.settled += verdict.settled;
                before.wanted.extend(verdict.wanted);
            }
            (Some(before), reply @ Reply::Ack(_)) => *before = reply,
            (_, reply) => joined.push(reply),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(batch: u64, settled: u32, wanted: &[u32]) -> Reply {
        Reply::Verdict(Verdict {
            batch,
            settled,
            wanted: wanted.to_vec(),
        })
    }

    fn ack(batch_bytes: u64) -> Reply {
        Reply::Ack(Ack {
            batch_bytes,
            disk_bytes: 0,
        })
    }

    #[test]
    fn joins_what_says_the_same() {
        let replies = [
            verdict(1, 2, &[5]),
            ack(10),
            verdict(2, 1, &[]),
            verdict(1, 3, &[7]),
            Reply::ReturnPath(vec![1]),
            ack(30),
            Reply::Stop,
        ];
        let joined = join(replies.into_iter());
        let expected = [
            verdict(1, 5, &[5, 7]),
            ack(30),
            verdict(2, 1, &[]),
            Reply::ReturnPath(vec![1]),
            Reply::Stop,
        ];
        assert_eq!(joined, expected);
    }
}
