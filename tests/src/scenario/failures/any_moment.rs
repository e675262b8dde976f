//! Whatever fails at whatever moment of a migration: afterwards the guest runs exactly once, with its
//! memory right, when the operator did what the command said.

use super::die::sigkill;
use crate::cleanup::still_time;
use crate::error::check;
use crate::hosts::Host;
use crate::packages::Qemu;
use crate::scenario::fixture::micro::{Micro, NAME, Qemus};
use crate::scenario::fixture::pair::{At, NEWEST, Pair};
use crate::scenario::fixture::transhume::{Answer, ask};
use crate::scenario::{Bed, Scenario};
use crate::{Error, Result};
use serde_json::Value;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(300);
/// How long a moment is waited for that may not come.
const LONGEST: Duration = Duration::from_secs(10);
/// How long two hosts that reach each other may take to settle what was in doubt.
const SETTLED: Duration = Duration::from_secs(30);
/// Neither can hold the switch-over back: it is longer, and easier to hit.
pub(crate) const OLD: Qemus = (Qemu::V7_2, Qemu::V7_2);

pub(crate) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario {
            name: "die-any-moment-source-daemon",
            about: "SIGKILL of the source's transhumed in each phase",
            limit: LIMIT,
            run: |bed| each(bed, Victim::SourceDaemon, &MOMENTS),
        },
        Scenario {
            name: "die-any-moment-destination-daemon",
            about: "SIGKILL of the destination's transhumed in each phase",
            limit: LIMIT,
            run: |bed| each(bed, Victim::DestinationDaemon, &MOMENTS),
        },
        Scenario {
            name: "die-any-moment-destination-qemu",
            about: "SIGKILL of the destination's QEMU in the phases in which there is one",
            limit: LIMIT,
            run: |bed| {
                each(
                    bed,
                    Victim::DestinationQemu,
                    &[
                        Moment::Phase("pre-copy"),
                        Moment::Phase("switchover"),
                        Moment::Phase("commit"),
                    ],
                )
            },
        },
        Scenario {
            name: "die-any-moment-link",
            about: "the cable is pulled in the phases at the end",
            limit: LIMIT,
            run: |bed| {
                each(
                    bed,
                    Victim::Link,
                    &[Moment::Phase("switchover"), Moment::Phase("commit")],
                )
            },
        },
        Scenario {
            name: "die-in-doubt",
            about: "the cable is pulled at the hand-over and stays out: settled by an operator, or when it is back",
            limit: LIMIT,
            run: in_doubt,
        },
    ]
}

/// When it fails.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Moment {
    /// So many milliseconds after the command.
    After(u64),
    /// When the job is first seen in that phase, or has left it.
    Phase(&'static str),
}

const MOMENTS: [Moment; 7] = [
    Moment::After(0),
    Moment::Phase("prepare"),
    Moment::Phase("pre-copy"),
    Moment::After(400),
    Moment::After(700),
    Moment::Phase("switchover"),
    Moment::Phase("commit"),
];

#[derive(Debug, Clone, Copy)]
enum Victim {
    SourceDaemon,
    DestinationDaemon,
    DestinationQemu,
    Link,
}

fn each(bed: &Bed, victim: Victim, moments: &[Moment]) -> Result<()> {
    // By the moment first, so that half of them have each QEMU's.
    let all = moments.iter().enumerate().flat_map(|(n, moment)| {
        let qemus = if n % 2 == 0 {
            [OLD, NEWEST]
        } else {
            [NEWEST, OLD]
        };
        qemus.map(|qemus| (qemus, moment))
    });
    for (qemus, moment) in bed.draw.half(all) {
        let mut pair = Pair::new(bed, qemus, Some(1000))?;
        let outcome = one(&mut pair, victim, *moment).map_err(|error| {
            pair.with_logs(Error::Check(format!("{victim:?} at {moment:?}: {error}")))
        })?;
        println!("  {victim:?} at {moment:?}: {outcome}");
    }
    Ok(())
}

/// Asks the source's daemon for its job's phase: on its socket, since that takes no time.
pub(crate) struct Watch {
    stream: BufReader<UnixStream>,
    /// The last job's number when this was opened.
    before: u64,
}

impl Watch {
    pub(crate) fn open(host: &Host) -> Result<Self> {
        let socket = host.folder.join("run/control.sock");
        let stream = UnixStream::connect(&socket).map_err(Error::file("connect to", &socket))?;
        let mut watch = Self {
            stream: BufReader::new(stream),
            before: 0,
        };
        watch.before = watch.job()?["id"].as_u64().unwrap_or(0);
        Ok(watch)
    }

    fn job(&mut self) -> Result<Value> {
        let failed = |error| Error::Check(format!("The control socket: {error}"));
        let request = b"{\"command\":\"job-list\"}\n";
        self.stream.get_mut().write_all(request).map_err(failed)?;
        let mut line = String::new();
        self.stream.read_line(&mut line).map_err(failed)?;
        let jobs: Value = serde_json::from_str(&line).unwrap_or_default();
        Ok(jobs["jobs"]
            .as_array()
            .and_then(|jobs| jobs.last())
            .cloned()
            .unwrap_or_default())
    }

    /// Waits for a moment of the job that begins next, and says in which phase it is then.
    pub(crate) fn wait(&mut self, moment: Moment) -> Result<String> {
        self.wait_within(moment, LONGEST)
    }

    /// The same with a limit of the caller's.
    pub(crate) fn wait_within(&mut self, moment: Moment, longest: Duration) -> Result<String> {
        const PHASES: [&str; 6] = [
            "negotiate",
            "prepare",
            "pre-copy",
            "switchover",
            "commit",
            "post-copy",
        ];
        let start = Instant::now();
        loop {
            let mut job = self.job()?;
            if job["id"].as_u64() <= Some(self.before) {
                job = Value::Null;
            }
            let phase = job["progress"]["phase"].as_str().unwrap_or("none");
            let now = PHASES.iter().position(|one| *one == phase);
            let come = match moment {
                Moment::After(ms) => start.elapsed() >= Duration::from_millis(ms),
                Moment::Phase(name) => now >= PHASES.iter().position(|one| *one == name),
            };
            let over = job.is_object() && job["state"] != "running";
            if come || over || start.elapsed() > longest {
                return Ok(phase.to_owned());
            }
            still_time()?;
            std::thread::sleep(Duration::from_micros(500));
        }
    }
}

fn one(pair: &mut Pair<'_>, victim: Victim, moment: Moment) -> Result<String> {
    let micro = Micro {
        machine: "pc".into(),
        parameters: "cache=48M data=24M zero=16M rate=16M".into(),
        ..Micro::new(pair.bed)?
    };
    let mut life = pair.boot(&micro)?;
    let mut watch = Watch::open(pair.host(At::A))?;
    let command = pair.begin_migration(At::A, &[])?;
    let phase = watch.wait(moment)?;
    match victim {
        Victim::SourceDaemon => pair.a.kill(),
        Victim::DestinationDaemon => pair.b.kill(),
        Victim::DestinationQemu => {
            for process in pair.qemus(At::B) {
                sigkill(process)?;
            }
        }
        Victim::Link => pair.hosts.set_link(false)?,
    }
    let answer = command.end()?;
    match victim {
        Victim::SourceDaemon => pair.restart(At::A)?,
        Victim::DestinationDaemon => pair.restart(At::B)?,
        Victim::DestinationQemu => {}
        Victim::Link => pair.hosts.set_link(true)?,
    }
    if matches!(victim, Victim::DestinationQemu) && answer.code == 0 {
        // It was the guest's own QEMU by then.
        check(phase != "pre-copy", || format!("Odd: {answer}"))?;
        pair.wait("both hosts to have no such guest", || {
            let gone = state(pair, At::A)?.is_none() && state(pair, At::B)?.is_none();
            Ok(gone && pair.qemus(At::A).is_empty() && pair.qemus(At::B).is_empty())
        })?;
        return Ok(format!(
            "in phase {phase}: it belonged to hostb, and is gone"
        ));
    }
    let at = settle(pair, At::A, &answer)?;
    let runs = match at {
        At::A => pair.stayed(At::A, &mut life),
        At::B => pair.arrived(At::B, &mut life),
    };
    runs.map_err(|error| Error::Check(format!("{error}\nafter {answer}")))?;
    // And it can be moved from where it is.
    pair.migrate(at, &[])?.expect(0)?;
    pair.arrived(at.other(), &mut life)?;
    Ok(format!(
        "in phase {phase}; exit code {}, it ran on at {}",
        answer.code,
        at.name()
    ))
}

/// Waits until the daemons have settled what happened, and returns where the guest runs.
pub(crate) fn settle(pair: &Pair<'_>, from: At, answer: &Answer) -> Result<At> {
    let code = answer.code;
    check(matches!(code, 0 | 1 | 3 | 4 | 5), || {
        format!("Odd: {answer}")
    })?;
    match code {
        0 => return Ok(from.other()),
        3 | 4 => return Ok(from),
        // The daemon was gone before it took the job.
        1 => {
            check(answer.message().contains("transhumed at"), || {
                format!("Odd: {answer}")
            })?;
        }
        _ => {}
    }
    // What is in doubt is settled by the daemons as soon as they reach each other.
    let start = Instant::now();
    loop {
        let (here, there) = (state(pair, At::A)?, state(pair, At::B)?);
        match (here.as_deref(), there.as_deref()) {
            (Some("running"), None) => return Ok(At::A),
            (None, Some("running")) => return Ok(At::B),
            (Some("running"), Some("running")) => {
                return Err(Error::Check("Both hosts run the guest".into()));
            }
            (None, None) if start.elapsed() > Duration::from_secs(5) => {
                return Err(Error::Check(format!(
                    "Neither host has the guest after {answer}"
                )));
            }
            _ if start.elapsed() > SETTLED => {
                return Err(Error::Check(format!(
                    "Not settled: {here:?} at hosta and {there:?} at hostb after {answer}"
                )));
            }
            _ => {}
        }
        still_time()?;
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// The link goes at the hand-over and stays away: the source does not guess, touches nothing, and does what
/// an operator says who has looked at the other host.
fn in_doubt(bed: &Bed) -> Result<()> {
    for at_once in [true, false] {
        let mut pair = Pair::new(bed, OLD, Some(1000))?;
        doubt(&mut pair, at_once).map_err(|error| pair.with_logs(error))?;
    }
    Ok(())
}

fn doubt(pair: &mut Pair<'_>, by_operator: bool) -> Result<()> {
    let micro = Micro {
        machine: "pc".into(),
        ..Micro::new(pair.bed)?
    };
    let mut life = pair.boot(&micro)?;
    let mut watch = Watch::open(pair.host(At::A))?;
    let command = pair.begin_migration(At::A, &["--link-timeout", "5"])?;
    watch.wait(Moment::Phase("commit"))?;
    pair.hosts.set_link(false)?;
    let answer = command.end()?;
    if answer.code != 5 {
        // The answer had come already.
        println!("  too late: {answer}");
        pair.hosts.set_link(true)?;
        return settle(pair, At::A, &answer).map(drop);
    }
    let answer = answer.refused(
        5,
        &[
            "not known whether hostb took",
            "job resolve 1 --runs-at hostb",
        ],
    )?;
    println!("  {}", answer.message());
    for refused in [
        &["vm", "resume", NAME][..],
        &["vm", "stop", NAME, "--force"],
        &["migrate", NAME, "--to", "hostb"],
    ] {
        ask(&pair.a, refused)?.refused(3, &["not known which host has"])?;
    }
    // So it is after a restart.
    pair.a.kill();
    pair.restart(At::A)?;
    ask(&pair.a, &["vm", "resume", NAME])?.refused(3, &["not known which host has"])?;
    ask(&pair.a, &["job", "resolve", "1", "--runs-at", "hostc"])?
        .refused(3, &["hosta to hostb"])?;
    let at = match state(pair, At::B)?.as_deref() {
        Some("running") => At::B,
        _ => At::A,
    };
    if by_operator {
        let answer = ask(&pair.a, &["job", "resolve", "1", "--runs-at", at.name()])?.expect(0)?;
        check(answer.message().contains("an operator said so"), || {
            format!("Odd: {answer}")
        })?;
        ask(&pair.a, &["job", "resolve", "1", "--runs-at", at.name()])?
            .refused(3, &["not in doubt"])?;
    }
    pair.hosts.set_link(true)?;
    let settled = settle(pair, At::A, &answer)?;
    check(settled == at, || format!("It runs at {}", settled.name()))?;
    match at {
        At::A => pair.stayed(At::A, &mut life),
        At::B => pair.arrived(At::B, &mut life),
    }
}

/// Whether a job has cost its guest: a part of its memory is at neither host.
pub(crate) fn is_lost(job: &Value) -> bool {
    let error = job["error"].as_str().unwrap_or_default();
    job["state"] == "lost"
        || error.contains("cannot take it back")
        || error.contains("The VM does not run at")
}

/// What a host says of the guest; `None` if it does not have it.
pub(crate) fn state(pair: &Pair<'_>, at: At) -> Result<Option<String>> {
    let answer = ask(pair.daemon(at), &["vm", "show", NAME])?;
    match answer.code {
        // A VM whose QEMU ended stays defined.
        0 => {
            let state = answer.word("/state")?;
            Ok((state != "stopped").then(|| state.to_owned()))
        }
        3 => Ok(None),
        _ => Err(Error::Check(format!("Odd: {answer}"))),
    }
}
