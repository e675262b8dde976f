//! What is told of a VM.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A VM of this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct VmInfo {
    /// Its name.
    pub name: String,
    /// QEMU's word (`running`, `paused`, …), or ours: `starting`, `stopped`, `unreachable`, `unreadable`, `unknown`
    /// where it may be another host that has it.
    pub state: String,
    /// More on the state, with what to do.
    pub note: Option<String>,
    /// The job that moves it.
    pub job: Option<u64>,
    /// Whether it is started when the host is.
    #[serde(default)]
    pub autostart: bool,
    /// When it stopped, in milliseconds since 1970.
    #[serde(default)]
    pub stopped_ms: Option<u64>,
    /// Part of its memory is still at the host that it came from, in post-copy.
    #[serde(default)]
    pub memory_follows: bool,
    /// What runs it; absent while it is starting or unreachable.
    pub machine: Option<MachineInfo>,
}

/// What runs a VM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MachineInfo {
    /// The machine type in full.
    pub machine_type: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// The CPU model.
    pub cpu: String,
    /// Its memory, in bytes.
    pub memory_bytes: u64,
    /// Its virtual CPUs.
    pub vcpus: u32,
    /// QEMU's version.
    pub qemu_version: String,
    /// QEMU's process.
    pub pid: Option<u32>,
    /// QEMU's QMP socket, which the service holds.
    pub qmp: PathBuf,
    /// The socket of the agent's channel.
    pub agent: Option<PathBuf>,
    /// The serial console's socket, for VMs that were started here.
    pub serial: Option<PathBuf>,
    /// The screen's socket, for VMs that were started here.
    pub vnc: Option<PathBuf>,
    /// QEMU's log, for VMs that were started here.
    pub log: Option<PathBuf>,
    /// Its disks.
    pub disks: Vec<DiskInfo>,
}

/// A VM's disk on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DiskInfo {
    /// Its id.
    pub id: String,
    /// `raw` or `qcow2`.
    pub format: String,
    /// Where it is here.
    pub path: PathBuf,
    /// Whether the guest may not write to it.
    pub read_only: bool,
}
