//! What a migration tells of itself while it runs, and its summary.

use crate::Choice;
use serde::{Deserialize, Serialize};

/// Where a migration stands. The contract of each phase says who runs the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The daemons agree on versions, machine and disks. The source runs the VM; nothing was touched.
    Negotiate,
    /// The destination starts its QEMU, which waits for the stream. The source runs the VM.
    Prepare,
    /// Memory is copied while the source runs the VM.
    PreCopy,
    /// The VM is paused at the source; the rest of its memory and its devices' state move.
    Switchover,
    /// The whole state is at the destination; the source gives the VM up. From here on it belongs to
    /// the destination.
    Commit,
    /// Post-copy: the VM is handed over and runs at the destination, while part of its memory is still at
    /// the source, whose QEMU is needed until all of it has moved. From here on it belongs to the destination.
    PostCopy,
    /// The destination runs the VM.
    Completed,
    /// The migration failed before the hand-over; the source runs the VM.
    Failed,
    /// The operator ended the migration; the source runs the VM.
    Cancelled,
    /// The VM's guest ended by itself meanwhile: nobody runs it any more.
    Ended,
    /// The VM's QEMU ended, and not by its guest's doing: nobody runs it any more, or part of its memory is lost.
    Lost,
    /// The peer fell silent after the commit was sent: an operator must look who has the VM.
    Unresolved,
}

impl Phase {
    /// Whether the migration has ended.
    pub fn is_final(self) -> bool {
        matches!(
            self,
            Self::Completed
                | Self::Failed
                | Self::Cancelled
                | Self::Ended
                | Self::Lost
                | Self::Unresolved
        )
    }
}

/// Pages and bytes by where they came from. Pages are of 4 KiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Traffic {
    /// Pages that hold one repeated byte (all but always zero).
    pub zero_pages: u64,
    /// Pages that the destination read from a disk, verified by digest.
    pub disk_pages: u64,
    /// Pages sent over the link, the first time.
    pub data_pages: u64,
    /// Pages sent over the link because the guest wrote them again.
    pub resent_pages: u64,
    /// Pages that QEMU sent again though the destination had them as they are: not sent over the link.
    #[serde(default)]
    pub unchanged_pages: u64,
    /// Pages sent over the link because what the disk held did not match, or could not be read.
    pub mismatched_pages: u64,
    /// Pages that were to come from a disk, and were sent over the link as the destination had not read them yet.
    #[serde(default)]
    pub late_pages: u64,
    /// Bytes that the link carried, both ways, framing included.
    pub wire_bytes: u64,
    /// Bytes of page content on the link after compression.
    pub page_bytes: u64,
    /// Bytes that the destination read from disks.
    pub disk_bytes: u64,
    /// Bytes read from QEMU's stream at the source.
    pub stream_bytes: u64,
}

/// What is expected.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Forecast {
    /// Until the VM runs at the destination, in milliseconds; absent when that will not be.
    pub left_ms: Option<f64>,
    /// How long nobody would run the VM if it were paused now, in milliseconds.
    pub downtime_ms: f64,
    /// How long nobody will run it then, in milliseconds; absent when that will not be.
    #[serde(default)]
    pub pause_ms: Option<f64>,
    /// Why the goal will not be met, and what would meet it.
    pub advice: Option<String>,
}

/// What was expected, to be compared with what came.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Expected {
    /// When that was said, in milliseconds since the command.
    pub made_ms: f64,
    /// From the command to the end, in milliseconds.
    pub total_ms: f64,
    /// How long nobody would run the VM, in milliseconds.
    pub downtime_ms: f64,
}

/// A moment of a running migration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Snapshot {
    /// Where it stands.
    pub phase: Phase,
    /// Since the command, in milliseconds.
    pub elapsed_ms: u64,
    /// What moved so far.
    pub traffic: Traffic,
    /// What the hypervisor believes is left, in bytes; absent before the first answer.
    pub remaining_bytes: Option<u64>,
    /// The guest's memory, in bytes.
    pub total_bytes: u64,
    /// Page frames that the guest's agent names as clean page cache.
    pub hinted_pages: u64,
    /// For how long there has been no connection to the destination, in milliseconds; 0 while there is one.
    #[serde(default)]
    pub link_away_ms: u64,
    /// Pages that the guest asked for before they had come, in post-copy.
    #[serde(default)]
    pub requested_pages: u64,
    /// Pages that came when they did because the guest had named them as wanted first, in post-copy.
    #[serde(default)]
    pub ordered_pages: u64,
    /// What it waits for and why, if it does not go on: a host whose post-copy was cut off.
    #[serde(default)]
    pub waits_for: Option<String>,
    /// How memory moves as it looks now, and why.
    #[serde(default)]
    pub choice: Option<Choice>,
    /// What is expected, once that can be said.
    #[serde(default)]
    pub forecast: Option<Forecast>,
}

/// Downtime in its parts, in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Downtime {
    /// From the source's pause to the last page of memory on the link.
    pub memory_ms: f64,
    /// From there to the destination having loaded all devices.
    pub devices_ms: f64,
    /// From there to the VM running: the commit, its way over the link, and the disks taken over. Half the shortest
    /// round trip is taken off for the word's way back.
    pub handover_ms: f64,
    /// All of it.
    pub total_ms: f64,
}

/// How long the phases before the pause took, in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Phases {
    /// Versions, machine and disks agreed.
    pub negotiate_ms: f64,
    /// The destination's QEMU started, the guest's first report taken.
    pub prepare_ms: f64,
    /// Memory copied while the VM ran.
    pub pre_copy_ms: f64,
}

/// What came after the VM ran at its destination.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct PostCopy {
    /// From the VM running there to all of its memory being there, in milliseconds.
    pub total_ms: f64,
    /// Pages that came in this time.
    pub pages: u64,
    /// Pages that the guest asked for before they had come.
    pub requested_pages: u64,
    /// What it cost the guest; absent when that is not known, as after a break.
    #[serde(default)]
    pub stalls: Option<Stalls>,
    /// The kernel's pages, and pages among them, that were sent again right before the switch.
    #[serde(default)]
    pub kernel_pages: u64,
    /// Pages that came when they did because the guest had named them as wanted first.
    #[serde(default)]
    pub ordered_pages: u64,
    /// What the guest named; absent when its agent named nothing.
    #[serde(default)]
    pub classes: Option<Classes>,
}

/// What post-copy cost the guest after it ran at its destination.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Stalls {
    /// How long all virtual CPUs stood still at once, in milliseconds.
    pub all_cpus_ms: u32,
    /// How long the one did that stood still for longest, in milliseconds.
    pub cpu_ms: u32,
    /// Times that a process slept for a page instead of stopping a CPU.
    pub waits: u64,
    /// How long processes slept in all, in milliseconds.
    pub waited_ms: f64,
    /// How long one slept at most, in milliseconds.
    pub longest_ms: f64,
    /// Pages of processes that were absent and watched; 0 where the guest has no gate.
    pub gated_pages: u64,
    /// Page frames that were absent when its agent was told of them.
    #[serde(default)]
    pub absent_pages: u64,
    /// CPU time of the guest for its gate, in milliseconds.
    #[serde(default)]
    pub gate_cpu_ms: f64,
}

/// Page frames by class, as the guest tells.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Classes {
    /// The kernel's that are nothing of the following.
    pub kernel: u64,
    /// The kernel's small objects.
    pub slab: u64,
    /// Page tables.
    pub page_tables: u64,
    /// Of processes alone.
    pub anonymous: u64,
    /// Page cache that is as on disk.
    pub clean_file: u64,
    /// Page cache that is not, or has no disk.
    pub dirty_file: u64,
    /// Holds nothing.
    pub free: u64,
    /// What cannot be told.
    pub other: u64,
    /// What processes touched in the last moment before the switch, of whichever class.
    pub working_sets: u64,
}

/// How a migration ended well.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Summary {
    /// The VM.
    pub vm: String,
    /// The host that it left.
    pub from: String,
    /// The host that runs it now.
    pub to: String,
    /// From the command to the VM running there, in milliseconds.
    pub total_ms: f64,
    /// How long it took until then, by phase.
    pub phases: Phases,
    /// How long nobody ran it.
    pub downtime: Downtime,
    /// What came afterwards, in post-copy; `total_ms` includes it.
    #[serde(default)]
    pub post_copy: Option<Box<PostCopy>>,
    /// How memory moved, and why.
    #[serde(default)]
    pub choice: Option<Choice>,
    /// What was expected: by the first forecast after one pass over memory, or when post-copy began.
    #[serde(default)]
    pub expected: Option<Expected>,
    /// What moved.
    pub traffic: Traffic,
    /// Page frames that the guest's agent named as clean page cache, in its last report.
    pub hinted_pages: u64,
    /// What was less than it could have been, for people: no agent, no module, hints given up.
    pub remarks: Vec<String>,
}
