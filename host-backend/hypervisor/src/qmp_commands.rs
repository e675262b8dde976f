//! The QMP commands that Transhume uses, with types.

use super::Result;
use super::qmp::{MAX_SAID, Machine, Qmp, Status};
use super::stream::MigrationListener;
use serde::Deserialize;
use serde_json::{Value, json};
use std::os::fd::OwnedFd;
use std::path::Path;
use transhume_base::text;
use transhume_machine::definition::Accelerator;

/// The name under which QEMU gets the socket of a migration's stream.
const STREAM: &str = "transhume-stream";

/// `query-migrate`, as far as it is used. What a QEMU does not tell is `None`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Migration {
    /// `setup`, `active`, `device`, `completed`, `failed`, `cancelled`, …; `None` before the first.
    pub status: Option<String>,
    /// Memory's progress, in bytes.
    pub ram: Option<MigrationRam>,
    /// QEMU's reason for a failure.
    pub error_desc: Option<String>,
    /// Since the start, in milliseconds.
    pub total_time: Option<u64>,
    /// The pause, in milliseconds, when it is over.
    pub downtime: Option<u64>,
    /// What QEMU expects of the pause, in milliseconds.
    pub expected_downtime: Option<u64>,
    /// At the destination: how long all virtual CPUs stood still at once in post-copy, in milliseconds.
    pub postcopy_blocktime: Option<u32>,
    /// The same of each of them.
    pub postcopy_vcpu_blocktime: Option<Vec<u32>>,
}

impl Migration {
    /// Whether it went over to post-copy and has not come to its end, whether or not it goes on: part of the VM's
    /// memory is at its source alone.
    pub fn is_in_post_copy(&self) -> bool {
        let status = self.status.as_deref();
        status.is_some_and(|status| status.starts_with("postcopy"))
    }
}

/// Memory's progress, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrationRam {
    /// Written to the stream.
    #[serde(default)]
    pub transferred: u64,
    /// Still to send.
    #[serde(default)]
    pub remaining: u64,
    /// The guest's memory.
    #[serde(default)]
    pub total: u64,
    /// Pages that the guest writes per second.
    #[serde(default)]
    pub dirty_pages_rate: u64,
    /// Times that the dirty bitmap was taken.
    #[serde(default)]
    pub dirty_sync_count: u64,
}

/// Whether a QEMU whose migration went over to post-copy can still run the VM, by what it says of it; `None` as long as
/// it may be either.
pub fn keeps_vm(status: Option<&str>) -> Option<bool> {
    match status {
        None | Some("none" | "failed" | "cancelled") => Some(true),
        Some("completed") => Some(false),
        Some(status) if status.starts_with("postcopy-") && status != "postcopy-device" => {
            Some(false)
        }
        Some(_) => None,
    }
}

impl Qmp {
    /// Whether the VM runs.
    ///
    /// # Errors
    /// As [`Qmp::query`]; so for every command here.
    pub async fn status(&self) -> Result<Status> {
        self.query("query-status", Value::Null).await
    }

    /// The machine types that this QEMU knows.
    pub async fn machines(&self) -> Result<Vec<Machine>> {
        self.query("query-machines", Value::Null).await
    }

    /// Pauses the VM.
    pub async fn stop(&self) -> Result<()> {
        self.execute("stop", Value::Null).await.map(drop)
    }

    /// Runs the VM.
    pub async fn cont(&self) -> Result<()> {
        self.execute("cont", Value::Null).await.map(drop)
    }

    /// Ends QEMU. A connection that closes instead of an answer is a success.
    pub async fn quit(&self) -> Result<()> {
        match self.execute("quit", Value::Null).await {
            Err(super::Error::Lost(_)) | Ok(_) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Asks the guest to shut down, as its power button would.
    pub async fn system_powerdown(&self) -> Result<()> {
        self.execute("system_powerdown", Value::Null)
            .await
            .map(drop)
    }

    /// What runs the VM's vCPUs (`query-kvm`).
    pub async fn accelerator(&self) -> Result<Accelerator> {
        #[derive(Deserialize)]
        struct Kvm {
            enabled: bool,
        }
        let kvm: Kvm = self.query("query-kvm", Value::Null).await?;
        Ok(if kvm.enabled {
            Accelerator::Kvm
        } else {
            Accelerator::Tcg
        })
    }

    /// Names of the migration capabilities that this QEMU knows, each with its state.
    pub async fn migrate_capabilities(&self) -> Result<Vec<(String, bool)>> {
        #[derive(Deserialize)]
        struct Capability {
            capability: String,
            state: bool,
        }
        let all: Vec<Capability> = self
            .query("query-migrate-capabilities", Value::Null)
            .await?;
        Ok(all
            .into_iter()
            .map(|one| (one.capability, one.state))
            .collect())
    }

    /// Switches migration capabilities.
    pub async fn migrate_set_capabilities(&self, capabilities: &[(&str, bool)]) -> Result<()> {
        let capabilities: Vec<Value> = capabilities
            .iter()
            .map(|(capability, state)| json!({ "capability": capability, "state": state }))
            .collect();
        let arguments = json!({ "capabilities": capabilities });
        self.execute("migrate-set-capabilities", arguments)
            .await
            .map(drop)
    }

    /// Sets migration parameters: an object of QEMU's `MigrateSetParameters`.
    pub async fn migrate_set_parameters(&self, parameters: Value) -> Result<()> {
        self.execute("migrate-set-parameters", parameters)
            .await
            .map(drop)
    }

    /// Starts a migration into a socket of ours; it goes on in the background.
    pub async fn migrate(&self, socket: OwnedFd) -> Result<()> {
        self.give(STREAM, socket).await?;
        self.execute("migrate", json!({ "uri": format!("fd:{STREAM}") }))
            .await
            .map(drop)
    }

    /// The same into sockets that QEMU opens itself: the stream's, and with `multifd` its channels'.
    pub async fn migrate_to(&self, door: &MigrationListener) -> Result<()> {
        let uri = format!("unix:{}", door.path().display());
        self.execute("migrate", json!({ "uri": uri }))
            .await
            .map(drop)
    }

    /// Lets a QEMU that was started with `-incoming defer` take the stream from a socket of ours.
    pub async fn migrate_incoming(&self, socket: OwnedFd) -> Result<()> {
        self.give(STREAM, socket).await?;
        self.execute("migrate-incoming", json!({ "uri": format!("fd:{STREAM}") }))
            .await
            .map(drop)
    }

    /// Resumes a post-copy that broke (`postcopy-paused`), at the source, into a socket of ours.
    pub async fn migrate_resume(&self, socket: OwnedFd) -> Result<()> {
        self.give(STREAM, socket).await?;
        let arguments = json!({ "uri": format!("fd:{STREAM}"), "resume": true });
        self.execute("migrate", arguments).await.map(drop)
    }

    /// Breaks a post-copy's stream, so that it can be resumed.
    pub async fn migrate_pause(&self) -> Result<()> {
        self.execute_out_of_band("migrate-pause", Value::Null)
            .await
            .map(drop)
    }

    /// Has a QEMU whose post-copy broke, at the destination, listen for its new stream on a unix socket that it
    /// makes. It does so also while its main loop waits for a page.
    pub async fn migrate_recover(&self, path: &Path) -> Result<()> {
        let arguments = json!({ "uri": format!("unix:{}", path.display()) });
        self.execute_out_of_band("migrate-recover", arguments)
            .await
            .map(drop)
    }

    /// Ends a migration; the VM runs on here.
    pub async fn migrate_cancel(&self) -> Result<()> {
        self.execute("migrate_cancel", Value::Null).await.map(drop)
    }

    /// Lets a migration go over to post-copy as soon as it can.
    pub async fn migrate_start_postcopy(&self) -> Result<()> {
        self.execute("migrate-start-postcopy", Value::Null)
            .await
            .map(drop)
    }

    /// Lets a migration go on that stands still before the switch-over (`pause-before-switchover`).
    pub async fn migrate_continue(&self) -> Result<()> {
        self.execute("migrate-continue", json!({ "state": "pre-switchover" }))
            .await
            .map(drop)
    }

    /// Where a migration stands.
    pub async fn query_migrate(&self) -> Result<Migration> {
        let mut said: Migration = self.query("query-migrate", Value::Null).await?;
        for words in [&mut said.status, &mut said.error_desc] {
            *words = words.take().map(|words| text::line(&words, MAX_SAID));
        }
        Ok(said)
    }

    /// A command of QEMU's human monitor, for what QMP has none for.
    pub async fn hmp(&self, command_line: &str) -> Result<String> {
        self.query(
            "human-monitor-command",
            json!({ "command-line": command_line }),
        )
        .await
    }

    /// A property of an object in QEMU's tree.
    pub async fn qom_get(&self, path: &str, property: &str) -> Result<Value> {
        self.execute("qom-get", json!({ "path": path, "property": property }))
            .await
    }

    /// The names and types of an object's properties, children among them.
    pub async fn qom_list(&self, path: &str) -> Result<Vec<(String, String)>> {
        #[derive(Deserialize)]
        struct Property {
            name: String,
            #[serde(rename = "type")]
            kind: String,
        }
        let all: Vec<Property> = self.query("qom-list", json!({ "path": path })).await?;
        Ok(all.into_iter().map(|one| (one.name, one.kind)).collect())
    }

    /// The machine type that runs, in full: `pc-q35-7.2` where `q35` was asked for.
    pub async fn machine_type(&self) -> Result<String> {
        let name: String = self
            .query("qom-get", json!({ "path": "/machine", "property": "type" }))
            .await?;
        Ok(name.strip_suffix("-machine").unwrap_or(&name).to_owned())
    }
}
