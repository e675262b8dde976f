//! Post-copy: the guest runs at its destination while part of its memory is still at the source.

use crate::bench::{Profile, Setup};
use crate::cleanup::still_time;
use crate::command::Run;
use crate::error::check;
use crate::hosts::daemon::Daemon;
use crate::hosts::{HOST_B, Hosts};
use crate::packages::Qemu;
use crate::qemu::serial::{Console, Side};
use crate::scenario::failures::any_moment::state;
use crate::scenario::failures::die::sigkill;
use crate::scenario::fixture::micro::{Micro, NAME, Qemus};
use crate::scenario::fixture::pair::{At, KEEPS, NEWEST, Pair};
use crate::scenario::fixture::transhume::{Answer, ask};
use crate::scenario::{Bed, Scenario};
use crate::{Error, Result};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(400);
pub(crate) const POST: [&str; 2] = ["--mode", "post"];
/// Bounds an answer of the Linux guest.
const ANSWER: Duration = Duration::from_secs(60);
/// In Mbit/s; what is left at the switch takes a while there.
pub(crate) const SLOW: u32 = 60;

pub(crate) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario {
            name: "post-copy-10.0",
            about: "there and back and there again, while the guest writes all the time",
            limit: LIMIT,
            run: |bed| in_sequence(bed, NEWEST),
        },
        Scenario {
            name: "post-copy-7.2",
            about: "the same with QEMU 7.2",
            limit: LIMIT,
            run: |bed| in_sequence(bed, (Qemu::V7_2, Qemu::V7_2)),
        },
        Scenario {
            name: "post-copy-link-breaks",
            about: "the link goes away twice after the hand-over, and the rest follows",
            limit: LIMIT,
            run: link_breaks,
        },
        Scenario {
            name: "post-copy-daemon-dies",
            about: "either daemon dies after the hand-over; when it is there again, the rest follows",
            limit: LIMIT,
            run: |bed| daemon_dies(bed, NEWEST),
        },
        Scenario {
            name: "post-copy-daemon-dies-7.2",
            about: "the same with QEMU 7.2",
            limit: LIMIT,
            run: |bed| daemon_dies(bed, (Qemu::V7_2, Qemu::V7_2)),
        },
        Scenario {
            name: "post-copy-link-away",
            about: "again and again no link after the hand-over, for longer than the job waits, and the rest follows",
            limit: LIMIT,
            run: link_away,
        },
        Scenario {
            name: "post-copy-lost",
            about: "the QEMU that has the rest of the memory ends: the job says what is lost",
            limit: LIMIT,
            run: lost,
        },
        Scenario {
            name: "post-copy-linux",
            about: "a Linux guest at work moves by post-copy; processes sleep for what is absent, and its data is right",
            limit: LIMIT,
            run: |bed| linux(bed, Course::Calm),
        },
        Scenario {
            name: "post-copy-linux-resumed",
            about: "the same, and the link goes away for longer than the job waits: its processes sleep again",
            limit: LIMIT,
            run: |bed| linux(bed, Course::LinkGone),
        },
        Scenario {
            name: "post-copy-linux-late-agent",
            about: "the same, and its agent stands still until the VM has run for six seconds: its processes sleep then",
            limit: LIMIT,
            run: |bed| linux(bed, Course::AgentLate),
        },
        Scenario {
            name: "post-copy-cancel",
            about: "a migration by post-copy can be cancelled before the guest is handed over, and not after",
            limit: LIMIT,
            run: cancel,
        },
    ]
}

/// Those that take long.
pub(crate) fn long_scenarios() -> Vec<Scenario> {
    vec![
        Scenario {
            name: "post-copy-11.1",
            about: "post-copy with QEMU 11.1, which keeps the VM until its devices are loaded at its destination",
            limit: LIMIT,
            run: |bed| in_sequence(bed, KEEPS),
        },
        Scenario {
            name: "post-copy-daemon-dies-11.1",
            about: "the same with QEMU 11.1",
            limit: LIMIT,
            run: |bed| daemon_dies(bed, KEEPS),
        },
    ]
}

/// A guest that writes more during one scan of its memory than a pause could carry.
pub(crate) fn writes(bed: &Bed) -> Result<Micro> {
    Ok(Micro {
        memory: 192,
        parameters: "cache=48M data=64M rate=60M".into(),
        ..Micro::new(bed)?
    })
}

/// Pages came after the guest ran.
pub(crate) fn followed(answer: &Answer) -> Result<()> {
    let number = |name: &str| answer.number(&format!("/summary/post-copy/{name}"));
    let (pages, asked) = (number("pages")?, number("requested-pages")?);
    println!("  {pages} pages followed, {asked} of them asked for");
    check(pages > 100, || format!("It was no post-copy: {answer}"))
}

fn in_sequence(bed: &Bed, qemus: Qemus) -> Result<()> {
    let pair = Pair::new(bed, qemus, Some(400))?;
    let mut life = pair.boot(&writes(bed)?)?;
    for from in [At::A, At::B, At::A] {
        followed(&pair.moves_by(from, &POST, &mut life)?)?;
    }
    // And as usual afterwards.
    pair.hosts.shape(None)?;
    pair.moves(At::B, &mut life).map(drop)
}

/// The number of the job of a migration that is in that phase.
fn job_in(pair: &Pair<'_>, from: At, phase: &str) -> Result<String> {
    pair.job_when(from, phase, |job| job["progress"]["phase"] == phase)
}

fn cancel(bed: &Bed) -> Result<()> {
    let pair = Pair::new(bed, NEWEST, Some(SLOW))?;
    let mut life = pair.boot(&writes(bed)?)?;
    let shown = |error| pair.with_logs(error);

    let command = pair.begin_migration(At::A, &POST)?;
    let job = pair.in_pre_copy(At::A).map_err(shown)?;
    ask(&pair.a, &["job", "cancel", &job])?.expect(0)?;
    command
        .end()?
        .refused(4, &["cancelled", "runs on at hosta"])?;
    pair.stayed(At::A, &mut life)?;

    let command = pair.begin_migration(At::A, &POST)?;
    pair.wait("the second migration to begin", || {
        let jobs = ask(&pair.a, &["job", "list"])?.expect(0)?;
        Ok(jobs.value.as_array().is_some_and(|jobs| jobs.len() == 2))
    })?;
    let job = job_in(&pair, At::A, "post-copy").map_err(shown)?;
    ask(&pair.a, &["job", "cancel", &job])?
        .refused(
            3,
            &["was handed over to hostb", "the rest of its memory follows"],
        )
        .map_err(shown)?;
    let answer = command.end()?.expect(0).map_err(shown)?;
    followed(&answer)?;
    pair.arrived(At::B, &mut life).map_err(shown)
}

fn link_breaks(bed: &Bed) -> Result<()> {
    let pair = Pair::new(bed, NEWEST, Some(SLOW))?;
    let mut life = pair.boot(&writes(bed)?)?;
    let shown = |error| pair.with_logs(error);
    let command = pair.begin_migration(At::A, &POST)?;
    job_in(&pair, At::A, "post-copy").map_err(shown)?;
    for _ in 0..2 {
        pair.hosts.break_link()?;
        std::thread::sleep(Duration::from_secs(2));
        pair.hosts.set_link(true)?;
        std::thread::sleep(Duration::from_millis(500));
    }
    let answer = command.end()?.expect(0).map_err(shown)?;
    followed(&answer)?;
    let remarks = answer.value["summary"]["remarks"].to_string();
    check(remarks.contains("taken up again"), || {
        format!("No word on the breaks: {answer}")
    })?;
    pair.arrived(At::B, &mut life).map_err(shown)
}

/// The job's migration is past the hand-over, and the guest runs there.
fn in_post_copy(pair: &Pair<'_>) -> Result<String> {
    let job = job_in(pair, At::A, "post-copy")?;
    // Not before it runs: QEMU cannot resume while it loads the devices.
    pair.wait("the guest to run there", || {
        Ok(state(pair, At::B)?.as_deref() == Some("running"))
    })?;
    Ok(job)
}

/// A daemon that dies after the hand-over goes on when it is there again.
fn daemon_dies(bed: &Bed, qemus: Qemus) -> Result<()> {
    for at in [At::A, At::B] {
        let mut pair = Pair::new(bed, qemus, Some(SLOW))?;
        let mut life = pair.boot(&writes(bed)?)?;
        let begin = [POST[0], POST[1], "--link-patience", "3"];
        let command = pair.begin_migration(At::A, &begin)?;
        let job = in_post_copy(&pair).map_err(|error| pair.with_logs(error))?;
        match at {
            At::A => pair.a.kill(),
            At::B => pair.b.kill(),
        }
        if matches!(at, At::A) {
            command.end()?.refused(5, &["transhumed", "job show"])?;
            pair.restart(at)?;
        } else {
            pair.wait("the job to say what it waits for", || {
                let job = ask(&pair.a, &["job", "show", &job])?.expect(0)?;
                Ok(job
                    .word("/progress/waits-for")
                    .is_ok_and(|what| what.contains("hostb")))
            })
            .map_err(|error| pair.with_logs(error))?;
            pair.restart(at)?;
            let answer = command.end()?.expect(0);
            let answer = answer.map_err(|error| pair.with_logs(error))?;
            followed(&answer)?;
        }
        completed(&pair, &job).map_err(|error| pair.with_logs(error))?;
        pair.arrived(At::B, &mut life)
            .and_then(|()| pair.nothing_left(At::A))
            .map_err(|error| pair.with_logs(error))?;
        // And as usual afterwards.
        pair.hosts.shape(None)?;
        pair.moves(At::B, &mut life)?;
    }
    Ok(())
}

fn completed(pair: &Pair<'_>, job: &str) -> Result<()> {
    pair.wait("the rest of the memory to follow", || {
        let job = ask(&pair.a, &["job", "show", job])?.expect(0)?;
        check(job.word("/state")? != "failed", || format!("Odd: {job}"))?;
        Ok(job.word("/state")? == "completed")
    })
}

/// The link is away again and again, for longer than the job waits for it, and QEMU's post-copy is resumed each time. Once
/// neither daemon gets a descriptor when it is back. Before a release it is away for half a minute, five times.
fn link_away(bed: &Bed) -> Result<()> {
    let pair = Pair::new(bed, NEWEST, Some(SLOW))?;
    let mut life = pair.boot(&writes(bed)?)?;
    let shown = |error| pair.with_logs(error);
    let begin = [POST[0], POST[1], "--link-patience", "3"];
    let command = pair.begin_migration(At::A, &begin)?;
    let job = in_post_copy(&pair).map_err(shown)?;
    let (rounds, away) = if bed.draw.all { (5, 28) } else { (2, 6) };
    for round in 0..rounds {
        pair.hosts.break_link()?;
        std::thread::sleep(Duration::from_secs(away));
        let said = ask(&pair.a, &["job", "show", &job])?.expect(0)?;
        said.word("/progress/waits-for").map_err(shown)?;
        if round == 1 {
            for at in [At::A, At::B] {
                descriptors(pair.daemon(at), "8:")?;
            }
        }
        std::thread::sleep(Duration::from_secs(2));
        pair.hosts.set_link(true)?;
        if round == 1 {
            std::thread::sleep(Duration::from_secs(3));
            for at in [At::A, At::B] {
                descriptors(pair.daemon(at), "1024:")?;
            }
        }
        pair.wait("the rest to follow again", || {
            let said = ask(&pair.a, &["job", "show", &job])?.expect(0)?;
            Ok(said.word("/progress/waits-for").is_err())
        })
        .map_err(shown)?;
        std::thread::sleep(Duration::from_millis(500));
    }
    let answer = command.end()?.expect(0).map_err(shown)?;
    followed(&answer)?;
    let remarks = answer.value["summary"]["remarks"].to_string();
    check(remarks.contains("was cut off, and went on"), || {
        format!("No word on it: {answer}")
    })?;
    pair.arrived(At::B, &mut life).map_err(shown)
}

/// Bounds the descriptors that a daemon may have from now on.
fn descriptors(daemon: &Daemon, most: &str) -> Result<()> {
    Run::new("prlimit")
        .args(["--pid", &daemon.id().to_string()])
        .arg(format!("--nofile={most}"))
        .cure("It needs util-linux")
        .output()
        .map(drop)
}

/// When the QEMU that has the rest ends, the job says that it is lost, and all can be cleared away.
fn lost(bed: &Bed) -> Result<()> {
    let pair = Pair::new(bed, NEWEST, Some(SLOW))?;
    let life = pair.boot(&writes(bed)?)?;
    let command = pair.begin_migration(At::A, &POST)?;
    in_post_copy(&pair).map_err(|error| pair.with_logs(error))?;
    for process in pair.qemus(At::A) {
        sigkill(process)?;
    }
    let ended = command.end()?;
    let ended = ended.refused(
        7,
        &["cannot go on", "part of its memory is lost", "vm stop"],
    );
    ended.map_err(|error| pair.with_logs(error))?;
    drop(life);
    ask(&pair.b, &["vm", "stop", NAME, "--force"])?.expect(0)?;
    for at in [At::A, At::B] {
        check(pair.qemus(at).is_empty(), || "A QEMU is left".into())?;
    }
    Ok(())
}

/// What happens to a Linux guest on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Course {
    /// Nothing.
    Calm,
    /// The link goes away after the switch, and comes back.
    LinkGone,
    /// Its agent is stopped before the switch, and goes on long after it.
    AgentLate,
}

fn linux(bed: &Bed, course: Course) -> Result<()> {
    let (layout, packages) = (&bed.layout, &bed.packages);
    let setup = Setup::prepare(layout, packages, Profile::QUICK, Qemu::V10_0, true)?;
    let machine = &setup.machine;
    // So slow that the agent has a part in it.
    let hosts = Hosts::new(Some(25))?;
    let programs = bed.programs()?;
    let a = Daemon::start(&hosts, &hosts.a, programs, &setup.qemu)?;
    let b = Daemon::start(&hosts, &hosts.b, programs, &setup.qemu)?;
    let console = Console::new(&machine.name);
    a.boot(&hosts.a, machine, &console)?;
    let serial = b.vm_folder(&machine.name).join("serial.sock");
    let arguments = [
        "migrate",
        &machine.name,
        "--to",
        HOST_B,
        "--link-patience",
        "1",
    ];
    let arguments = [&arguments, &POST[..]].concat();
    let answer = std::thread::scope(|scope| {
        // The socket is there once the destination's QEMU is.
        scope.spawn(|| console.attach(Side::Destination, &serial, || b.alive()));
        let broken = scope.spawn(|| match course {
            Course::Calm => Ok(()),
            Course::LinkGone => break_off(&hosts, &a, &b),
            Course::AgentLate => hold_agent(&console, &a, &b),
        });
        let answer = ask(&a, &arguments)?;
        let broken = broken.join();
        broken.unwrap_or_else(|_| Err(Error::Check("A thread failed".into())))?;
        Ok::<_, Error>(answer)
    })?;
    let answer = answer.expect(0).map_err(|error| {
        Error::Check(format!(
            "{error}\nhosta:\n{}\nhostb:\n{}",
            a.words(),
            b.words()
        ))
    })?;
    followed(&answer)?;
    console.check(Side::Destination, ANSWER, || b.alive())?;
    gated(&answer, &b, &console)?;
    if course == Course::LinkGone {
        let remarks = answer.value["summary"]["remarks"].to_string();
        check(remarks.contains("was cut off, and went on"), || {
            format!("It was not: {answer}")
        })?;
        let said = console.run(
            Side::Destination,
            "grep -c 'the gate is over' /tmp/agent.log",
            ANSWER,
            || b.alive(),
        )?;
        check(said.trim() != "1", || {
            format!(
                "The guest had no second gate: {answer}\nhostb:\n{}",
                b.words()
            )
        })?;
    }
    if course == Course::Calm {
        ordered(&answer, &b, &console)?;
    }
    if course == Course::AgentLate {
        check(b.words().contains("it is asked again"), || {
            format!("The agent answered at once: {}", b.words())
        })?;
    }
    ask(&b, &["vm", "stop", &machine.name, "--force"])?
        .expect(0)
        .map(drop)
}

/// Stops the agent once it has opened the gate for its host, and lets it go on when the next one has waited in vain.
fn hold_agent(console: &Console, a: &Daemon, b: &Daemon) -> Result<()> {
    let stop = "(until grep -q handle_mm_fault /tmp/t/enabled_functions; do sleep 0.2; done; \
        killall -STOP transhume-agent) > /dev/null 2>&1 &";
    let stop = format!("mkdir -p /tmp/t; mount -t tracefs t /tmp/t; {stop}");
    console.run(Side::Source, &stop, ANSWER, || a.alive())?;
    wait_until_it_follows(a, b)?;
    std::thread::sleep(Duration::from_secs(6));
    let go_on = "killall -CONT transhume-agent; umount /tmp/t";
    console
        .run(Side::Destination, go_on, ANSWER, || b.alive())
        .map(drop)
}

/// Takes the link away while memory follows, for longer than the job waits for it.
fn break_off(hosts: &Hosts, a: &Daemon, b: &Daemon) -> Result<()> {
    wait_until_it_follows(a, b)?;
    // So that there was a gate.
    std::thread::sleep(Duration::from_secs(2));
    hosts.break_link()?;
    std::thread::sleep(Duration::from_secs(4));
    hosts.set_link(true)
}

/// Until the VM runs at its destination and its memory follows.
fn wait_until_it_follows(a: &Daemon, b: &Daemon) -> Result<()> {
    let begun = Instant::now();
    let follows = || {
        let jobs = ask(a, &["job", "list"])?;
        let phase = &jobs.value[0]["progress"]["phase"];
        let vms = ask(b, &["vm", "list"])?;
        Ok::<_, Error>(phase == "post-copy" && vms.value[0]["state"] == "running")
    };
    while !follows()? {
        still_time()?;
        check(begun.elapsed() < LIMIT, || {
            "It was never handed over".into()
        })?;
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// The guest told what is its kernel's and what its processes work with, its workload first.
fn ordered(answer: &Answer, b: &Daemon, console: &Console) -> Result<()> {
    println!("  {}", answer.value["summary"]["post-copy"]);
    let number = |name: &str| answer.number(&format!("/summary/post-copy/{name}"));
    let own = Profile::QUICK.own * 256;
    check(
        number("classes/kernel")? > 1000
            && number("classes/slab")? > 100
            && number("classes/page-tables")? > 10
            && number("classes/anonymous")? > own
            && number("classes/clean-file")? > Profile::QUICK.cache * 256 / 2
            && number("classes/working-sets")? > 100
            && number("ordered-pages")? > 0,
        || format!("The classes make no sense: {answer}"),
    )?;
    let look = "grep -E 'first=[1-9][0-9]{2}' /tmp/agent.log";
    let said = console.run(Side::Destination, look, ANSWER, || b.alive())?;
    println!("  {}", said.trim());
    Ok(())
}

/// Succeeds in a guest whose hook goes away, and everybody who slept behind it, and whose kernel has nothing to complain
/// of. The module lets everybody go first, and takes its hook out then.
pub(crate) const GATE_IS_GONE: &str = "mkdir -p /tmp/t; mount -t tracefs t /tmp/t; i=0; \
    hooked() { grep $1 -E 'handle_mm_fault|filemap_|generic_perform_write|iomap_file_buffered' /tmp/t/enabled_functions; }; \
    while hooked -q && [ $i -lt 30 ]; do sleep 1; i=$((i + 1)); done; \
    ! hooked && ! grep -lE 'gate_(fault|wait_for)' /proc/[0-9]*/stack 2>/dev/null && \
    ! dmesg | grep -E 'WARNING:|BUG:|Oops|Bad page'";

/// Processes slept for absent pages, none sleeps on, and the kernel has nothing to complain of.
fn gated(answer: &Answer, b: &Daemon, console: &Console) -> Result<()> {
    let stalls = &answer.value["summary"]["post-copy"]["stalls"];
    println!("  {stalls}");
    // Pages that are inaccessible by an earlier gate, whose link broke, are not made so again.
    let slept = ["gated-pages", "waits"].map(|what| stalls[what].as_u64() > Some(0));
    check(slept.contains(&true), || {
        format!(
            "No process slept, or nothing was said of it: {answer}\nhostb:\n{}",
            b.words()
        )
    })?;
    check(
        stalls["gate-cpu-ms"].as_f64() > Some(0.0)
            && stalls["absent-pages"].as_u64() >= stalls["gated-pages"].as_u64(),
        || format!("What the gate cost makes no sense: {answer}"),
    )?;
    let said = console.run(
        Side::Destination,
        "grep 'the gate is over' /tmp/agent.log",
        ANSWER,
        || b.alive(),
    )?;
    println!("  {}", said.trim());
    check(stalls["cpu-ms"].is_u64(), || {
        format!("Nothing is said of CPUs that stood still: {answer}")
    })?;
    console
        .run(Side::Destination, GATE_IS_GONE, ANSWER, || b.alive())
        .map(drop)
}
