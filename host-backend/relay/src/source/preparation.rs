//! Gets everything ready before memory moves: the destination's QEMU, the link, the guest's agent, and the sockets
//! into which the own QEMU migrates.

use std::num::NonZeroU8;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::watch;
use transhume_protocol::link::{Control, PostCopy};

use super::agent_listener::AgentListener;
use super::cancel::cancelled;
use super::migration::Migration;
use super::negotiation::{Accepted, Agreement};
use super::stop::Stop;
use crate::error::RelayError;
use crate::send::clocks::Clocks;
use crate::send::hints::Hints;
use crate::send::link_rate::LinkRate;
use crate::send::packer::Packer;
use crate::send::prefetch::Prefetch;
use crate::send::shared::Sockets;
use crate::storage::agreed::Agreed;
use transhume_guest::DiskName;
use transhume_hypervisor as hypervisor;
use transhume_hypervisor::qmp::Version;
use transhume_hypervisor::stream::MigrationListener;
use transhume_link::session::{Rejoin, Session};
use transhume_link::{self as link, Connection, START_TIMEOUT};

/// The destination's QEMU waits for the stream.
pub(crate) struct Ready {
    connection: Connection,
    token: [u8; 16],
    connections: u8,
    pub(crate) switchover_ack: bool,
    /// Why the VM cannot come in post-copy.
    pub(crate) no_post_copy: Option<String>,
    /// The disks, as both hosts have agreed on them.
    pub(crate) storage: Agreed,
}

/// Why it does not.
enum NotReady {
    /// The destination cannot.
    GaveUp(String),
    Link(link::Error),
}

/// Has the destination start its QEMU, and asks for its clock. Blocks.
fn prepare(
    accepted: Accepted,
    clocks: &Clocks,
    patience: u16,
    post_copy: PostCopy,
) -> Result<Ready, NotReady> {
    let Accepted {
        mut connection,
        switchover_ack,
        storage,
        ..
    } = accepted;
    clocks.ask(&mut connection).map_err(NotReady::Link)?;
    let prepare = Control::Prepare {
        switchover_ack,
        connections: connections(),
        patience,
        post_copy,
    };
    connection.send(&prepare).map_err(NotReady::Link)?;
    match connection.receive(START_TIMEOUT).map_err(NotReady::Link)? {
        Control::Ready {
            token,
            connections,
            no_post_copy,
        } => Ok(Ready {
            connection,
            token,
            connections,
            switchover_ack,
            no_post_copy,
            storage,
        }),
        Control::Abort { reason } => Err(NotReady::GaveUp(reason)),
        _ => Err(NotReady::Link(link::Error::Unexpected(
            "no answer to a start",
        ))),
    }
}

/// Connections that a session should have: each takes most of a CPU, and the guests need some.
pub(crate) fn connections() -> u8 {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    u8::try_from(cpus / 2).unwrap_or(u8::MAX).clamp(1, 4)
}

impl Migration {
    pub(crate) fn listen_to_agent(
        &self,
        hints: &Arc<Hints>,
        order: &Arc<Prefetch>,
    ) -> AgentListener {
        let vm = &self.request.vm;
        let disks = self
            .facts
            .offer
            .disks
            .iter()
            .map(|disk| DiskName {
                serial: disk.id.clone(),
                size: disk.size,
            })
            .collect();
        let socket = vm.agent_socket().map(PathBuf::from);
        let agent = match socket {
            _ if !self.facts.running => Err("the VM is paused, and with it its agent"),
            None => Err("the VM has no agent channel"),
            Some(socket) => Ok(socket),
        };
        AgentListener::start(
            agent,
            disks,
            self.facts.offer.job,
            Arc::clone(hints),
            Arc::clone(&self.progress),
            Arc::clone(order),
            Arc::clone(&self.clocks),
        )
    }

    /// Has the destination start its QEMU; begins again with that when the connection breaks.
    pub(crate) async fn prepare_destination(
        &mut self,
        mut accepted: Accepted,
        mut agreement: Agreement,
        cancel: &mut watch::Receiver<bool>,
    ) -> Result<Ready, Stop> {
        let patience = self.request.link_patience.as_secs();
        let patience = u16::try_from(patience).unwrap_or(u16::MAX);
        let post_copy = self.post_copy;
        self.may_wait_for_us = true;
        loop {
            let clocks = Arc::clone(&self.clocks);
            let prepared = transhume_base::task::blocking(move || {
                prepare(accepted, &clocks, patience, post_copy)
            });
            let prepared = tokio::select! {
                prepared = prepared => prepared,
                () = cancelled(cancel) => return Err(Stop::Cancelled),
            };
            match prepared {
                Ok(Ok(ready)) => {
                    self.early_breaks = agreement.breaks();
                    return Ok(ready);
                }
                Ok(Err(NotReady::GaveUp(reason))) => {
                    self.may_wait_for_us = false;
                    return Err(Stop::Failed(reason));
                }
                Ok(Err(NotReady::Link(error))) => {
                    agreement.renew(error, &mut self.facts, cancel).await?;
                    accepted = agreement.reach(&mut self.facts, cancel).await?;
                    // The number is another one.
                    self.note()?;
                }
                Err(error) => return Err(Stop::Failed(error.to_string())),
            }
        }
    }

    pub(crate) fn begin_session(
        &mut self,
        ready: Ready,
        rate: &Arc<LinkRate>,
    ) -> Result<Session<Packer>, Stop> {
        let rejoin = Rejoin {
            address: self.request.destination.address.clone(),
            host: self.request.destination.host.clone(),
            security: self.request.destination.security.clone(),
            job: self.facts.offer.job,
            token: ready.token,
        };
        let connections = ready.connections.min(connections());
        let (progress, rate) = (Arc::clone(&self.progress), Arc::clone(rate));
        let session = Session::begin(
            ready.connection,
            self.request.link_patience,
            Some((rejoin, connections)),
            move || Packer::new(Arc::clone(&progress), Arc::clone(&rate)),
        );
        let session = session.map_err(RelayError::from)?;
        self.session = Some(session.clone());
        Ok(session)
    }

    /// Where QEMU is to open its channels, and how many, if it is to have some.
    pub(crate) fn channels(&self) -> Option<(MigrationListener, NonZeroU8)> {
        let known = &self.facts.capabilities;
        let known = known.iter().any(|(name, _)| name == "multifd");
        if !known
            || self.may_go_over()
            || !Version::from(self.facts.offer.qemu).tells_channels_order()
        {
            return None;
        }
        let channels =
            NonZeroU8::new(self.request.qemu_channels).filter(|channels| channels.get() > 1)?;
        let vm = &self.request.vm;
        match MigrationListener::open(vm.files().folder(), vm.qmp().pid()?) {
            Ok(door) => Some((door?, channels)),
            Err(error) => {
                tracing::warn!(%error, "QEMU gets no channels");
                None
            }
        }
    }

    /// Lets QEMU migrate into sockets of ours, and returns them, and QEMU's end where it was ours to make.
    pub(crate) async fn connect_qemu(
        &self,
        door: Option<(MigrationListener, NonZeroU8)>,
    ) -> Result<(Sockets, Option<OwnedFd>), Stop> {
        let qmp = self.request.vm.qmp();
        let Some((door, channels)) = door else {
            let (stream, theirs) = hypervisor::stream::pair()?;
            let copy = theirs.try_clone()?;
            qmp.migrate(theirs).await?;
            let channels = Vec::new();
            return Ok((Sockets { stream, channels }, Some(copy)));
        };
        qmp.migrate_to(&door).await?;
        // QEMU opens the channels when it has the stream.
        let stream = door.accept().await?;
        let mut sockets = Vec::new();
        for _ in 0..channels.get() {
            sockets.push(door.accept().await?);
        }
        let channels = sockets;
        Ok((Sockets { stream, channels }, None))
    }
}
