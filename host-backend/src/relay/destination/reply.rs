//! What the destination says to the source while memory moves.

use std::sync::mpsc::Receiver;
use std::time::Duration;

use transhume_protocol::link::{Ack, Control, FrameKind, Verdict, encode_control};

use crate::link::session::{Prepared, Ready, Session};
use crate::relay::error::RelayError;

/// A message to the source.
#[derive(Debug, PartialEq)]
pub(super) enum Reply {
    Verdict(Verdict),
    Ack(Ack),
    ReturnPath(Vec<u8>),
    Control(Control),
    /// Ends the session and the thread when the source has worked off everything before, or after that time.
    Last(Duration),
}

/// Replies that are joined before they are sent, at most.
const JOINED: usize = 256;

/// Sends replies until it is told to stop.
pub(super) fn run(session: &Session<Ready>, replies: &Receiver<Reply>) -> Result<(), RelayError> {
    while let Ok(first) = replies.recv() {
        for reply in join(
            std::iter::once(first)
                .chain(replies.try_iter())
                .take(JOINED),
        ) {
            let (kind, payload) = match reply {
                Reply::Verdict(verdict) => (FrameKind::Verdict, verdict.encode()),
                Reply::Ack(ack) => (FrameKind::Ack, ack.encode().to_vec()),
                Reply::ReturnPath(bytes) => (FrameKind::ReturnPath, bytes),
                Reply::Control(message) => (FrameKind::Control, encode_control(&message)?),
                Reply::Last(patience) => {
                    session.drain(patience);
                    session.close();
                    return Ok(());
                }
            };
            let length = payload.len();
            session.send(Prepared::new(kind, payload), length, length)?;
        }
    }
    Ok(())
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
            Reply::Last(Duration::ZERO),
        ];
        let joined = join(replies.into_iter());
        let expected = [
            verdict(1, 5, &[5, 7]),
            ack(30),
            verdict(2, 1, &[]),
            Reply::ReturnPath(vec![1]),
            Reply::Last(Duration::ZERO),
        ];
        assert_eq!(joined, expected);
    }
}
