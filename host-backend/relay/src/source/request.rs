//! What is asked of a migration, and of the other host.

use std::sync::Arc;
use std::time::{Duration, Instant};

use transhume_protocol::link::Control;
pub use transhume_protocol::link::Presence;

use super::plan::DryRunPlan;
use transhume_api::Goal;
use transhume_api::migration::Summary;
use transhume_hypervisor::Vm;
use transhume_hypervisor::qmp_commands::keeps_vm;
use transhume_link::{Connection, Security, TIMEOUT};

/// Another host, and how it is reached.
#[derive(Debug, Clone)]
pub struct Destination {
    /// Its name.
    pub host: String,
    /// Its daemon's `host:port`.
    pub address: String,
    /// How the connection to it is protected.
    pub security: Security,
}

/// A migration to be done.
#[derive(Clone)]
pub struct Request {
    /// The VM, which runs here.
    pub vm: Arc<Vm>,
    /// This host.
    pub from: String,
    /// The migration's number here, for people.
    pub job: u64,
    /// Whether the VM is started when its host is.
    pub autostart: bool,
    /// Where it is to go.
    pub destination: Destination,
    /// How long the link may be away.
    pub link_patience: Duration,
    /// What is to be reached.
    pub goal: Goal,
    /// Through how many channels QEMU hands memory over; 1 for its stream alone.
    pub qemu_channels: u8,
    /// Only look whether it would work.
    pub dry_run: bool,
}

/// What became of a request.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// The destination runs the VM.
    Migrated(Box<Summary>),
    /// It would work.
    Planned(DryRunPlan),
}

/// Who keeps a VM that the destination holds: loaded, and not running before it hears this.
#[derive(Clone)]
pub enum Keeper {
    /// The source, or nobody: it has ended there.
    Source,
    /// The source as long as this QEMU can run it.
    Qemu(Arc<Vm>),
}

impl Keeper {
    /// The message; `None` as long as QEMU does not know yet.
    async fn message(&self) -> Option<Control> {
        let stays = match self {
            Self::Source => true,
            Self::Qemu(vm) => {
                let said = vm.qmp().query_migrate().await.ok()?;
                keeps_vm(said.status.as_deref())?
            }
        };
        let reason = || "the VM stays at its source".to_owned();
        Some(if stays {
            Control::Abort { reason: reason() }
        } else {
            Control::Commit
        })
    }
}

/// Asks a destination whether it took a VM, until it answers or patience ends. A source that asks has given
/// the migration's session up: the destination ends it. If it holds the VM, it is told what becomes of it.
pub async fn ask(
    destination: &Destination,
    vm: &str,
    number: u64,
    keeper: &Keeper,
    patience: Duration,
) -> Option<bool> {
    let deadline = Instant::now() + patience;
    while Instant::now() < deadline {
        let Destination {
            host,
            address,
            security,
        } = destination.clone();
        let query = Control::Query {
            job: number,
            vm: vm.to_owned(),
        };
        let asked = transhume_base::task::blocking(move || {
            let mut connection = Connection::open(&address, &host, &security)?;
            connection.send(&query)?;
            let answer = connection.receive(TIMEOUT)?;
            Ok((connection, answer))
        });
        let mut answer = asked.await.ok();
        if let Some(Ok((_, Control::Held))) = &answer {
            // Without a word nothing changes there.
            answer = match (answer, keeper.message().await) {
                (Some(Ok((connection, _))), Some(message)) => say(connection, message).await,
                _ => None,
            };
        }
        match answer {
            Some(Ok((_, Control::Outcome { taken }))) => return Some(taken),
            Some(Err(error)) => tracing::debug!(%error, "no answer from the destination"),
            _ => {}
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    None
}

/// How long another host may take for each step of an answer on where a VM is.
const LOCATE_TIMEOUT: Duration = Duration::from_secs(3);

/// Asks another host whether it has a VM; an error is why it does not say.
pub async fn locate(destination: &Destination, vm: &str) -> Result<Presence, String> {
    let Destination {
        host,
        address,
        security,
    } = destination.clone();
    let locate = Control::Locate { vm: vm.to_owned() };
    let asked = transhume_base::task::blocking(move || {
        let mut connection = Connection::open_within(&address, &host, &security, LOCATE_TIMEOUT)?;
        connection.send(&locate)?;
        connection.receive(LOCATE_TIMEOUT)
    });
    match asked.await {
        Ok(Ok(Control::Located(presence))) => Ok(presence),
        Ok(Ok(_)) => Err("it answered with something else".to_owned()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(error) => Err(error.to_string()),
    }
}

/// Says what becomes of a VM that is held, and hears the answer; `None` if it could not be tried.
async fn say(
    mut connection: Connection,
    message: Control,
) -> Option<Result<(Connection, Control), transhume_link::Error>> {
    let said = transhume_base::task::blocking(move || {
        connection.send(&message)?;
        let answer = connection.receive(TIMEOUT)?;
        Ok((connection, answer))
    });
    said.await.ok()
}
