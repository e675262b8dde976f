//! Requests and responses.

use crate::{Failure, Goal, JobInfo, VmInfo};
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
