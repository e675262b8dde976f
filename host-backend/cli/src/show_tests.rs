use super::*;
use transhume_api::migration::{Classes, Downtime, Expected, Phases, PostCopy, Stalls, Summary};
use transhume_api::{Choice, Failure, FailureKind};

fn job(state: JobState) -> JobInfo {
    JobInfo {
        id: 3,
        vm: "web1".to_owned(),
        from: "hosta".to_owned(),
        to: "hostb".to_owned(),
        dry_run: false,
        state,
        started_ms: 0,
        progress: Snapshot {
            phase: Phase::PreCopy,
            elapsed_ms: 1500,
            traffic: Traffic {
                zero_pages: 256,
                disk_pages: 512,
                data_pages: 256,
                wire_bytes: 2 << 20,
                stream_bytes: 4 << 20,
                ..Traffic::default()
            },
            remaining_bytes: Some(10 << 20),
            total_bytes: 64 << 20,
            hinted_pages: 600,
            link_away_ms: 0,
            requested_pages: 0,
            ordered_pages: 0,
            waits_for: None,
            choice: None,
            forecast: None,
        },
        qemu: None,
        offer: None,
        in_doubt: false,
        error: None,
        summary: None,
        plan: None,
        plan_text: None,
    }
}

#[test]
fn shows_numbers_as_people_read_them() {
    for (number, text) in [
        (0, "0 B"),
        (999, "999 B"),
        (1 << 10, "1.00 KiB"),
        (1000 << 10, "0.98 MiB"),
        (20 << 20, "20.0 MiB"),
        (999 << 20, "999 MiB"),
        (u64::MAX, "16777216 TiB"),
    ] {
        assert_eq!(bytes(number), text);
    }
    for (ms, text) in [
        (0.25, "0.2 ms"),
        (43.4, "43 ms"),
        (5821.0, "5.82 s"),
        (125_000.0, "2 min 05 s"),
        (f64::NAN, "0 min 00 s"),
    ] {
        assert_eq!(duration(ms), text);
    }
}

#[test]
fn tells_a_running_job_with_what_can_be_done() {
    let text = super::job(&job(JobState::Running));
    assert!(text.contains("copying memory, 1.50 s, wire 2.00 MiB, from disk 2.00 MiB, zero pages 1.00 MiB, data 1.00 MiB"), "{text}");
    assert!(text.contains("transhume job cancel 3"), "{text}");
    let mut job = job(JobState::Running);
    let rates = Some((1_048_576.0, 524_288.0));
    let text = moment(&job, rates);
    assert!(!text.contains("left"), "too early for that: {text}");
    job.progress.elapsed_ms = GROUND_MS;
    let text = moment(&job, rates);
    assert!(
        text.starts_with("copying memory, 4.00 s, about 10.00 s left, 512 KiB/s, wire 2.00 MiB"),
        "{text}"
    );
    // The link moves something, and QEMU nothing.
    let text = moment(&job, Some((2.0, 524_288.0)));
    assert!(!text.contains("left"), "{text}");
    let text = moment(&job, Some((900.0, 20.0)));
    assert!(
        text.starts_with("copying memory, 4.00 s, nothing moves at the moment, wire"),
        "{text}"
    );
    job.progress.link_away_ms = 7000;
    let text = moment(&job, rates);
    assert!(
        text.starts_with("copying memory, 4.00 s, the link has been away for 7.00 s, wire"),
        "{text}"
    );
}

#[test]
fn sums_up_with_the_downtime_in_its_parts() {
    let mut job = job(JobState::Completed);
    job.summary = Some(Summary {
        vm: "web1".to_owned(),
        from: "hosta".to_owned(),
        to: "hostb".to_owned(),
        total_ms: 5821.0,
        phases: Phases {
            negotiate_ms: 128.0,
            prepare_ms: 650.0,
            pre_copy_ms: 5000.0,
        },
        downtime: Downtime {
            memory_ms: 12.0,
            devices_ms: 20.0,
            handover_ms: 11.0,
            total_ms: 43.0,
        },
        post_copy: None,
        choice: Some(Choice {
            mode: Mode::Pre,
            why: "the guest writes 20 MB/s, the link takes 100 MB/s".to_owned(),
        }),
        expected: Some(Expected {
            made_ms: 3000.0,
            total_ms: 6100.0,
            downtime_ms: 110.0,
        }),
        traffic: job.progress.traffic,
        hinted_pages: 600,
        remarks: vec!["the agent has no module".to_owned()],
    });
    let expected = "\
web1 runs on hostb now; it left hosta in 5.82 s.
  until then          5.78 s  (negotiation 128 ms, preparation 650 ms, pre-copy 5.00 s)
  downtime             43 ms  (memory 12 ms, devices 20 ms, hand-over 11 ms)
  expected            6.10 s  (downtime 110 ms; predicted at 3.00 s)
  from disk         2.00 MiB  50.0 %
  zero pages        1.00 MiB  25.0 %
  data              1.00 MiB  25.0 %
  sent again             0 B   0.0 %
  unchanged              0 B   0.0 %
  digest mismatch        0 B   0.0 %
  disk was late          0 B   0.0 %
  on the wire       2.00 MiB  of 4.00 MiB that QEMU sent
  page cache        2.34 MiB  named by the guest's agent
  pre-copy        because the guest writes 20 MB/s, the link takes 100 MB/s
  note: the agent has no module";
    assert_eq!(super::job(&job), expected);
    if let Some(summary) = &mut job.summary {
        summary.post_copy = Some(Box::new(PostCopy {
            total_ms: 2500.0,
            pages: 1024,
            requested_pages: 16,
            stalls: Some(Stalls {
                all_cpus_ms: 20,
                cpu_ms: 310,
                waits: 12,
                waited_ms: 2040.0,
                longest_ms: 230.0,
                gated_pages: 1000,
                absent_pages: 2048,
                gate_cpu_ms: 3.4,
            }),
            kernel_pages: 32,
            ordered_pages: 256,
            classes: None,
        }));
    }
    let lines =
        "  post-copy           2.50 s  (4.00 MiB followed, 64.0 KiB of it asked for by the guest)
  vCPU stall          310 ms  (of the vCPU that waited longest for memory; 20 ms when all of them did)
  process wait        2.04 s  (processes of the guest waited 12 times for memory, 230 ms at most, while others ran)
  gate overhead       3.4 ms  (the guest's CPU time for 8.00 MiB of absent memory)
";
    let text = super::job(&job);
    assert!(
        text.contains(lines) && !text.contains("prefetched"),
        "{text}"
    );
    let post = job.summary.as_mut().and_then(|all| all.post_copy.as_mut());
    if let Some(post) = post {
        post.classes = Some(Classes {
            kernel: 100,
            slab: 100,
            page_tables: 56,
            working_sets: 512,
            ..Classes::default()
        });
    }
    let line = "  prefetched        1.00 MiB  (of 2.00 MiB in use by processes; before the switch 128 KiB of the kernel's 1.00 MiB)\n";
    let text = super::job(&job);
    assert!(text.contains(line), "{text}");
}

#[test]
fn nobody_is_told_to_cancel_what_was_handed_over() {
    let mut job = job(JobState::Running);
    assert!(super::job(&job).contains("job cancel 3"));
    job.progress.phase = Phase::PostCopy;
    job.progress.requested_pages = 16;
    let text = super::job(&job);
    assert!(!text.contains("job cancel"), "{text}");
    assert!(
        text.contains(", 10.0 MiB left, 64.0 KiB asked for"),
        "{text}"
    );
}

#[test]
fn tells_why_a_job_failed() {
    let mut job = job(JobState::Failed);
    job.error = Some("the link broke; web1 runs on at hosta".to_owned());
    assert_eq!(
        super::job(&job),
        "job 3, web1 to hostb, failed: the link broke; web1 runs on at hosta"
    );
}

#[test]
fn programs_get_the_content_and_failures_their_name() {
    assert_eq!(json(&Response::Vms(Vec::new())), "[]");
    assert!(json(&Response::Job(Box::new(job(JobState::Running)))).starts_with("{\"dry-run\":"));
    let failure = Failure {
        kind: FailureKind::Refused,
        message: "no".to_owned(),
    };
    let text = json(&Response::Error(failure));
    assert_eq!(text, r#"{"error":{"kind":"refused","message":"no"}}"#);
}

#[test]
fn quotes_for_a_shell() {
    let arguments = [
        "/usr/bin/qemu",
        "-append",
        "a b's",
        "-netdev",
        "user,id=net0",
        "-x",
        "",
    ];
    let arguments: Vec<String> = arguments.iter().map(|&one| one.to_owned()).collect();
    let text = shell(&arguments);
    assert_eq!(
        text,
        "/usr/bin/qemu \\\n  -append 'a b'\\''s' \\\n  -netdev user,id=net0 \\\n  -x ''"
    );
}

#[test]
fn lines_up_columns() {
    let text = rows(
        &["NAME", "STATE"],
        &[vec!["a".to_owned(), "running".to_owned()]],
    );
    assert_eq!(text, "NAME  STATE\na     running");
}

#[test]
fn a_refusal_is_told_as_one_whatever_the_other_host_says() {
    let mut job = job(JobState::Refused);
    job.error = Some("the migration is complete: web1 runs at hostb".to_owned());
    let text = super::job(&job);
    assert!(
        text.contains(", refused: the migration is complete"),
        "{text}"
    );
    job.state = JobState::Failed;
    job.error = Some("the migration failed: no link".to_owned());
    assert!(super::job(&job).ends_with(": the migration failed: no link"));
}
