//! What a migration came to, as people read it.

use crate::units::{PAGE, bytes, duration, to_float};
use std::fmt::Write as _;
use transhume_api::migration::{PostCopy, Summary, Traffic};
use transhume_api::{Choice, Mode};

fn share(pages: u64, all: u64) -> String {
    let percent = if all == 0 {
        0.0
    } else {
        100.0 * to_float(pages) / to_float(all)
    };
    format!("{:>10}  {percent:>4.1} %", bytes(pages * PAGE))
}

/// What a completed migration came to.
pub(crate) fn summary(summary: &Summary) -> String {
    let Summary {
        vm,
        from,
        to,
        traffic,
        ..
    } = summary;
    let mut text = format!(
        "{vm} runs on {to} now; it left {from} in {}.\n",
        duration(summary.total_ms)
    );
    times(&mut text, summary);
    if let Some(post) = &summary.post_copy {
        post_copy(&mut text, post);
    }
    let kinds = kinds(traffic);
    let all = kinds.iter().map(|(_, pages)| pages).sum();
    for (name, pages) in kinds {
        let _ = writeln!(text, "  {name:<15} {}", share(pages, all));
    }
    let mut row = |name: &str, value: String, more: String| {
        let _ = writeln!(text, "  {name:<15} {value:>10}  {more}");
    };
    row(
        "on the wire",
        bytes(traffic.wire_bytes),
        format!("of {} that QEMU sent", bytes(traffic.stream_bytes)),
    );
    row(
        "page cache",
        bytes(summary.hinted_pages * PAGE),
        "named by the guest's agent".to_owned(),
    );
    if let Some(Choice { mode, why }) = &summary.choice {
        let mode = match mode {
            Mode::Post => "post-copy",
            _ => "pre-copy",
        };
        let _ = writeln!(text, "  {mode:<15} because {why}");
    }
    for remark in &summary.remarks {
        let _ = writeln!(text, "  note: {remark}");
    }
    text.truncate(text.trim_end().len());
    text
}

/// How long each part took, and what had been predicted.
fn times(text: &mut String, summary: &Summary) {
    let Summary {
        phases, downtime, ..
    } = summary;
    let mut row = |name: &str, ms: f64, more: String| {
        let _ = writeln!(text, "  {name:<15} {:>10}  ({more})", duration(ms));
    };
    row(
        "until then",
        phases.negotiate_ms + phases.prepare_ms + phases.pre_copy_ms,
        format!(
            "negotiation {}, preparation {}, pre-copy {}",
            duration(phases.negotiate_ms),
            duration(phases.prepare_ms),
            duration(phases.pre_copy_ms)
        ),
    );
    row(
        "downtime",
        downtime.total_ms,
        format!(
            "memory {}, devices {}, hand-over {}",
            duration(downtime.memory_ms),
            duration(downtime.devices_ms),
            duration(downtime.handover_ms)
        ),
    );
    if let Some(expected) = &summary.expected {
        let more = format!(
            "downtime {}; predicted at {}",
            duration(expected.downtime_ms),
            duration(expected.made_ms)
        );
        row("expected", expected.total_ms, more);
    }
}

/// What post-copy took, and what it cost the guest.
fn post_copy(text: &mut String, post: &PostCopy) {
    let mut row = |name: &str, value: String, more: String| {
        let _ = writeln!(text, "  {name:<15} {value:>10}  ({more})");
    };
    row(
        "post-copy",
        duration(post.total_ms),
        format!(
            "{} followed, {} of it asked for by the guest",
            bytes(post.pages * PAGE),
            bytes(post.requested_pages * PAGE)
        ),
    );
    if let Some(stalls) = &post.stalls {
        row(
            "vCPU stall",
            duration(stalls.cpu_ms.into()),
            format!(
                "of the vCPU that waited longest for memory; {} when all of them did",
                duration(stalls.all_cpus_ms.into())
            ),
        );
        if stalls.gated_pages > 0 {
            row(
                "process wait",
                duration(stalls.waited_ms),
                format!(
                    "processes of the guest waited {} times for memory, {} at most, while others ran",
                    stalls.waits,
                    duration(stalls.longest_ms)
                ),
            );
            row(
                "gate overhead",
                duration(stalls.gate_cpu_ms),
                format!(
                    "the guest's CPU time for {} of absent memory",
                    bytes(stalls.absent_pages * PAGE)
                ),
            );
        }
    }
    if let Some(classes) = &post.classes {
        let kernel = classes.kernel + classes.slab + classes.page_tables;
        row(
            "prefetched",
            bytes(post.ordered_pages * PAGE),
            format!(
                "of {} in use by processes; before the switch {} of the kernel's {}",
                bytes(classes.working_sets * PAGE),
                bytes(post.kernel_pages * PAGE),
                bytes(kernel * PAGE)
            ),
        );
    }
}

pub(crate) fn kinds(traffic: &Traffic) -> [(&'static str, u64); 7] {
    [
        ("from disk", traffic.disk_pages),
        ("zero pages", traffic.zero_pages),
        ("data", traffic.data_pages),
        ("sent again", traffic.resent_pages),
        ("unchanged", traffic.unchanged_pages),
        ("digest mismatch", traffic.mismatched_pages),
        ("disk was late", traffic.late_pages),
    ]
}
