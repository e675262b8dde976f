//! Post-copy: the guest runs at its destination while part of its memory is still at the source.

use super::micro::{Micro, NAME, Qemus};
use super::pair::{At, NEWEST, Pair};
use super::transhume::{Answer, ask};
use super::{Bed, Scenario};
use crate::bench::{Profile, Setup};
use crate::error::check;
use crate::hosts::daemon::Daemon;
use crate::hosts::{HOST_B, Hosts};
use crate::packages::Qemu;
use crate::qemu::serial::{Console, Side};
use crate::{Error, Result};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(240);
const POST: [&str; 2] = ["--mode", "post"];
/// Bounds an answer of the Linux guest.
const ANSWER: Duration = Duration::from_secs(60);
/// In Mbit/s; what is left at the switch takes a while there.
const SLOW: u32 = 60;

pub(super) fn scenarios() -> Vec<Scenario> {
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
            name: "post-copy-source-daemon-dies",
            about: "a daemon that dies after the hand-over: the guest runs nowhere twice, and the job says so",
            limit: LIMIT,
            run: |bed| daemon_dies(bed, At::A),
        },
        Scenario {
            name: "post-copy-destination-daemon-dies",
            about: "the same at the destination",
            limit: LIMIT,
            run: |bed| daemon_dies(bed, At::B),
        },
        Scenario {
            name: "post-copy-linux",
            about: "a Linux guest at work moves by post-copy, and its data is right",
            limit: LIMIT,
            run: linux,
        },
        Scenario {
            name: "post-copy-cancel",
            about: "a migration by post-copy can be cancelled before the guest is handed over, and not after",
            limit: LIMIT,
            run: cancel,
        },
    ]
}

/// A guest that writes more during one scan of its memory than a pause could carry.
fn writes(bed: &Bed) -> Result<Micro> {
    Ok(Micro {
        memory: 192,
        parameters: "cache=48M data=64M rate=60M".into(),
        ..Micro::new(bed)?
    })
}

/// Pages came after the guest ran.
fn followed(answer: &Answer) -> Result<()> {
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

/// What is at either host cannot be joined again yet: both QEMUs are kept, and neither runs on as if it were
/// whole.
fn daemon_dies(bed: &Bed, at: At) -> Result<()> {
    let mut pair = Pair::new(bed, NEWEST, Some(SLOW))?;
    let life = pair.boot(&writes(bed)?)?;
    let command = pair.begin_migration(At::A, &[POST[0], POST[1], "--link-patience", "3"])?;
    let job = job_in(&pair, At::A, "post-copy").map_err(|error| pair.with_logs(error))?;
    pair.wait("the guest to run there and to ask for a page", || {
        let job = ask(&pair.a, &["job", "show", &job])?.expect(0)?;
        Ok(job.number("/progress/requested-pages")? > 0)
    })?;
    match at {
        At::A => pair.a.kill(),
        At::B => pair.b.kill(),
    }
    let words: &[&str] = match at {
        At::A => &["transhumed", "job show"],
        At::B => &["post-copy was cut off", "stands still"],
    };
    let ended = command.end()?.refused(5, words);
    ended.map_err(|error| pair.with_logs(error))?;
    pair.restart(at)?;
    pair.wait("the job to say what became of it", || {
        let job = ask(&pair.a, &["job", "show", &job])?.expect(0)?;
        Ok(job.word("/state")? == "unresolved" && job.message().contains("post-copy was cut off"))
    })?;
    for at in [At::A, At::B] {
        check(pair.qemus(at).len() == 1, || {
            format!("{} has not kept its QEMU", at.name())
        })?;
    }
    let resumed = ask(&pair.a, &["vm", "resume", NAME])?;
    check(resumed.code != 0, || {
        format!("The guest was let run where it left: {resumed}")
    })?;
    for at in [At::A, At::B] {
        ask(pair.daemon(at), &["vm", "stop", NAME, "--force"])?.expect(0)?;
    }
    drop(life);
    Ok(())
}

fn linux(bed: &Bed) -> Result<()> {
    let (layout, packages) = (&bed.layout, &bed.packages);
    let setup = Setup::prepare(layout, packages, Profile::QUICK, Qemu::V10_0, true)?;
    let machine = &setup.machine;
    let hosts = Hosts::new(Some(300))?;
    let programs = bed.programs()?;
    let a = Daemon::start(&hosts, &hosts.a, programs, &setup.qemu)?;
    let b = Daemon::start(&hosts, &hosts.b, programs, &setup.qemu)?;
    let path = hosts.a.folder.join("definition.toml");
    std::fs::write(&path, machine.definition()).map_err(Error::file("write", &path))?;
    ask(&a, &["vm", "start", &path.display().to_string()])?.expect(0)?;
    let console = Console::new(&machine.name);
    let serial = a.vm_folder(&machine.name).join("serial.sock");
    console.attach(Side::Source, &serial, || a.alive())?;
    console.wait_for("ready", 0, crate::qemu::BOOT, || a.alive())?;
    let serial = b.vm_folder(&machine.name).join("serial.sock");
    let arguments = [&["migrate", &machine.name, "--to", HOST_B], &POST[..]].concat();
    let answer = std::thread::scope(|scope| {
        // The socket is there once the destination's QEMU is.
        scope.spawn(|| console.attach(Side::Destination, &serial, || b.alive()));
        ask(&a, &arguments)
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
    ask(&b, &["vm", "stop", &machine.name, "--force"])?
        .expect(0)
        .map(drop)
}
