//! A guest ends or reboots by itself while it moves, in each phase: the job says so, and nothing is left on either host.

use crate::Result;
use crate::error::check;
use crate::scenario::failures::any_moment::state;
use crate::scenario::fixture::micro::{Life, Micro, NAME};
use crate::scenario::fixture::pair::{At, NEWEST, Pair};
use crate::scenario::fixture::transhume::{Answer, Running, ask};
use crate::scenario::post_copy::moves::POST;
use crate::scenario::{Bed, Scenario};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(300);
/// In Mbit/s: a phase lasts long enough that the guest ends in it.
const SLOW: u32 = 60;

/// The same, for what follows after the hand-over.
const TRICKLE: u32 = 16;

pub(crate) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario {
            name: "guest-ends-pre-copy",
            about: "a guest shuts down, panics, or reboots with -no-reboot while its memory is copied",
            limit: LIMIT,
            run: pre_copy,
        },
        Scenario {
            name: "guest-ends-switchover",
            about: "a guest shuts down at some moment about the switch-over, in pre-copy and in post-copy",
            limit: LIMIT,
            run: switchover,
        },
        Scenario {
            name: "guest-ends-post-copy",
            about: "a guest shuts down after the hand-over: the source's QEMU ends, and nothing is called lost",
            limit: LIMIT,
            run: post_copy,
        },
        Scenario {
            name: "guest-reboots",
            about: "a guest reboots in pre-copy, and in post-copy: it arrives, and boots on",
            limit: LIMIT,
            run: reboots,
        },
    ]
}

/// A guest that takes seconds to move.
fn big(bed: &Bed) -> Result<Micro> {
    Ok(Micro {
        memory: 192,
        parameters: "cache=48M data=64M rate=60M".into(),
        ..Micro::new(bed)?
    })
}

/// The job says that the guest ended, by this word, at that host, and nothing of the VM runs.
fn has_ended(pair: &Pair<'_>, answer: &Answer, did: &str, at: &str) -> Result<()> {
    check(
        answer.code == 6
            && answer.word("/state")? == "ended"
            && answer.message().contains(did)
            && answer.message().contains(at),
        || format!("The guest {did} at {at}, but: {answer}"),
    )?;
    println!("  {}", answer.message());
    is_gone(pair)
}

/// No host lists the VM or has a process of it.
fn is_gone(pair: &Pair<'_>) -> Result<()> {
    for at in [At::A, At::B] {
        pair.wait("the VM to be off the list", || {
            Ok(state(pair, at)?.is_none())
        })?;
        let daemon = pair.daemon(at).id();
        pair.wait("all processes but the daemon to be gone", || {
            Ok(pair.host(at).processes() == [daemon])
        })?;
    }
    Ok(())
}

/// How the job of a VM whose guest ended is shown later, and that the name is free.
fn starts_again(pair: &Pair<'_>, bed: &Bed) -> Result<()> {
    let jobs = ask(&pair.a, &["job", "list"])?.expect(0)?;
    let last = jobs.value.as_array().and_then(|jobs| jobs.last());
    check(
        last.is_some_and(|job| job["state"] == "ended" && job["in-doubt"] == false),
        || format!("Odd: {jobs}"),
    )?;
    pair.hosts.shape(Some(1000))?;
    let mut life = pair.boot(&Micro::new(bed)?)?;
    pair.moves(At::A, &mut life).map(drop)
}

fn pre_copy(bed: &Bed) -> Result<()> {
    for mode in ["auto", "pre", "post"] {
        let pair = Pair::new(bed, NEWEST, Some(SLOW))?;
        let shown = |error| pair.with_logs(error);
        let mut life = pair.boot(&big(bed)?)?;
        let command = pair.begin_migration(At::A, &["--mode", mode])?;
        pair.in_pre_copy(At::A).map_err(shown)?;
        life.end("poweroff", 0)?;
        has_ended(&pair, &command.end()?, "shut down", "hosta").map_err(shown)?;
        if mode == "auto" {
            starts_again(&pair, bed).map_err(shown)?;
        }
    }
    for (how, option, did) in [
        ("reset", &["-no-reboot"][..], "rebooted"),
        ("panic", &["-device", "pvpanic"], "panicked"),
    ] {
        let pair = Pair::new(bed, NEWEST, Some(SLOW))?;
        let shown = |error| pair.with_logs(error);
        let (qemu, mut life) = pair.adopt_with(&big(bed)?, option)?;
        let command = pair.begin_migration(At::A, &["--mode", "pre"])?;
        pair.in_pre_copy(At::A).map_err(shown)?;
        life.end(how, 0)?;
        let answer = command.end()?;
        drop(qemu);
        has_ended(&pair, &answer, did, "hosta").map_err(shown)?;
    }
    Ok(())
}

/// The guest may have ended at either host then: at the second one as any guest there.
fn switchover(bed: &Bed) -> Result<()> {
    let pair = Pair::new(bed, NEWEST, Some(400))?;
    let shown = |error| pair.with_logs(error);
    for mode in ["pre", "post"] {
        // How long it takes, for moments about the switch.
        let mut life = pair.boot(&big(bed)?)?;
        life.write_only(4 << 20)?;
        let answer = pair.migrate(At::A, &["--mode", mode])?.expect(0)?;
        life.moved(&pair.folder(At::B))?;
        life.end("poweroff", 0)?;
        is_gone(&pair).map_err(shown)?;
        let total = answer.value["summary"]["total-ms"].as_f64();
        let total = total.unwrap_or_default();
        for tenth in 5..12 {
            let mut life = pair.boot(&big(bed)?)?;
            life.write_only(4 << 20)?;
            // At most some seconds.
            let after = Duration::from_secs_f64((total * f64::from(tenth) / 10e3).clamp(0.0, 60.0));
            life.end("poweroff", u64::try_from(after.as_millis()).unwrap_or(0))?;
            let answer = pair.migrate(At::A, &["--mode", mode])?;
            println!("  {mode}, {after:?}: {} {}", answer.code, answer.message());
            check(matches!(answer.code, 0 | 6), || format!("Odd: {answer}")).map_err(shown)?;
            is_gone(&pair).map_err(shown)?;
        }
    }
    Ok(())
}

/// A guest that runs at its destination while part of its memory is still here.
fn follows<'a>(bed: &'a Bed, pair: &Pair<'a>) -> Result<(Running, Life)> {
    let mut life = pair.boot(&big(bed)?)?;
    let jobs = || {
        let jobs = ask(&pair.a, &["job", "list"])?.expect(0)?;
        Ok(jobs.value.as_array().map_or(0, Vec::len))
    };
    let before = jobs()?;
    let command = pair.begin_migration(At::A, &POST)?;
    pair.wait("the job", || Ok(jobs()? > before))?;
    pair.in_pre_copy(At::A)?;
    // By then it has written all of its data, which follow; afterwards it needs few of them to go on.
    std::thread::sleep(Duration::from_secs(2));
    life.write_at(0)?;
    pair.job_when(At::A, "the hand-over", |job| {
        job["progress"]["phase"] == "post-copy"
    })?;
    // What is left takes longer than the guest does to answer.
    pair.hosts.shape(Some(TRICKLE))?;
    // Before it has loaded its devices QEMU would lose what is said to it.
    pair.wait("the guest to run there", || {
        Ok(state(pair, At::B)?.as_deref() == Some("running"))
    })?;
    life.moved(&pair.folder(At::B))?;
    Ok((command, life))
}

fn post_copy(bed: &Bed) -> Result<()> {
    let mut pair = Pair::new(bed, NEWEST, Some(SLOW))?;
    let (command, mut life) = follows(bed, &pair).map_err(|error| pair.with_logs(error))?;
    life.end("poweroff", 0)?;
    let answer = command.end()?;
    has_ended(&pair, &answer, "shut down", "hostb").map_err(|error| pair.with_logs(error))?;
    ask(&pair.a, &["vm", "show", NAME])?.refused(3, &["its guest shut down"])?;
    // It stays where it ended, and can be started there.
    let there = ask(&pair.b, &["vm", "show", NAME])?.expect(0)?;
    check(
        there.word("/state")? == "stopped" && there.word("/note")? == "its guest shut down",
        || format!("Odd: {there}"),
    )?;

    // The source hears of it only when it can reach the destination again.
    let (command, mut life) = follows(bed, &pair).map_err(|error| pair.with_logs(error))?;
    pair.a.kill();
    command.end()?.refused(5, &["transhumed", "job show"])?;
    life.end("poweroff", 0)?;
    pair.wait("the guest to be gone there", || {
        Ok(state(&pair, At::B)?.is_none())
    })?;
    pair.restart(At::A)?;
    pair.wait("the job to say so", || {
        let jobs = ask(&pair.a, &["job", "list"])?.expect(0)?;
        let last = jobs.value.as_array().and_then(|jobs| jobs.last());
        Ok(last.is_some_and(|job| job["state"] == "ended"))
    })
    .map_err(|error| pair.with_logs(error))?;
    is_gone(&pair)
        .and_then(|()| starts_again(&pair, bed))
        .map_err(|error| pair.with_logs(error))
}

fn reboots(bed: &Bed) -> Result<()> {
    let pair = Pair::new(bed, NEWEST, Some(SLOW))?;
    let shown = |error| pair.with_logs(error);
    let calm = Micro {
        parameters: "cache=48M data=64M rate=1M".into(),
        ..big(bed)?
    };
    let mut life = pair.boot(&calm)?;
    let command = pair.begin_migration(At::A, &["--mode", "pre"])?;
    pair.in_pre_copy(At::A).map_err(shown)?;
    life.end("reset", 0)?;
    command.end()?.expect(0).map_err(shown)?;
    Life::begin(&pair.folder(At::B))
        .and_then(|mut life| life.check())
        .map_err(shown)?;
    ask(&pair.b, &["vm", "stop", NAME, "--force"])?.expect(0)?;
    is_gone(&pair).map_err(shown)?;

    let (command, mut life) = follows(bed, &pair).map_err(shown)?;
    life.end("reset", 0)?;
    command.end()?.expect(0).map_err(shown)?;
    // Its serial port has one reader.
    drop(life);
    Life::begin(&pair.folder(At::B))
        .and_then(|mut life| life.check())
        .map_err(shown)?;
    pair.nothing_left(At::A).map_err(shown)
}
