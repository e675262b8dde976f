//! What the destination says to the source while memory moves.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use transhume_protocol::link::{Ack, Control, FrameKind, Verdict, encode_control};

use crate::error::RelayError;
use transhume_link::session::{Prepared, Ready, Session};

/// A message to the source.
#[derive(Debug, PartialEq)]
pub(crate) enum Reply {
    Verdict(Verdict),
    Ack(Ack),
    ReturnPath(Vec<u8>),
    Control(Control),
    /// Ends the session and the thread when the source has worked off everything before, or after that time.
    Last(Duration),
}

/// Replies that are joined before they are sent, at most.
const JOINED: usize = 256;
/// Bytes of replies that wait, at most. Whoever is about to cause some waits for room before; so it may be more by what
/// one batch is answered with.
const LIMIT: usize = 4 << 20;

impl Reply {
    /// Bytes of memory that it takes, about.
    fn size(&self) -> usize {
        let beside = match self {
            Self::Verdict(verdict) => size_of_val(verdict.wanted.as_slice()),
            Self::ReturnPath(bytes) => bytes.len(),
            Self::Ack(_) | Self::Control(_) | Self::Last(_) => 0,
        };
        size_of::<Self>() + beside
    }
}

#[derive(Default)]
struct Queue {
    replies: VecDeque<Reply>,
    size: usize,
    is_over: bool,
}

/// Replies that wait for the link: a source that takes none of them gets no more to answer.
#[derive(Default)]
pub(crate) struct Replies {
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Replies {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a reply behind all others, room or not; whether anybody takes it.
    pub(crate) fn send(&self, reply: Reply) -> bool {
        let mut queue = self.lock();
        if queue.is_over {
            return false;
        }
        queue.size += reply.size();
        queue.replies.push_back(reply);
        drop(queue);
        self.changed.notify_all();
        true
    }

    /// Whether there is room for more.
    pub(crate) fn has_room(&self) -> bool {
        self.lock().size < LIMIT
    }

    /// Waits until there is.
    ///
    /// # Errors
    /// If nobody takes replies any more.
    pub(crate) fn wait_for_room(&self) -> Result<(), RelayError> {
        let mut queue = self.lock();
        while queue.size >= LIMIT && !queue.is_over {
            queue = self.wait(queue);
        }
        if queue.is_over {
            return Err(RelayError::Stopped);
        }
        Ok(())
    }

    fn wait<'a>(&self, queue: MutexGuard<'a, Queue>) -> MutexGuard<'a, Queue> {
        self.changed
            .wait(queue)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// What has come; waits for it.
    fn take(&self) -> Vec<Reply> {
        let mut queue = self.lock();
        while queue.replies.is_empty() {
            queue = self.wait(queue);
        }
        let some = queue.replies.len().min(JOINED);
        let taken: Vec<Reply> = queue.replies.drain(..some).collect();
        queue.size -= taken.iter().map(Reply::size).sum::<usize>();
        drop(queue);
        self.changed.notify_all();
        taken
    }

    /// All that waits, without waiting.
    #[cfg(test)]
    pub(crate) fn take_all(&self) -> Vec<Reply> {
        let mut queue = self.lock();
        queue.size = 0;
        queue.replies.drain(..).collect()
    }

    /// Nobody takes replies from here on.
    pub(crate) fn end(&self) {
        let mut queue = self.lock();
        queue.is_over = true;
        queue.replies.clear();
        drop(queue);
        self.changed.notify_all();
    }
}

/// Sends replies until it is told to stop.
pub(crate) fn run(session: &Session<Ready>, replies: &Replies) -> Result<(), RelayError> {
    let result = send(session, replies);
    replies.end();
    result
}

fn send(session: &Session<Ready>, replies: &Replies) -> Result<(), RelayError> {
    loop {
        for reply in join(replies.take().into_iter()) {
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

    #[test]
    fn who_takes_no_replies_gets_no_more_to_answer() {
        let replies = Replies::default();
        while replies.has_room() {
            assert!(replies.send(verdict(1, 0, &[7; 1000])));
        }
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| replies.wait_for_room());
            while !replies.has_room() {
                assert!(!replies.take().is_empty());
            }
            assert!(waits.join().expect("it ends").is_ok());
        });
        while replies.has_room() {
            assert!(replies.send(Reply::ReturnPath(vec![0; 1000])));
        }
        replies.end();
        assert!(replies.wait_for_room().is_err());
        assert!(!replies.send(ack(1)));
    }
}
