//! Comes to an agreement with the destination. A connection that breaks before the session is made again,
//! and the VM offered anew on it: nothing is copied yet, and the destination ends what it began for the
//! earlier offer before it answers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use transhume_protocol::link::{Control, Offer};

use super::cancel::cancelled;
use super::request::{Destination, Request};
use super::stop::Stop;
use super::survey::SourceVm;
use crate::storage::agreed::{Agreed, NotAgreed, Ours};
use crate::{Error, Stays};
use transhume_hypervisor::Vm;
use transhume_link::{self as link, Connection, REFUSALS, TIMEOUT};

/// How long the destination may look at its disks and its QEMU, and before that end an earlier attempt.
const LOOK_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a connection may take that replaces a broken one.
const RECONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Between two attempts.
const RETRY_INTERVAL: Duration = Duration::from_millis(300);
/// Connections that are made before the session, at most. Whoever takes so many and keeps none is no destination.
const MAX_CONNECTIONS: u32 = 8;

/// What the destination accepted.
pub(crate) struct Accepted {
    pub(crate) connection: Connection,
    pub(crate) qemu: [u32; 3],
    /// Both QEMUs have `switchover-ack`.
    pub(crate) switchover_ack: bool,
    /// Why the VM must not go in post-copy.
    pub(crate) no_post_copy: Option<String>,
    /// The disks, which are the same there.
    pub(crate) storage: Agreed,
}

/// Why there is no agreement.
#[derive(Debug)]
pub(crate) enum Disagreement {
    Cancelled,
    Refused { reasons: Vec<String> },
}

impl From<Disagreement> for Stop {
    fn from(not: Disagreement) -> Self {
        match not {
            Disagreement::Cancelled => Self::Cancelled,
            Disagreement::Refused { reasons } => Self::Failed(reasons.join("; ")),
        }
    }
}

impl Disagreement {
    /// What it is for a VM that was not touched.
    pub(crate) fn untouched(self, host: &str, running: bool) -> Error {
        match self {
            Self::Cancelled => Error::Cancelled {
                host: host.to_owned(),
                stays: if running {
                    Stays::Running
                } else {
                    Stays::Paused
                },
            },
            Self::Refused { reasons } => Error::Refused { reasons },
        }
    }
}

/// Whether a migration is begun once more whose connection broke. Without a clock of its own.
struct Patience {
    patience: Duration,
    /// How many there were so far; each of them broke but the last one.
    connections: u32,
    away: Option<Instant>,
    refused: Option<Instant>,
}

impl Patience {
    fn new(patience: Duration) -> Self {
        Self {
            patience,
            connections: 0,
            away: None,
            refused: None,
        }
    }

    fn connected(&mut self) {
        self.connections += 1;
        self.away = None;
        self.refused = None;
    }

    /// A connection broke, or none could be made. An error is what the migration fails of.
    fn again(&mut self, error: link::Error, now: Instant) -> Result<(), link::Error> {
        if self.connections == 0 || !error.is_of_the_link() {
            return Err(error);
        }
        let away = now.saturating_duration_since(*self.away.get_or_insert(now));
        if error.is_refusal() {
            let since = *self.refused.get_or_insert(now);
            if now.saturating_duration_since(since) >= REFUSALS {
                return Err(error);
            }
        } else {
            self.refused = None;
        }
        if self.connections >= MAX_CONNECTIONS {
            return Err(error);
        }
        if away >= self.patience {
            return Err(link::Error::Away {
                seconds: self.patience.as_secs(),
                cause: error.to_string(),
            });
        }
        Ok(())
    }
}

/// How an attempt failed.
enum Failure {
    /// There was no connection.
    Unreachable(link::Error),
    /// There was one.
    Broke(link::Error),
    Refused(Vec<String>),
}

impl From<NotAgreed> for Failure {
    fn from(not: NotAgreed) -> Self {
        match not {
            NotAgreed::Broke(error) => Self::Broke(error),
            NotAgreed::Refused(reasons) => Self::Refused(reasons),
        }
    }
}

/// See the module.
pub(crate) struct Agreement {
    vm: Arc<Vm>,
    destination: Destination,
    patience: Patience,
}

impl Agreement {
    pub(crate) fn new(request: &Request) -> Self {
        Self {
            vm: Arc::clone(&request.vm),
            destination: request.destination.clone(),
            patience: Patience::new(request.link_patience),
        }
    }

    /// After an agreement: how many connections broke before.
    pub(crate) fn breaks(&self) -> u32 {
        self.patience.connections.saturating_sub(1)
    }

    /// Offers the VM until the destination answers.
    pub(crate) async fn reach(
        &mut self,
        facts: &mut SourceVm,
        cancel: &mut watch::Receiver<bool>,
    ) -> Result<Accepted, Disagreement> {
        loop {
            let (destination, offer) = (self.destination.clone(), facts.offer.clone());
            let vm = Arc::clone(&self.vm);
            let has_ack = facts
                .capabilities
                .iter()
                .any(|(name, _)| name == "switchover-ack");
            let patience = match self.patience.connections {
                0 => TIMEOUT,
                _ => RECONNECT_TIMEOUT,
            };
            let attempt = transhume_base::task::blocking(move || {
                negotiate(&vm, &destination, offer, has_ack, patience)
            });
            let result = tokio::select! {
                result = attempt => result,
                () = cancelled(cancel) => return Err(Disagreement::Cancelled),
            };
            match result {
                Ok(Ok(accepted)) => {
                    self.patience.connected();
                    return Ok(accepted);
                }
                Ok(Err(Failure::Refused(reasons))) => {
                    return Err(Disagreement::Refused { reasons });
                }
                Ok(Err(Failure::Unreachable(error))) => self.pause(error, cancel).await?,
                Ok(Err(Failure::Broke(error))) => {
                    self.patience.connected();
                    self.renew(error, facts, cancel).await?;
                }
                Err(error) => return Err(refused(error.to_string())),
            }
        }
    }

    /// A connection broke on which the VM was offered, also one that was agreed on: makes another offer of it
    /// for [`Agreement::reach`], if there may be one.
    pub(crate) async fn renew(
        &mut self,
        error: link::Error,
        facts: &mut SourceVm,
        cancel: &mut watch::Receiver<bool>,
    ) -> Result<(), Disagreement> {
        self.pause(error, cancel).await?;
        facts
            .renew_offer()
            .map_err(|error| refused(error.to_string()))
    }

    async fn pause(
        &mut self,
        error: link::Error,
        cancel: &mut watch::Receiver<bool>,
    ) -> Result<(), Disagreement> {
        tracing::warn!(%error, "no connection to the destination");
        if let Err(error) = self.patience.again(error, Instant::now()) {
            return Err(refused(self.explain(error)));
        }
        tokio::select! {
            () = tokio::time::sleep(RETRY_INTERVAL) => Ok(()),
            () = cancelled(cancel) => Err(Disagreement::Cancelled),
        }
    }

    fn explain(&self, error: link::Error) -> String {
        let Destination { host, address, .. } = &self.destination;
        match error {
            // It names the address and what to look at.
            link::Error::Connect { .. } => error.to_string(),
            link::Error::Away { .. } => format!("{error}; is the network between the hosts up?"),
            error => format!(
                "no agreement with {host} ({address}): {error}; see `journalctl -u transhumed` on {host}, and \
                 whether both hosts have the same version of Transhume"
            ),
        }
    }
}

fn refused(reason: String) -> Disagreement {
    Disagreement::Refused {
        reasons: vec![reason],
    }
}

/// Offers the VM to a peer, and finds out whether it has the same storage. Blocks.
fn negotiate(
    vm: &Vm,
    destination: &Destination,
    mut offer: Offer,
    has_ack: bool,
    patience: Duration,
) -> Result<Accepted, Failure> {
    let Destination {
        host,
        address,
        security,
    } = destination;
    let mut connection =
        Connection::open_within(address, host, security, patience).map_err(Failure::Unreachable)?;
    let ours = Ours::open(vm.definition(), &offer.from)?;
    offer.signs = ours.signs();
    let answer = connection
        .set_patience(TIMEOUT)
        .and_then(|()| connection.send(&Control::Offer(Box::new(offer))))
        .and_then(|()| connection.receive(LOOK_TIMEOUT))
        .map_err(Failure::Broke)?;
    match answer {
        Control::Accepted {
            qemu,
            switchover_ack,
            no_post_copy,
            storage,
        } => match ours.agree(*storage, host, &mut connection) {
            Ok(storage) => Ok(Accepted {
                connection,
                qemu,
                no_post_copy,
                switchover_ack: switchover_ack && has_ack,
                storage,
            }),
            Err(not) => {
                if let NotAgreed::Refused(reasons) = &not {
                    let reason = reasons.join("; ");
                    // It learns nothing more than that the VM does not come.
                    let _ = connection.send(&Control::Abort { reason });
                }
                Err(not.into())
            }
        },
        Control::Refused { reasons } => Err(Failure::Refused(reasons)),
        _ => Err(Failure::Broke(link::Error::Unexpected(
            "no answer to an offer",
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    fn unreachable(kind: io::ErrorKind) -> link::Error {
        link::Error::Connect {
            address: "hostb:7465".to_owned(),
            source: kind.into(),
        }
    }

    fn patience() -> (Patience, Instant) {
        (Patience::new(Duration::from_secs(5)), Instant::now())
    }

    #[test]
    fn a_destination_that_was_never_reached_is_not_waited_for() {
        let (mut patience, now) = patience();
        for error in [link::Error::Silent, unreachable(io::ErrorKind::TimedOut)] {
            assert!(patience.again(error, now).is_err());
        }
    }

    #[test]
    fn the_link_may_be_away_for_so_long_and_each_time_anew() {
        let (mut patience, now) = patience();
        let after = |ms| now + Duration::from_millis(ms);
        patience.connected();
        assert!(patience.again(link::Error::Silent, after(0)).is_ok());
        for ms in [1000, 4999] {
            let error = unreachable(io::ErrorKind::TimedOut);
            assert!(patience.again(error, after(ms)).is_ok());
        }
        patience.connected();
        assert!(patience.again(link::Error::Closed, after(6000)).is_ok());
        let away = patience.again(unreachable(io::ErrorKind::TimedOut), after(11_000));
        assert!(matches!(away, Err(link::Error::Away { seconds: 5, .. })));
    }

    #[test]
    fn a_host_without_a_daemon_is_given_up_sooner() {
        let (mut patience, now) = patience();
        let refusal = || unreachable(io::ErrorKind::ConnectionRefused);
        patience.connected();
        assert!(patience.again(link::Error::Closed, now).is_ok());
        assert!(patience.again(refusal(), now).is_ok());
        // A link that goes meanwhile says nothing of the daemon.
        assert!(patience.again(link::Error::Silent, now + REFUSALS).is_ok());
        assert!(patience.again(refusal(), now + REFUSALS).is_ok());
        let error = patience.again(refusal(), now + 2 * REFUSALS);
        assert!(error.is_err_and(|error| error.is_refusal()));
    }

    #[test]
    fn a_destination_that_breaks_the_protocol_or_each_connection_is_given_up() {
        let (mut patience, now) = patience();
        patience.connected();
        let error = link::Error::Unexpected("nothing");
        assert!(patience.again(error, now).is_err());
        for _ in 1..MAX_CONNECTIONS {
            assert!(patience.again(link::Error::Closed, now).is_ok());
            patience.connected();
        }
        let error = patience.again(link::Error::Closed, now);
        assert!(matches!(error, Err(link::Error::Closed)));
    }
}
