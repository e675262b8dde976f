//! What the service and its clients say to each other: JSON objects, one a line, over a unix socket. A
//! request gets one response; `job-follow` gets one at each change until its job has ended.

use crate::hypervisor::Identity;
use crate::relay::progress::{Phase, Snapshot, Summary};
use crate::relay::source::Goal;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Bytes that a request's line may have: a definition's text, escaped.
pub const MAX_REQUEST: usize = 1 << 20;
/// Bytes that a response's line may have.
pub const MAX_RESPONSE: usize = 8 << 20;

/// What a client asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Start a VM: answered by [`Response::Vm`].
    VmStart {
        /// Its definition, as TOML.
        definition: String,
        /// Also where another host cannot be asked whether it has it.
        #[serde(default)]
        anyway: bool,
    },
    /// Start a VM that is defined here: answered by [`Response::Vm`].
    VmStartDefined {
        /// Which.
        name: String,
        /// Also where another host cannot be asked whether it has it.
        #[serde(default)]
        anyway: bool,
    },
    /// Keep a VM's definition, without starting it: answered by [`Response::Done`].
    VmDefine {
        /// Its definition, as TOML.
        definition: String,
    },
    /// Forget a VM that does not run: answered by [`Response::Done`].
    VmUndefine {
        /// Which.
        name: String,
    },
    /// Start a VM when the host is started, or do not: answered by [`Response::Done`].
    VmAutostart {
        /// Which.
        name: String,
        /// Whether it is.
        enable: bool,
    },
    /// Take over a running QEMU: answered by [`Response::Vm`].
    VmAdopt {
        /// Its definition, as TOML.
        definition: String,
        /// Its QMP socket.
        qmp: PathBuf,
    },
    /// QEMU's arguments for a definition: answered by [`Response::Arguments`].
    VmArguments {
        /// The definition, as TOML.
        definition: String,
    },
    /// The VMs that run on this host: answered by [`Response::Vms`].
    VmList {
        /// And those that do not run.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        all: bool,
    },
    /// One VM: answered by [`Response::Vm`].
    VmShow {
        /// Which.
        name: String,
    },
    /// End a VM: answered by [`Response::Done`].
    VmStop {
        /// Which.
        name: String,
        /// As if power were cut.
        force: bool,
        /// How long its guest may take to shut down, in seconds; 60 if nothing is said.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        shutdown_timeout: Option<u32>,
    },
    /// Halt a VM's CPUs: answered by [`Response::Vm`].
    VmPause {
        /// Which.
        name: String,
    },
    /// Run a VM that stands still: answered by [`Response::Vm`].
    VmResume {
        /// Which.
        name: String,
    },
    /// Move a VM: answered by [`Response::Job`] as soon as the job has started.
    Migrate {
        /// Which.
        name: String,
        /// To which host of `[hosts]`.
        to: String,
        /// How long the link may be away, in seconds.
        link_patience: u16,
        /// What is to be reached.
        #[serde(default)]
        goal: Goal,
        /// Only tell what would be done.
        dry_run: bool,
    },
    /// All jobs: answered by [`Response::Jobs`].
    JobList,
    /// One job: answered by [`Response::Job`].
    JobShow {
        /// Which.
        id: u64,
    },
    /// One job until its end: answered by [`Response::Job`] again and again.
    JobFollow {
        /// Which.
        id: u64,
    },
    /// Say where the VM of a job that is in doubt runs: answered by [`Response::Job`].
    JobResolve {
        /// Which.
        id: u64,
        /// One of the job's two hosts.
        runs_at: String,
    },
    /// End a job; the VM runs on at the source: answered by [`Response::Job`].
    JobCancel {
        /// Which.
        id: u64,
    },
}

/// What the service answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Response {
    /// A VM.
    Vm(Box<VmInfo>),
    /// All VMs, by name.
    Vms(Vec<VmInfo>),
    /// QEMU's command line, the binary first.
    Arguments(Vec<String>),
    /// A job.
    Job(Box<JobInfo>),
    /// All jobs, the oldest first.
    Jobs(Vec<JobInfo>),
    /// It is done; in words.
    Done(String),
    /// It is not done.
    Error(Failure),
}

/// Why something was not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What that means for the guest.
    pub kind: FailureKind,
    /// Cause and cure, for people.
    pub message: String,
}

/// What a failure means for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureKind {
    /// It failed.
    Failed,
    /// It was refused before anything was touched.
    Refused,
    /// The migration failed or was cancelled; the guest runs at the source.
    MigrationFailed,
    /// The outcome is not known: an operator must look.
    Unresolved,
    /// The VM's guest ended by itself during the migration: nothing runs it any more.
    Ended,
    /// The VM's QEMU ended during the migration, and not by its guest's doing.
    Lost,
}

impl FailureKind {
    /// The exit code of `transhume`.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::Refused => 3,
            Self::MigrationFailed => 4,
            Self::Unresolved => 5,
            Self::Ended => 6,
            Self::Lost => 7,
        }
    }
}

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

/// How a job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JobState {
    /// It goes on.
    Running,
    /// The VM runs at its destination.
    Completed,
    /// A dry run has told its plan.
    Planned,
    /// It was refused before the guest was touched.
    Refused,
    /// It failed; the VM runs at the source.
    Failed,
    /// It was cancelled; the VM runs at the source.
    Cancelled,
    /// Nobody knows who has the VM: an operator must look.
    Unresolved,
    /// The VM's guest ended by itself meanwhile: nothing runs it any more.
    Ended,
    /// The VM's QEMU ended, and not by its guest's doing: nothing runs it any more, or part of its memory is lost.
    Lost,
}

impl JobState {
    /// What `transhume` exits with when the job ended so; `None` for a success.
    pub fn failure(self) -> Option<FailureKind> {
        match self {
            Self::Running | Self::Completed | Self::Planned => None,
            Self::Refused => Some(FailureKind::Refused),
            Self::Failed | Self::Cancelled => Some(FailureKind::MigrationFailed),
            Self::Unresolved => Some(FailureKind::Unresolved),
            Self::Ended => Some(FailureKind::Ended),
            Self::Lost => Some(FailureKind::Lost),
        }
    }
}

/// What a destination knows a migration by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Offered {
    /// The offer's number, in hexadecimal.
    pub number: String,
    /// Whether the VM ran.
    pub running: bool,
    /// Whether it goes over, or went, in post-copy: from then on part of its memory may be at the source alone.
    #[serde(default)]
    pub post_copy: bool,
}

impl Offered {
    pub(super) fn number(&self) -> Option<u64> {
        u64::from_str_radix(&self.number, 16).ok()
    }
}

/// A migration, running or ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct JobInfo {
    /// Its number on this host.
    pub id: u64,
    /// The VM.
    pub vm: String,
    /// The host that it leaves.
    pub from: String,
    /// The host that it goes to.
    pub to: String,
    /// Whether it only tells what would be done.
    pub dry_run: bool,
    /// How it stands.
    pub state: JobState,
    /// When it started, in milliseconds since 1970.
    pub started_ms: u64,
    /// Where it is, or was when it ended.
    pub progress: Snapshot,
    /// The QEMU that it moves; absent where its process is not known.
    #[serde(default)]
    pub qemu: Option<Identity>,
    /// What was offered to the destination; absent before that.
    #[serde(default)]
    pub offer: Option<Offered>,
    /// Whether it is unresolved because nobody knows which of the two hosts has the VM.
    #[serde(default)]
    pub in_doubt: bool,
    /// Why it did not succeed, with what to do; or how it was settled.
    pub error: Option<String>,
    /// How it went, when it is completed.
    pub summary: Option<Summary>,
    /// What would be done, when it is planned.
    pub plan: Option<serde_json::Value>,
    /// The plan, for people.
    pub plan_text: Option<String>,
}

impl JobInfo {
    /// Whether it moves, or moved, that QEMU. One of which nothing is known is no QEMU that it moved.
    pub(super) fn moves(&self, qemu: Option<&Identity>) -> bool {
        match (&self.qemu, qemu) {
            (_, None) => false,
            (Some(moved), Some(found)) => moved == found,
            // Noted by a version that kept no process.
            (None, Some(found)) => found.is_older_than(self.started_ms),
        }
    }

    /// Whether it has sent the commit, or may have.
    pub(super) fn may_be_handed_over(&self) -> bool {
        matches!(self.progress.phase, Phase::Commit | Phase::PostCopy) || self.is_in_post_copy()
    }

    /// Whether the VM was handed over in post-copy, or may have been.
    pub(super) fn is_in_post_copy(&self) -> bool {
        self.offer.as_ref().is_some_and(|offer| offer.post_copy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_what_the_documentation_says() {
        for (request, text) in [
            (Request::VmList { all: false }, r#"{"command":"vm-list"}"#),
            (
                Request::VmStop {
                    name: "web1".to_owned(),
                    force: true,
                    shutdown_timeout: None,
                },
                r#"{"command":"vm-stop","name":"web1","force":true}"#,
            ),
            (
                Request::Migrate {
                    name: "web1".to_owned(),
                    to: "hostb".to_owned(),
                    link_patience: 30,
                    goal: Goal {
                        deadline_s: Some(60),
                        ..Goal::default()
                    },
                    dry_run: false,
                },
                r#"{"command":"migrate","name":"web1","to":"hostb","link_patience":30,"goal":{"deadline-s":60,"max-downtime-ms":null,"may-throttle":false},"dry_run":false}"#,
            ),
            (
                Request::JobCancel { id: 3 },
                r#"{"command":"job-cancel","id":3}"#,
            ),
        ] {
            assert_eq!(serde_json::to_string(&request).expect("JSON"), text);
            assert_eq!(
                serde_json::from_str::<Request>(text).expect("a request"),
                request
            );
        }
        for text in [
            r#"{"command":"vm-stop","name":"web1","force":true,"now":true}"#,
            r#"{"command":"vm-stop","name":"web1"}"#,
            r#"{"command":"rm"}"#,
            "{}",
            "[]",
        ] {
            assert!(serde_json::from_str::<Request>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_worst_requests_take_little_memory() {
        let nothing = |piece: &str| piece.repeat(MAX_REQUEST / piece.len() - 10);
        for text in [
            "[".repeat(MAX_REQUEST),
            "{\"a\":".repeat(MAX_REQUEST / 5),
            format!("{{\"a\":[{}0]}}", nothing("0,")),
            format!("{{\"a\":[{}0],\"command\":\"vm-list\"}}", nothing("[],")),
            format!("{{{}\"a\":0}}", nothing("\"\":0,")),
        ] {
            // Serde passes over what is beside a command without fields.
            let (_, most) = transhume_testing::peak(|| serde_json::from_str::<Request>(&text));
            assert!(most < 64 << 20, "{most} bytes");
        }
    }
}
