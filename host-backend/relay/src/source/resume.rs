//! Sends the rest of a VM's memory, after the stream of its post-copy broke: the link was away for too long, a
//! daemon or a QEMU's socket ended. Both QEMUs wait then (`postcopy-paused`), and neither can go back. So this
//! tries for as long as both are there, whatever is in the way.
//!
//! QEMU's new stream has no header. In it the destination's QEMU tells which pages it has, and the source's sends all
//! others: what was on its way when the first stream broke comes again.

use std::sync::Arc;
use std::time::{Duration, Instant};

use transhume_protocol::link::{Control, GuestEnd, Stalls};
use transhume_protocol::memory::Block;

use super::preparation::connections;
use super::request::Destination;
use super::{engine, remainder};
use crate::error::{CutOff, RelayError};
use crate::progress::Progress;
use crate::qemu::return_path;
use crate::send::clocks::Clocks;
use crate::send::hints::Hints;
use crate::send::link_rate::LinkRate;
use crate::send::packer::Packer;
use crate::send::queue::SendQueue;
use crate::send::shared::{Shared, Sockets};
use crate::{Error, ram_blocks};
use transhume_api::migration::Phase;
use transhume_hypervisor::{Vm, stream};
use transhume_link::session::{Rejoin, Session};
use transhume_link::{Connection, START_TIMEOUT};

/// Between two tries.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// How long QEMU may take to notice that its stream broke, before it is told to.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(5);
const PAUSE_POLL_INTERVAL: Duration = Duration::from_millis(100);

/// A VM that was handed over in post-copy, and part of whose memory is here.
#[derive(Clone)]
pub struct Rest {
    /// Its QEMU here.
    pub vm: Arc<Vm>,
    /// This host.
    pub from: String,
    /// Where it runs.
    pub destination: Destination,
    /// The number of the offer by which it moved.
    pub number: u64,
    /// How long the link may be away before QEMU has to be resumed once more.
    pub link_patience: Duration,
}

/// Why a try did not succeed.
enum ResumeRefusal {
    /// Nor will another: one of the QEMUs is gone.
    Never(String),
    /// Nor need another: the guest has ended by itself.
    GuestEnded(GuestEnd),
    /// Another may.
    Retry(String),
}

impl From<CutOff> for ResumeRefusal {
    fn from(cut: CutOff) -> Self {
        match cut {
            CutOff::GuestEnded(how) => Self::GuestEnded(how),
            CutOff::Broken(cause) => Self::Retry(cause),
        }
    }
}

impl From<transhume_hypervisor::Error> for ResumeRefusal {
    fn from(error: transhume_hypervisor::Error) -> Self {
        Self::Retry(error.to_string())
    }
}

impl From<RelayError> for ResumeRefusal {
    fn from(error: RelayError) -> Self {
        Self::Retry(error.to_string())
    }
}

/// What the destination says.
enum Answer {
    /// All memory is there.
    Whole,
    /// Its QEMU waits for the stream.
    Begun {
        connection: Connection,
        token: [u8; 16],
        connections: u8,
        section: u32,
        blocks: Vec<(String, u64)>,
    },
}

impl Rest {
    /// Sends the rest, until all of it is there; what waiting for it cost the guest since then, if that was told.
    /// `cause`: why the stream broke, for people.
    ///
    /// # Errors
    /// [`Error::Broken`] when one of the QEMUs has ended; [`Error::Ended`] when the guest has, by itself.
    pub async fn send(
        &self,
        mut cause: String,
        progress: &Arc<Progress>,
    ) -> Result<Option<Stalls>, Error> {
        let Destination { host: to, .. } = &self.destination;
        let mut told = String::new();
        loop {
            if told != cause {
                tracing::warn!(cause, "post-copy is cut off, and is to go on");
                told.clone_from(&cause);
            }
            progress.wait_for(Some(format!(
                "{to}, to send it the rest of the memory: {cause}"
            )));
            match self.try_once(progress).await {
                Ok(stalls) => {
                    progress.wait_for(None);
                    return Ok(stalls);
                }
                Err(ResumeRefusal::Never(cause)) => {
                    progress.wait_for(None);
                    progress.enter(Phase::Lost);
                    return Err(Error::Broken {
                        vm: self.vm.name().to_owned(),
                        to: to.clone(),
                        cause,
                    });
                }
                Err(ResumeRefusal::GuestEnded(how)) => {
                    progress.wait_for(None);
                    return Err(self.over(how, progress).await);
                }
                Err(ResumeRefusal::Retry(why)) => cause = why,
            }
            tokio::time::sleep(RETRY_INTERVAL).await;
        }
    }

    /// The guest has ended at the destination: nobody needs what is here.
    pub(crate) async fn over(&self, how: GuestEnd, progress: &Progress) -> Error {
        // What its QEMU has of the memory is of a guest that is no more.
        if let Err(error) = self.vm.discard_whole().await {
            tracing::warn!(%error, "QEMU of the VM that has ended elsewhere cannot be ended");
        }
        progress.enter(Phase::Ended);
        let to = &self.destination.host;
        Error::Ended {
            vm: self.vm.name().to_owned(),
            host: to.clone(),
            how,
            next: format!("`transhume vm start` starts it again, at {to} or elsewhere"),
        }
    }

    async fn try_once(&self, progress: &Arc<Progress>) -> Result<Option<Stalls>, ResumeRefusal> {
        let sent = self.is_sent().await;
        if matches!(sent, Ok(true)) {
            return Ok(None);
        }
        let rest = self.clone();
        let asked = transhume_base::task::blocking(move || rest.ask()).await;
        let answer = asked.map_err(|error| ResumeRefusal::Retry(error.to_string()))??;
        // QEMU 7.2 can wait for ever for a last word that was lost.
        if !matches!(answer, Answer::Whole) {
            sent?;
        }
        let Answer::Begun {
            connection,
            token,
            connections,
            section,
            blocks,
        } = answer
        else {
            return Ok(None);
        };
        let memory = self.vm.definition().memory.bytes();
        let blocks = ram_blocks::check(blocks.into_iter(), memory).map_err(RelayError::from)?;
        let rejoin = Rejoin {
            address: self.destination.address.clone(),
            host: self.destination.host.clone(),
            security: self.destination.security.clone(),
            job: self.number,
            token,
        };
        let rate = Arc::new(LinkRate::default());
        let (counted, timed) = (Arc::clone(progress), Arc::clone(&rate));
        let session = Session::begin(
            connection,
            self.link_patience,
            Some((rejoin, connections)),
            move || Packer::new(Arc::clone(&counted), Arc::clone(&timed)),
        );
        let session = session.map_err(RelayError::from)?;
        let ended = self.relay(session.clone(), rate, section, blocks, progress);
        let ended = ended.await;
        session.close();
        ended
    }

    /// Relays QEMU's new stream until all is sent, or the stream breaks.
    async fn relay(
        &self,
        session: Session<Packer>,
        rate: Arc<LinkRate>,
        section: u32,
        blocks: Vec<Block>,
        progress: &Arc<Progress>,
    ) -> Result<Option<Stalls>, ResumeRefusal> {
        let (ours, theirs) =
            stream::pair().map_err(|error| ResumeRefusal::Retry(error.to_string()))?;
        stream::narrow(&theirs);
        let flow = Arc::new(SendQueue::new());
        // Nothing is referred to a disk any more.
        let hints = Arc::new(Hints::new(Arc::default(), Arc::clone(&flow)));
        // Nor ordered: what the guest worked with was long ago.
        let order = Arc::default();
        let qemu = Sockets {
            stream: ours,
            channels: Vec::new(),
        };
        let shared = Shared::new(
            flow,
            hints,
            order,
            Arc::clone(progress),
            qemu,
            session,
            rate,
            false,
            None,
            Arc::new(Clocks::new(None)),
            return_path::page_requests,
        );
        let shared = Arc::new(shared);
        let begun = engine::resume(&shared, section, blocks);
        let sent = async {
            begun?;
            self.vm.qmp().migrate_resume(theirs).await?;
            tracing::info!("post-copy goes on");
            progress.wait_for(None);
            let rest = remainder::rest(&self.vm, &shared, progress);
            rest.await?;
            Ok(remainder::stalls(&shared).await)
        };
        let sent = sent.await;
        shared.stop(RelayError::Stopped);
        sent
    }

    /// Whether QEMU has sent all, and knows it; else it waits for a new stream when this returns.
    async fn is_sent(&self) -> Result<bool, ResumeRefusal> {
        let qmp = self.vm.qmp();
        let since = Instant::now();
        loop {
            if qmp.is_closed() {
                let cause = format!("{}'s QEMU has ended: {}", self.from, qmp.closed().await);
                return Err(ResumeRefusal::Never(cause));
            }
            let said = qmp.query_migrate().await?;
            let status = said.status.unwrap_or_default();
            match status.as_str() {
                "completed" => return Ok(true),
                "postcopy-paused" => return Ok(false),
                "failed" | "cancelled" => {
                    let said = said.error_desc.unwrap_or_default();
                    let cause = format!("{}'s QEMU gave it up: {said}", self.from);
                    return Err(ResumeRefusal::Never(cause));
                }
                _ if since.elapsed() > PAUSE_TIMEOUT => {
                    // It may wait in its socket.
                    let told = qmp.migrate_pause().await;
                    let told = told.err().map_or_else(String::new, |e| e.to_string());
                    return Err(ResumeRefusal::Retry(format!(
                        "{}'s QEMU has not paused its migration, which is \"{status}\" {told}",
                        self.from
                    )));
                }
                _ => tokio::time::sleep(PAUSE_POLL_INTERVAL).await,
            }
        }
    }

    /// Asks the destination to take the rest. Blocks.
    fn ask(&self) -> Result<Answer, ResumeRefusal> {
        let Destination {
            host,
            address,
            security,
        } = &self.destination;
        let text = |error: transhume_link::Error| ResumeRefusal::Retry(error.to_string());
        let mut connection = Connection::open(address, host, security).map_err(text)?;
        let patience = self.link_patience.as_secs();
        let resume = Control::Resume {
            job: self.number,
            vm: self.vm.name().to_owned(),
            connections: connections(),
            patience: u16::try_from(patience).unwrap_or(u16::MAX),
        };
        connection.send(&resume).map_err(text)?;
        match connection.receive(START_TIMEOUT).map_err(text)? {
            Control::AlreadyComplete => Ok(Answer::Whole),
            Control::Outcome { taken: false } => Err(ResumeRefusal::Never(format!(
                "{host}'s QEMU of it has ended"
            ))),
            Control::GuestEnded(how) => Err(ResumeRefusal::GuestEnded(how)),
            Control::Refused { reasons } => Err(ResumeRefusal::Retry(reasons.join("; "))),
            Control::Resumed {
                token,
                connections: granted,
                section,
                blocks,
            } => Ok(Answer::Begun {
                connection,
                token,
                connections: granted.min(connections()),
                section,
                blocks,
            }),
            _ => Err(ResumeRefusal::Retry(format!(
                "{host} answered with something else"
            ))),
        }
    }
}
