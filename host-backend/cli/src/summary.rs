//! What a migration came to, as people read it.

use crate::units::{PAGE, bytes, duration, to_float};
use std::fmt::Write as _;
use transhume_api::migration::{Summary, Traffic};
use transhume_api::{Choice, Mode};

fn share(pages: u64, all: u64) -> String {
    let percent = if all == 0 {
        0.0
    } else {
        100.0 * to_float(pages) / to_float(all)
    };
    format!("{:>10}  {percent:>4.1} %", bytes(pages * PAGE))
}

pub(crate) fn summary(summary: &Summary) -> String {
    let Summary {
        vm,
        from,
        to,
        phases,
        downtime,
        traffic,
        ..
    } = summary;
    let mut text = format!(
        "{vm} runs on {to} now; it left {from} in {}.\n",
        duration(summary.total_ms)
    );
    let _ = writeln!(
        text,
        "  until then     {:>10}  (negotiation {}, preparation {}, pre-copy {})",
        duration(phases.negotiate_ms + phases.prepare_ms + phases.pre_copy_ms),
        duration(phases.negotiate_ms),
        duration(phases.prepare_ms),
        duration(phases.pre_copy_ms)
    );
    let _ = writeln!(
        text,
        "  downtime       {:>10}  (memory {}, devices {}, hand-over {})",
        duration(downtime.total_ms),
        duration(downtime.memory_ms),
        duration(downtime.devices_ms),
        duration(downtime.handover_ms)
    );
    if let Some(expected) = &summary.expected {
        let _ = writeln!(
            text,
            "  expected       {:>10}  (downtime {}; so it looked after {})",
            duration(expected.total_ms),
            duration(expected.downtime_ms),
            duration(expected.made_ms)
        );
    }
    if let Some(post) = &summary.post_copy {
        let _ = writeln!(
            text,
            "  post-copy      {:>10}  ({} followed, {} of it asked for by the guest)",
            duration(post.total_ms),
            bytes(post.pages * PAGE),
            bytes(post.requested_pages * PAGE)
        );
        if let Some(stalls) = &post.stalls {
            let _ = writeln!(
                text,
                "  stood still    {:>10}  (the CPU that did for longest; {} all of them)",
                duration(stalls.cpu_ms.into()),
                duration(stalls.all_cpus_ms.into())
            );
            if stalls.gated_pages > 0 {
                let _ = writeln!(
                    text,
                    "  slept          {:>10}  (processes, {} times for absent memory, {} at most)",
                    duration(stalls.waited_ms),
                    stalls.waits,
                    duration(stalls.longest_ms)
                );
                let _ = writeln!(
                    text,
                    "  gate's CPU     {:>10}  (of the guest, for {} that was absent)",
                    duration(stalls.gate_cpu_ms),
                    bytes(stalls.absent_pages * PAGE)
                );
            }
        }
        if let Some(classes) = &post.classes {
            let kernel = classes.kernel + classes.slab + classes.page_tables;
            let _ = writeln!(
                text,
                "  in order       {:>10}  (of {} that processes work with; before the switch {} of the kernel's {})",
                bytes(post.ordered_pages * PAGE),
                bytes(classes.working_sets * PAGE),
                bytes(post.kernel_pages * PAGE),
                bytes(kernel * PAGE)
            );
        }
    }
    let kinds = kinds(traffic);
    let all = kinds.iter().map(|(_, pages)| pages).sum();
    for (name, pages) in kinds {
        let _ = writeln!(text, "  {name:<14} {}", share(pages, all));
    }
    let _ = writeln!(
        text,
        "  on the wire    {:>10}  of {} that QEMU sent",
        bytes(traffic.wire_bytes),
        bytes(traffic.stream_bytes)
    );
    let _ = write!(
        text,
        "  page cache     {:>10}  named by the guest's agent",
        bytes(summary.hinted_pages * PAGE)
    );
    if let Some(Choice { mode, why }) = &summary.choice {
        let mode = match mode {
            Mode::Post => "post-copy",
            _ => "pre-copy",
        };
        let _ = write!(text, "\n  {mode:<14} because {why}");
    }
    for remark in &summary.remarks {
        let _ = write!(text, "\n  note: {remark}");
    }
    text
}

pub(crate) fn kinds(traffic: &Traffic) -> [(&'static str, u64); 7] {
    [
        ("from disk", traffic.disk_pages),
        ("zero pages", traffic.zero_pages),
        ("data", traffic.data_pages),
        ("sent again", traffic.resent_pages),
        ("unchanged", traffic.unchanged_pages),
        ("disk differed", traffic.mismatched_pages),
        ("disk was late", traffic.late_pages),
    ]
}
