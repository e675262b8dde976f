//! The guest's clock goes on as if the guest had not stood still while it moved.

use super::linux;
use crate::error::check;
use crate::hosts::Hosts;
use crate::hosts::daemon::Daemon;
use crate::packages::Kernel;
use crate::qemu::serial::Console;
use crate::scenario::failures::any_moment::{Moment, Watch};
use crate::scenario::fixture::fake_host::{FakeHost, Said};
use crate::scenario::fixture::transhume::begin;
use crate::scenario::post_copy::stress::Scene;
use crate::scenario::{Bed, Scenario};
use crate::{Error, Result};
use std::time::{Duration, Instant};
use transhume_protocol::agent::HostMessage;

const LIMIT: Duration = Duration::from_secs(400);
/// Half of them by post-copy; and with `--all`.
const MIGRATIONS: [u64; 2] = [4, 10];
/// In Mbit/s: slow enough that the guest goes over.
const RATE: u32 = 60;
/// How long the host may take to have the clock set.
const PATIENCE: Duration = Duration::from_secs(60);
const QUESTIONS: u64 = 40;
/// What the hosts' words about the clock have in common.
const CLOCK: &str = "the guest's clock stood still";
/// How long no daemon is there that could let the guest go on.
const DEAD: Duration = Duration::from_secs(1);

pub(crate) fn scenarios() -> Vec<Scenario> {
    vec![Scenario {
        name: "guest-clock",
        about: "a guest's clock that stood still in some moves is right afterwards, and one that a daemon keeps is left",
        limit: LIMIT,
        run,
    }]
}

/// How far the guest's clock is ahead of a clock of this machine's that nobody sets.
struct Lead {
    ahead_ms: f64,
    /// How far off that may be.
    within_ms: f64,
}

/// Asks the agent some times: the fastest answer tells most.
fn lead(scene: &Scene<'_>, since: Instant) -> Result<Lead> {
    let mut host = FakeHost::connect(&scene.agent_socket())?;
    host.hello(1)?;
    let mut best = Lead {
        ahead_ms: 0.0,
        within_ms: f64::INFINITY,
    };
    for number in 0..QUESTIONS {
        let asked = since.elapsed();
        host.say(&HostMessage::ClockWanted { number })?;
        let is_answer = |said: &Said| matches!(said, Said::Clock(of, _) if *of == number);
        let said = host.wait_for("its clock", is_answer)?;
        let Said::Clock(_, real_ns) = said else {
            return Err(Error::Check(format!("Not a clock: {said:?}")));
        };
        let within = since.elapsed().saturating_sub(asked) / 2;
        let ahead = Duration::from_nanos(real_ns).saturating_sub(asked + within);
        if ms(within) < best.within_ms {
            best = Lead {
                ahead_ms: ms(ahead),
                within_ms: ms(within),
            };
        }
    }
    Ok(best)
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// Waits until a host says what became of the clock, for one time more than before: its words, and how far off the clock
/// may be.
fn word(daemon: &Daemon, before: usize) -> Result<(String, f64)> {
    let begun = Instant::now();
    let line = loop {
        let mut lines = daemon.lines_with(CLOCK);
        if lines.len() > before
            && let Some(line) = lines.pop()
        {
            break line;
        }
        check(begun.elapsed() < PATIENCE, || {
            format!("Nobody says what became of its clock:\n{}", daemon.words())
        })?;
        crate::cleanup::still_time()?;
        std::thread::sleep(Duration::from_millis(50));
    };
    println!("  {line}");
    let within = line.split("within_ms=").nth(1);
    let within = within.and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok());
    let within = within.ok_or_else(|| Error::Check(format!("No bound: {line}")))?;
    Ok((line, within))
}

/// What moves cost, by what the hosts say.
#[derive(Debug, Default)]
struct Lost {
    paused_ms: f64,
    /// How far off its clock may be.
    within_ms: f64,
    became: Vec<String>,
}

impl Lost {
    /// Moves once, and waits until it is said what became of the clock.
    fn add(&mut self, scene: &mut Scene<'_>, number: u64) -> Result<()> {
        let known = scene.there().count_words(CLOCK);
        let answer = if number.is_multiple_of(2) {
            scene.tell("dirty 1")?;
            scene.moves_by(&["--mode", "pre"])?
        } else {
            scene.tell("dirty 20")?;
            scene.moves()?
        };
        let downtime = answer.value["summary"]["downtime"]["total-ms"].as_f64();
        self.paused_ms += downtime.ok_or_else(|| Error::Check(format!("No downtime: {answer}")))?;
        let (line, within_ms) = word(scene.here(), known)?;
        self.within_ms += within_ms;
        self.became.push(line);
        Ok(())
    }
}

/// The source's daemon dies while the guest stands still: whichever host goes on with the guest sets its clock right.
fn daemon_dies(bed: &Bed, hosts: &Hosts, scene: &mut Scene<'_>, since: Instant) -> Result<()> {
    let before = lead(scene, since)?;
    let known = [scene.here(), scene.there()].map(|daemon| daemon.count_words(CLOCK));
    let at_first = scene.here().id();
    scene.tell("dirty 1")?;
    let mut watch = Watch::open(scene.host(hosts))?;
    let command = begin(scene.here(), &scene.migration(&["--mode", "pre"]))?;
    let phase = watch.wait_within(Moment::Phase("switchover"), PATIENCE)?;
    scene.kill_here();
    command.end()?;
    std::thread::sleep(DEAD);
    scene.restart_here(bed, hosts)?;
    let restarted = scene.here().id();
    scene.find()?;
    let stayed = scene.here().id() == restarted;
    let (_, within_ms) = word(scene.here(), known[usize::from(!stayed)])?;
    let after = lead(scene, since)?;
    let off = after.ahead_ms - before.ahead_ms;
    let within = before.within_ms + after.within_ms + within_ms;
    let where_to = if stayed { "stayed" } else { "moved" };
    println!(
        "  when a daemon died in phase {phase}, it {where_to}, and its clock is off by {off:.2} ms, where {within:.2} could be"
    );
    check(off.abs() <= within && at_first != restarted, || {
        format!(
            "Its clock is off by {off} ms, where {within} ms could be, since a daemon died in phase {phase}"
        )
    })
}

fn run(bed: &Bed) -> Result<()> {
    let mut machine = linux::machine(bed, Kernel::V6_1)?;
    machine.disks.truncate(1);
    machine.settings = vec![("cache-mib", "10".into()), ("memory-mib", "48".into())];
    let hosts = Hosts::new(Some(RATE))?;
    let console = Console::new(&machine.name);
    let mut scene = Scene::start(bed, &hosts, &machine, &console)?;
    let since = Instant::now();
    let before = lead(&scene, since)?;
    let mut lost = Lost::default();
    let migrations = bed.draw.count(MIGRATIONS[0], MIGRATIONS[1]);
    for number in 0..migrations {
        lost.add(&mut scene, number)?;
    }
    let after = lead(&scene, since)?;
    let off = after.ahead_ms - before.ahead_ms;
    let within = before.within_ms + after.within_ms + lost.within_ms;
    println!(
        "  after {migrations} moves its clock is off by {off:.2} ms, where {within:.2} ms could be; it was paused for \
         {:.0} ms in all",
        lost.paused_ms
    );
    check(off.abs() <= within && lost.paused_ms > within, || {
        format!("Its clock is off by {off} ms, where {within} ms could be: {lost:?}")
    })?;

    daemon_dies(bed, &hosts, &mut scene, since)?;

    // One that a time daemon keeps is left to it.
    scene.run("/bin/guest-workload keep-clock")?;
    let before = lead(&scene, since)?;
    let mut left = Lost::default();
    left.add(&mut scene, 0)?;
    let after = lead(&scene, since)?;
    let off = before.ahead_ms - after.ahead_ms;
    let least = left.paused_ms / 2.0 - before.within_ms - after.within_ms;
    println!(
        "  kept by a daemon it lost {off:.2} ms, of {:.0} ms",
        left.paused_ms
    );
    let is_left = left
        .became
        .iter()
        .all(|line| line.contains("a time daemon keeps it"));
    check(is_left && off > least, || {
        format!("A clock that a daemon keeps was set: it lost {off} ms: {left:?}")
    })?;
    scene.is_well()?;
    scene.stop()
}
