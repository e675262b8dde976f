//! How QEMU's migration is set while the relay drives it, and as it was before.

use std::num::NonZeroU8;

use serde_json::{Value, json};

use super::switchover::FIRST_LIMIT_MS;
use transhume_hypervisor::{Qmp, Result};

/// More than any link carries, in bytes a second: the relay sets the pace.
const UNLIMITED: u64 = 1 << 40;
/// Capabilities that would change the stream into one that the relay does not read.
const OFF: [&str; 7] = [
    "mapped-ram",
    "zero-copy-send",
    "xbzrle",
    "compress",
    "x-ignore-shared",
    "postcopy-preempt",
    "rdma-pin-all",
];
/// Parameters that are changed.
const CHANGED: [&str; 5] = [
    "max-bandwidth",
    "downtime-limit",
    "multifd-channels",
    "multifd-compression",
    "zero-page-detection",
];

/// What was set before.
#[derive(Debug)]
pub(crate) struct Before {
    capabilities: Vec<(String, bool)>,
    parameters: Value,
}

/// Sets QEMU up for the relay. `known`: the capabilities that it has, and their states; `channels`: how many it is
/// to use beside the stream, if any.
pub(crate) async fn set_up(
    qmp: &Qmp,
    known: &[(String, bool)],
    switchover_ack: bool,
    may_throttle: bool,
    post_copy: bool,
    channels: Option<NonZeroU8>,
) -> Result<Before> {
    // With a return path QEMU learns of an error at the destination, and the VM runs on here.
    let wanted = OFF.map(|name| (name, false)).into_iter().chain([
        ("return-path", true),
        ("events", true),
        ("switchover-ack", switchover_ack),
        ("auto-converge", may_throttle),
        ("postcopy-ram", post_copy),
        // So that the hand-over is noted before it cannot be undone.
        ("pause-before-switchover", post_copy),
        ("multifd", channels.is_some()),
    ]);
    let state = |wanted: &str| known.iter().find(|(name, _)| name == wanted);
    let set: Vec<_> = wanted.filter(|(name, _)| state(name).is_some()).collect();
    let all = qmp.execute("query-migrate-parameters", Value::Null).await?;
    let before = Before {
        capabilities: set
            .iter()
            .filter_map(|(name, _)| state(name).cloned())
            .collect(),
        parameters: CHANGED
            .iter()
            .filter_map(|&name| Some((name.to_owned(), all.get(name)?.clone())))
            .collect::<serde_json::Map<_, _>>()
            .into(),
    };
    qmp.migrate_set_capabilities(&set).await?;
    let mut parameters = json!({
        "max-bandwidth": UNLIMITED,
        "downtime-limit": FIRST_LIMIT_MS,
    });
    if let Some(channels) = channels {
        parameters["multifd-channels"] = channels.get().into();
        parameters["multifd-compression"] = "none".into();
        // QEMU 9.0 and later; with machine types of before it looks for zero pages in one thread otherwise.
        if all.get("zero-page-detection").is_some() {
            parameters["zero-page-detection"] = "multifd".into();
        }
    }
    if let Err(error) = qmp.migrate_set_parameters(parameters).await {
        before.restore(qmp).await;
        return Err(error);
    }
    Ok(before)
}

impl Before {
    /// Sets it again, for a VM that stays. A QEMU that refuses is as good as one that was asked.
    pub(crate) async fn restore(&self, qmp: &Qmp) {
        let set: Vec<_> = self
            .capabilities
            .iter()
            .map(|(name, state)| (name.as_str(), *state))
            .collect();
        let capabilities = qmp.migrate_set_capabilities(&set).await;
        let parameters = qmp.migrate_set_parameters(self.parameters.clone()).await;
        if let Err(error) = capabilities.and(parameters) {
            tracing::debug!(%error, "QEMU's migration settings stay as they are");
        }
    }
}
