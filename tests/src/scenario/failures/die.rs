//! What is killed before the hand-over: the guest runs on at the source, exactly once, the command says
//! what happened and what to do, nothing is left behind, and a second migration succeeds.

use crate::error::check;
use crate::scenario::fixture::micro::{Life, Micro, NAME};
use crate::scenario::fixture::pair::{At, NEWEST, Pair};
use crate::scenario::fixture::transhume::{Running, ask};
use crate::scenario::{Bed, Scenario};
use crate::{Error, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::time::{Duration, SystemTime};

const LIMIT: Duration = Duration::from_secs(150);
/// So slow that copying takes long enough to be cut off, in Mbit/s.
const SLOW: u32 = 100;

pub(crate) fn scenarios() -> Vec<Scenario> {
    macro_rules! deaths {
        ($($name:literal, $about:literal, $run:expr;)*) => {
            vec![$(Scenario { name: $name, about: $about, limit: LIMIT, run: $run }),*]
        };
    }
    deaths! {
        "die-source-daemon", "SIGKILL of the source's transhumed", source_daemon;
        "die-source-daemon-ends", "SIGTERM of the source's transhumed", source_daemon_ends;
        "die-destination-daemon", "SIGKILL of the destination's transhumed", destination_daemon;
        "die-destination-qemu", "SIGKILL of the destination's QEMU", destination_qemu;
        "die-source-qemu", "SIGKILL of the source's QEMU: the guest is gone, and no copy runs", source_qemu;
        "die-link", "the cable is pulled, for longer than the link may be away", link;
        "die-link-three-times", "the link breaks three times for two seconds: the migration goes on", link_breaks;
        "die-cancel", "transhume job cancel", cancel;
        "die-ctrl-c", "the command goes, the job goes on", ctrl_c;
    }
}

/// A guest that is being moved over a slow link, its memory half-way there.
struct Scene<'a> {
    pair: Pair<'a>,
    life: Life,
    command: Running,
    job: String,
}

impl<'a> Scene<'a> {
    fn begin(bed: &'a Bed) -> Result<Self> {
        Self::begin_with(bed, &[])
    }

    fn begin_with(bed: &'a Bed, options: &[&str]) -> Result<Self> {
        let micro = Micro {
            memory: 192,
            parameters: "cache=48M data=96M zero=8M rate=1M".into(),
            ..Micro::new(bed)?
        };
        let pair = Pair::new(bed, NEWEST, Some(SLOW))?;
        let life = pair.boot(&micro)?;
        let command = pair.begin_migration(At::A, options)?;
        let job = pair
            .in_pre_copy(At::A)
            .map_err(|error| pair.with_logs(error))?;
        Ok(Self {
            pair,
            life,
            command,
            job,
        })
    }

    /// How the command ends, and that the guest is well where it was.
    fn fails(self, code: i32, words: &[&str]) -> Result<(Pair<'a>, Life)> {
        let Self {
            pair,
            mut life,
            command,
            ..
        } = self;
        let shown = |error| pair.with_logs(error);
        command
            .end()
            .and_then(|answer| answer.refused(code, words))
            .map_err(shown)?;
        life.goes_on().map_err(shown)?;
        Ok((pair, life))
    }
}

/// The guest is at the source alone; then it moves after all.
fn second_try(pair: &Pair<'_>, mut life: Life) -> Result<()> {
    pair.stayed(At::A, &mut life)?;
    pair.hosts.shape(Some(1000))?;
    pair.moves(At::A, &mut life).map(drop)
}

pub(crate) fn sigkill(process: i32) -> Result<()> {
    kill(Pid::from_raw(process), Signal::SIGKILL).map_err(Error::system("kill a process"))
}

fn only(qemus: &[i32]) -> Result<i32> {
    match qemus {
        [one] => Ok(*one),
        other => Err(Error::Check(format!("Not one QEMU, but {other:?}"))),
    }
}

fn source_daemon(bed: &Bed) -> Result<()> {
    let mut scene = Scene::begin(bed)?;
    scene.pair.a.kill();
    let job = scene.job.clone();
    // The command cannot know more than that.
    let (mut pair, mut life) = scene.fails(5, &["transhumed", "job show", &job])?;
    pair.restart(At::A)?;
    life.goes_on()?;
    pair.wait("the restarted daemon to know how it ended", || {
        let job = ask(&pair.a, &["job", "show", &job])?.expect(0)?;
        Ok(job.word("/state")? == "failed" && job.message().contains("runs on"))
    })?;
    second_try(&pair, life)
}

fn source_daemon_ends(bed: &Bed) -> Result<()> {
    let scene = Scene::begin(bed)?;
    scene.pair.a.signal(Signal::SIGTERM)?;
    let (mut pair, life) = scene.fails(4, &["cancelled", "runs on at hosta"])?;
    pair.a.wait()?;
    pair.restart(At::A)?;
    second_try(&pair, life)
}

fn destination_daemon(bed: &Bed) -> Result<()> {
    let mut scene = Scene::begin(bed)?;
    scene.pair.b.kill();
    let (mut pair, life) = scene.fails(
        4,
        &["transhumed running there", "runs on at hosta", "again"],
    )?;
    pair.restart(At::B)?;
    second_try(&pair, life)
}

fn destination_qemu(bed: &Bed) -> Result<()> {
    let scene = Scene::begin(bed)?;
    sigkill(only(&scene.pair.qemus(At::B))?)?;
    let (pair, life) = scene.fails(4, &["QEMU on hostb ended", "runs on at hosta", "again"])?;
    second_try(&pair, life)
}

fn source_qemu(bed: &Bed) -> Result<()> {
    let Scene { pair, command, .. } = Scene::begin(bed)?;
    sigkill(only(&pair.qemus(At::A))?)?;
    let ended = command
        .end()?
        .refused(7, &["has ended", "did not shut down", "killed"]);
    ended.map_err(|error| pair.with_logs(error))?;
    pair.wait("no host to list the guest", || {
        let mut empty = true;
        for daemon in [&pair.a, &pair.b] {
            let list = ask(daemon, &["vm", "list"])?.expect(0)?;
            empty &= list.value.as_array().is_some_and(Vec::is_empty);
        }
        Ok(empty)
    })?;
    check(pair.qemus(At::A).is_empty(), || {
        "A QEMU runs at the source".into()
    })?;
    pair.nothing_left(At::B)?;
    let shown = ask(&pair.a, &["vm", "show", NAME])?.expect(0)?;
    check(
        shown.word("/state")? == "stopped" && shown.word("/note")?.contains("ended"),
        || format!("It is not said that it ended: {shown}"),
    )?;
    // It starts again as after a power cut, and is the same VM as before.
    pair.hosts.shape(Some(1000))?;
    let mut life = pair.boot(&Micro::new(bed)?)?;
    pair.moves(At::A, &mut life).map(drop)
}

fn link(bed: &Bed) -> Result<()> {
    let scene = Scene::begin_with(bed, &["--link-timeout", "3"])?;
    scene.pair.hosts.break_link()?;
    let (pair, life) = scene.fails(4, &["away for 3 seconds", "runs on at hosta", "again"])?;
    pair.nothing_left(At::B)
        .map_err(|error| pair.with_logs(error))?;
    pair.hosts.set_link(true)?;
    second_try(&pair, life)
}

fn link_breaks(bed: &Bed) -> Result<()> {
    let micro = Micro {
        memory: 192,
        parameters: "cache=48M data=96M zero=8M rate=0M".into(),
        ..Micro::new(bed)?
    };
    let pair = Pair::new(bed, NEWEST, Some(SLOW))?;
    let mut life = pair.boot(&micro)?;
    // By the link's own counters: what a broken connection still held was never sent.
    let wire = pair.hosts.a.wire()?;
    let begun = SystemTime::now();
    pair.moves(At::A, &mut life)?;
    let unbroken = wire.bytes_between(begun, SystemTime::now());
    let begun = SystemTime::now();
    let command = pair.begin_migration(At::B, &[])?;
    let shown = |error| pair.with_logs(error);
    pair.in_pre_copy(At::B).map_err(shown)?;
    for _ in 0..3 {
        std::thread::sleep(Duration::from_secs(1));
        check(!command.ended(), || "It ended early".into())?;
        pair.hosts.break_link()?;
        std::thread::sleep(Duration::from_secs(2));
        pair.hosts.set_link(true)?;
    }
    let answer = command.end()?.expect(0).map_err(shown)?;
    pair.arrived(At::A, &mut life).map_err(shown)?;
    let broken = wire.bytes_between(begun, SystemTime::now());
    println!("  {unbroken} bytes without breaks, {broken} with them");
    check(broken <= unbroken + unbroken / 10, || {
        format!("{broken} bytes instead of {unbroken}")
    })?;
    let remarks = answer.value["summary"]["remarks"].to_string();
    check(remarks.contains("taken up again"), || {
        format!("No word on the breaks: {answer}")
    })
}

fn cancel(bed: &Bed) -> Result<()> {
    let scene = Scene::begin(bed)?;
    let answer = ask(&scene.pair.a, &["job", "cancel", &scene.job])?.expect(0)?;
    check(answer.word("/state")? == "cancelled", || {
        format!("Not cancelled: {answer}")
    })?;
    let again = ask(&scene.pair.a, &["job", "cancel", &scene.job])?;
    again.refused(3, &["ended already"])?;
    let (pair, life) = scene.fails(4, &["cancelled", "runs on at hosta"])?;
    second_try(&pair, life)
}

fn ctrl_c(bed: &Bed) -> Result<()> {
    let Scene {
        pair,
        mut life,
        command,
        job,
    } = Scene::begin(bed)?;
    check(!command.ended(), || "The command ended by itself".into())?;
    command.interrupt()?;
    let answer = command.end()?.expect(130)?;
    check(answer.said.contains(&format!("job {job}")), || {
        format!("It does not name its job: {answer}")
    })?;
    // Others may follow it.
    pair.hosts.shape(Some(1000))?;
    pair.wait("the job to complete", || {
        let answer = ask(&pair.a, &["job", "show", &job])?.expect(0)?;
        let state = answer.word("/state")?;
        check(matches!(state, "running" | "completed"), || {
            format!("It did not complete: {answer}")
        })?;
        Ok(state == "completed")
    })?;
    pair.arrived(At::B, &mut life)
        .map_err(|error| pair.with_logs(error))
}
