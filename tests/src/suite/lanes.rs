//! Runs scenarios, and checks beside them, each in a process of its own: two at a time, of which one waits as long as there are such.

use super::checks::Check;
use crate::cleanup::still_time;
use crate::command::Run;
use crate::guest::build;
use crate::layout::Layout;
use crate::progress::say;
use crate::scenario::runner::Outcome;
use crate::scenario::{Bed, Draw, Finished, Lane, Scenario, schedule};
use crate::{Error, Result};
use std::collections::VecDeque;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// The environment's name of the lane that a process is in.
const LANE: &str = "TRANSHUME_TESTBED_LANE";

/// The lane that this process is in: what two VMs may not write to at once has this in its name.
pub(crate) fn own() -> usize {
    let lane = std::env::var(LANE).ok().and_then(|lane| lane.parse().ok());
    lane.unwrap_or(0)
}

/// A part that has ended, and what it printed.
pub(super) struct Ended {
    pub(super) name: &'static str,
    pub(super) end: Finished,
    pub(super) printed: String,
}

/// What is yet to be run.
#[derive(Default)]
struct Queues {
    computes: VecDeque<&'static str>,
    waits: VecDeque<&'static str>,
}

impl Queues {
    /// Those that compute are in the first lane, the longest first, as long as the second one has others.
    fn next(&mut self, lane: usize) -> Option<&'static str> {
        if lane == 0 {
            let computes = self.computes.pop_front();
            computes.or_else(|| self.waits.pop_front())
        } else {
            let waits = self.waits.pop_front();
            waits.or_else(|| self.computes.pop_back())
        }
    }
}

/// Runs all of them, whatever one of them does; `tell` hears of each when it ends. The longest are to be first, so that
/// both lanes end at the same time. The second lane begins with the checks.
pub(super) fn run(
    bed: &Bed,
    checks: &[Check],
    scenarios: &[Scenario],
    mut tell: impl FnMut(Ended) -> Result<()>,
) -> Result<()> {
    let mut queues = Queues {
        waits: checks.iter().map(|check| check.name).collect(),
        ..Queues::default()
    };
    let mut alone = Vec::new();
    for scenario in scenarios {
        match schedule::lane(scenario.name) {
            Lane::Computes => queues.computes.push_back(scenario.name),
            Lane::Waits => queues.waits.push_back(scenario.name),
            Lane::Alone => alone.push(scenario.name),
        }
    }
    let queues = Mutex::new(queues);
    std::thread::scope(|scope| {
        let (sender, ended) = channel();
        for lane in 0..2 {
            let (queues, sender) = (&queues, sender.clone());
            scope.spawn(move || work(bed, lane, queues, &sender));
        }
        drop(sender);
        ended.into_iter().try_for_each(&mut tell)
    })?;
    for name in alone {
        tell(one(bed, 0, name))?;
    }
    still_time()
}

fn work(bed: &Bed, lane: usize, queues: &Mutex<Queues>, sender: &Sender<Ended>) {
    loop {
        let next = queues
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .next(lane);
        let Some(name) = next else { return };
        if sender.send(one(bed, lane, name)).is_err() {
            return;
        }
    }
}

/// Runs one in a process of its own.
fn one(bed: &Bed, lane: usize, name: &'static str) -> Ended {
    say(format!("{name} begins"));
    let begun = Instant::now();
    let files = Files::new(&bed.layout, name);
    let end = files
        .as_ref()
        .map_err(|error| Error::Check(error.to_string()))
        .and_then(|files| start(bed, lane, name, files))
        .unwrap_or_else(|error| Finished::new(Err(error), begun));
    let printed = files.map_or_else(
        |_| String::new(),
        |files| String::from_utf8_lossy(&fs::read(files.printed).unwrap_or_default()).into_owned(),
    );
    Ended { name, end, printed }
}

/// What a process leaves.
struct Files {
    printed: PathBuf,
    result: PathBuf,
}

impl Files {
    fn new(layout: &Layout, name: &str) -> Result<Self> {
        let folder = layout.folder("printed")?;
        let result = folder.join(format!("{name}.json"));
        if result.exists() {
            fs::remove_file(&result).map_err(Error::file("remove", &result))?;
        }
        Ok(Self {
            printed: folder.join(format!("{name}.log")),
            result,
        })
    }
}

fn start(bed: &Bed, lane: usize, name: &str, files: &Files) -> Result<Finished> {
    let begun = Instant::now();
    let draw = bed.draw;
    let out = File::create(&files.printed).map_err(Error::file("create", &files.printed))?;
    let errors = out
        .try_clone()
        .map_err(Error::file("open", &files.printed))?;
    let mut run = Run::new(build::own_program(&bed.layout)?)
        .gently()
        .args(["scenario", name, "--result"])
        .arg(&files.result)
        .env(Draw::SEED, draw.seed.to_string())
        .env(build::RUN, build::run_name())
        .env(LANE, lane.to_string());
    if draw.all {
        run = run.arg("--all");
    }
    run.command()
        .stdout(Stdio::from(out))
        .stderr(Stdio::from(errors));
    let mut process = run.spawn()?;
    let status = process.wait()?;
    read(&files.result)?.map_or_else(
        || {
            let what = format!("The test bed's process ended without a result ({status})");
            Ok(Finished::new(Err(Error::Check(what)), begun))
        },
        Ok,
    )
}

fn read(result: &Path) -> Result<Option<Finished>> {
    if !result.exists() {
        return Ok(None);
    }
    let text = fs::read(result).map_err(Error::file("read", result))?;
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|error| Error::Check(format!("{}: {error}", result.display())))
}

/// What such a process leaves for the one that started it.
pub(super) fn leave(end: &Finished, result: &Path) -> Result<Outcome> {
    let text = serde_json::to_vec(end)
        .map_err(|error| Error::Check(format!("{}: {error}", result.display())))?;
    crate::layout::write_whole(result, &text)?;
    Ok(end.outcome)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_lane_has_its_own_first_and_then_helps_the_other() {
        let queues = || Queues {
            computes: ["a", "b", "c"].into(),
            waits: ["x", "y", "z"].into(),
        };
        let all = |mut queues: Queues, lane| {
            let names: Vec<_> = std::iter::from_fn(|| queues.next(lane)).collect();
            assert_eq!(queues.next(1 - lane), None);
            names
        };
        assert_eq!(all(queues(), 0), ["a", "b", "c", "x", "y", "z"]);
        // The shortest of those that compute.
        assert_eq!(all(queues(), 1), ["x", "y", "z", "c", "b", "a"]);
    }
}
