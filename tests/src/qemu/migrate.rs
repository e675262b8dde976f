//! Moves a guest by stock QEMU alone, at its best settings.

use super::launch::Vm;
use super::qmp::Event;
use crate::{Error, Result};
use serde_json::{Value, json};
use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

const LIMIT: Duration = Duration::from_secs(300);
const PORT: u16 = 4444;
/// How long the pause may be.
const DOWNTIME_MS: u32 = 300;
/// Scans of memory after which post-copy may begin: the set-up counts as one. As Transhume does it.
const SCANS: u64 = 2;
/// How often QEMU is asked for them.
const POLL: Duration = Duration::from_millis(50);
/// The id of QEMU's object of certificates.
const TLS: &str = "tls0";
/// Far above any link here: QEMU is not to hold itself back.
const BANDWIDTH: u64 = 10 << 30;

/// The ways of QEMU's own that Transhume is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stock {
    /// One connection, pages as they are.
    Plain,
    /// Several connections, pages as they are.
    Multifd {
        /// How many.
        channels: u8,
    },
    /// Several connections, pages compressed by zstd at its fastest level.
    MultifdZstd {
        /// How many.
        channels: u8,
    },
    /// One connection, and after one scan of all memory post-copy, with a second connection for what the guest asks
    /// for (`postcopy-preempt`).
    PostCopy,
}

impl fmt::Display for Stock {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain => write!(formatter, "plain"),
            Self::Multifd { channels } => write!(formatter, "multifd-{channels}"),
            Self::MultifdZstd { channels } => write!(formatter, "multifd-zstd-{channels}"),
            Self::PostCopy => write!(formatter, "post-copy"),
        }
    }
}

/// Certificates for QEMU's TLS, on both sides.
#[derive(Debug, Clone)]
pub struct Credentials {
    /// The folder of the one that connects, the source.
    pub client: PathBuf,
    /// The folder of the one that listens.
    pub server: PathBuf,
    /// The name in the latter's certificate.
    pub server_name: String,
}

impl Credentials {
    /// Gives them to both QEMUs, for their next migration. Each proves who it is, as Transhume's do.
    pub fn set(&self, source: &mut Vm, destination: &mut Vm) -> Result<()> {
        for (vm, folder, endpoint) in [
            (source, &self.client, "client"),
            (destination, &self.server, "server"),
        ] {
            vm.qmp.execute(
                "object-add",
                json!({
                    "qom-type": "tls-creds-x509",
                    "id": TLS,
                    "dir": folder.display().to_string(),
                    "endpoint": endpoint,
                    "verify-peer": true,
                    // QEMU's look at the files before their use: up to 10.0 it asks for key encipherment
                    // of every certificate, which is what an RSA key does and an ECDSA key cannot. The
                    // peer's chain and name are verified all the same.
                    "sanity-check": false,
                }),
            )?;
            let mut parameters = json!({ "tls-creds": TLS });
            if endpoint == "client" {
                parameters["tls-hostname"] = self.server_name.as_str().into();
            }
            vm.qmp.execute("migrate-set-parameters", parameters)?;
        }
        Ok(())
    }
}

/// When what happened.
#[derive(Debug, Clone, Copy)]
pub struct Moments {
    /// The source was told to migrate.
    pub told: SystemTime,
    /// The source's VM stopped.
    pub stopped: SystemTime,
    /// The destination's VM ran.
    pub resumed: SystemTime,
    /// All of the VM was there.
    pub completed: SystemTime,
}

impl Stock {
    fn prepare(self, vm: &mut Vm, downtime_ms: u32) -> Result<()> {
        let mut capabilities = vec![json!({ "capability": "return-path", "state": true })];
        let mut parameters = json!({ "max-bandwidth": BANDWIDTH, "downtime-limit": downtime_ms });
        if let Self::Multifd { channels } | Self::MultifdZstd { channels } = self {
            capabilities.push(json!({ "capability": "multifd", "state": true }));
            parameters["multifd-channels"] = channels.into();
        }
        if let Self::MultifdZstd { .. } = self {
            parameters["multifd-compression"] = "zstd".into();
            parameters["multifd-zstd-level"] = 1.into();
        }
        if self == Self::PostCopy {
            for capability in ["postcopy-ram", "postcopy-preempt"] {
                capabilities.push(json!({ "capability": capability, "state": true }));
            }
        }
        // Its events tell when it has ended.
        capabilities.push(json!({ "capability": "events", "state": true }));
        vm.qmp.execute(
            "migrate-set-capabilities",
            json!({ "capabilities": capabilities }),
        )?;
        vm.qmp.execute("migrate-set-parameters", parameters)?;
        Ok(())
    }

    /// Moves the guest from one QEMU to another that listens at an address, and waits until it runs there.
    pub fn migrate(self, source: &mut Vm, destination: &mut Vm, address: &str) -> Result<Moments> {
        self.migrate_within(DOWNTIME_MS, source, destination, address)
    }

    /// The same, with so many milliseconds for the pause.
    pub fn migrate_within(
        self,
        downtime_ms: u32,
        source: &mut Vm,
        destination: &mut Vm,
        address: &str,
    ) -> Result<Moments> {
        self.prepare(source, downtime_ms)?;
        self.prepare(destination, downtime_ms)?;
        let uri = format!("tcp:{address}:{PORT}");
        destination
            .qmp
            .execute("migrate-incoming", json!({ "uri": uri }))?;
        let told = SystemTime::now();
        source.qmp.execute("migrate", json!({ "uri": uri }))?;
        if self == Self::PostCopy {
            scanned_once(source)?;
            // If all was there meanwhile, this changes nothing.
            source.qmp.execute("migrate-start-postcopy", json!({}))?;
        }
        let stopped = source.qmp.event("the guest's pause", LIMIT, |event| {
            event.name == "STOP" || status(event) == Some("failed")
        })?;
        if stopped.name != "STOP" {
            return Err(failed(source));
        }
        let resumed = destination
            .qmp
            .event("the guest's start", LIMIT, |event| event.name == "RESUME")?;
        let ended = source.qmp.event("the migration's end", LIMIT, |event| {
            matches!(
                status(event),
                Some("completed" | "failed" | "postcopy-paused")
            )
        })?;
        if status(&ended) != Some("completed") {
            return Err(failed(source));
        }
        Ok(Moments {
            told,
            stopped: stopped.at,
            resumed: resumed.at,
            completed: ended.at,
        })
    }
}

/// Waits until QEMU has scanned all memory once.
fn scanned_once(source: &mut Vm) -> Result<()> {
    let begun = Instant::now();
    loop {
        let answer = source.qmp.execute("query-migrate", json!({}))?;
        if answer["status"] == "failed" {
            return Err(failed(source));
        }
        let scans = answer["ram"]["dirty-sync-count"].as_u64();
        if scans >= Some(SCANS) || answer["status"] == "completed" {
            return Ok(());
        }
        if begun.elapsed() > LIMIT {
            return Err(Error::Late {
                what: format!("a whole scan of memory ({})", source.name),
                seconds: LIMIT.as_secs(),
                hint: format!("QEMU says: {answer}"),
            });
        }
        std::thread::sleep(POLL);
    }
}

fn status(event: &Event) -> Option<&str> {
    if event.name == "MIGRATION" {
        event.data["status"].as_str()
    } else {
        None
    }
}

fn failed(source: &mut Vm) -> Error {
    let answer = source
        .qmp
        .execute("query-migrate", json!({}))
        .unwrap_or(Value::Null);
    let what = answer["error-desc"]
        .as_str()
        .unwrap_or("no reason given")
        .to_owned();
    Error::Qemu {
        name: source.name.clone(),
        what: format!("the migration failed: {what}"),
    }
}
