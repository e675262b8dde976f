//! What a dry run found.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::storage::agreed::SharedDisk;

/// What a dry run found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DryRunPlan {
    /// The VM.
    pub vm: String,
    /// The host that runs it.
    pub from: String,
    /// The host that would take it.
    pub to: String,
    /// The machine type, its version spelled out.
    pub machine: String,
    /// QEMU's version here.
    pub qemu_from: String,
    /// QEMU's version there.
    pub qemu_to: String,
    /// Memory, in bytes.
    pub memory_bytes: u64,
    /// Whether the destination can hold the switch-over back until every page is in place.
    pub switchover_ack: bool,
    /// For people: why the VM must not move in post-copy between these two QEMUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_post_copy: Option<String>,
    /// How each disk is known to be the same on both hosts.
    pub storage: Vec<SharedDisk>,
}

impl fmt::Display for DryRunPlan {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            out,
            "{} can move from {} to {}.",
            self.vm, self.from, self.to
        )?;
        writeln!(
            out,
            "  machine  {}, {} MiB",
            self.machine,
            self.memory_bytes >> 20
        )?;
        write!(
            out,
            "  QEMU     {} here, {} there",
            self.qemu_from, self.qemu_to
        )?;
        if let Some(why) = &self.no_post_copy {
            write!(out, "\n  It moves by pre-copy alone: {why}.")?;
        }
        for disk in &self.storage {
            write!(out, "\n  disk     {disk}")?;
        }
        Ok(())
    }
}
