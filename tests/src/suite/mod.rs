//! `cargo testbed test`: everything that is checked before a change lands.

mod checks;
#[cfg(test)]
mod house;
pub(crate) mod lanes;
mod plan;
mod record;
mod times;

pub use plan::Options;

use crate::progress::say;
use crate::scenario::runner::{self, Finished, Outcome};
use crate::scenario::{self, Bed, Draw, Scenario};
use crate::{Error, Result};
use checks::{CHECKS, Check, When};
use lanes::Ended;
use plan::State;
use record::Record;
use std::path::Path;
use std::time::Instant;
use times::Budget;

/// Getting packages and building are parts, too, but none that is asked for.
const PACKAGES: &str = "packages";
const BUILD: &str = "build";

/// Prints the names of all parts.
pub fn list() {
    for check in CHECKS {
        println!("{}: {}", check.name, check.about);
    }
    for scenario in scenario::all() {
        println!("{}: {}", scenario.name, scenario.about);
    }
    for scenario in scenario::long() {
        println!("{} (with --all): {}", scenario.name, scenario.about);
    }
    for group in scenario::schedule::TWINS {
        println!("in turn, or with --twins: {}", group.names.join(", "));
    }
}

/// Runs all checks and scenarios, or those that are asked for; says at the end how many passed, and how long each took.
pub fn run(bed: &Bed, options: &Options) -> Result<Outcome> {
    let begun = Instant::now();
    let state = State::find(&bed.layout);
    if let Err(error) = &state {
        say(format!("the commit is not known: {error}"));
    }
    let state = state.ok();
    let budget = Budget::read(&bed.layout)?;
    let mut record = Record::begin(&bed.layout, state.as_ref(), bed.draw, options.resume)?;
    let (checks, scenarios) = chosen(bed, options, state.as_ref(), &budget, &record)?;
    println!(
        "seed {}: {}={} repeats what is drawn at random",
        bed.draw.seed,
        Draw::SEED,
        bed.draw.seed
    );
    if parts(bed, options, &checks, &scenarios, &mut record)? {
        end(bed, options, budget, &record, begun)?;
    }
    let (passed, failed, machinery) = (
        record.count(Outcome::Passed),
        record.count(Outcome::Failed),
        record.count(Outcome::Machinery),
    );
    if machinery > 0 {
        println!(
            "{machinery} could not be run to an end, for want of a package, of memory or by others' faults: run them again \
             (--resume leaves out what passed)"
        );
    }
    println!("{passed} passed, {} failed", failed + machinery);
    Ok(match (failed, machinery) {
        (0, 0) => Outcome::Passed,
        (0, _) => Outcome::Machinery,
        _ => Outcome::Failed,
    })
}

/// What is to be run: the scenarios that are planned to take longest first.
fn chosen(
    bed: &Bed,
    options: &Options,
    state: Option<&State>,
    budget: &Budget,
    record: &Record,
) -> Result<(Vec<Check>, Vec<Scenario>)> {
    let asked = !options.only.is_empty();
    let mut checks = CHECKS.to_vec();
    let mut scenarios = plan::scenarios(options.all || asked);
    if asked {
        let names: Vec<&str> = checks
            .iter()
            .map(|check| check.name)
            .chain(scenarios.iter().map(|scenario| scenario.name))
            .collect();
        let names = plan::select(&names, &options.only)?;
        checks.retain(|check| names.contains(&check.name));
        scenarios.retain(|scenario| names.contains(&scenario.name));
    } else if !options.all && !options.twins {
        let left_out = plan::take_turns(&bed.layout, state, &mut scenarios);
        if !left_out.is_empty() {
            println!("left out at this commit: {}", left_out.join(", "));
        }
    }
    let before = checks.len() + scenarios.len();
    checks.retain(|check| !record.has(check.name));
    scenarios.retain(|scenario| !record.has(scenario.name));
    if options.resume {
        let passed = before - checks.len() - scenarios.len();
        println!("{passed} of {before} passed already at this state of the work tree");
    }
    let planned = |scenario: &Scenario| budget.of(scenario.name).unwrap_or(f64::MAX);
    scenarios.sort_by(|one, other| planned(other).total_cmp(&planned(one)));
    Ok((checks, scenarios))
}

/// Runs them; says whether that was more than one.
fn parts(
    bed: &Bed,
    options: &Options,
    checks: &[Check],
    scenarios: &[Scenario],
    record: &mut Record,
) -> Result<bool> {
    let all = options.only.is_empty();
    let of = |when| {
        let chosen = checks.iter().filter(move |check| check.when == when);
        chosen.copied().collect::<Vec<Check>>()
    };
    let (mut before, after, mut beside) = (of(When::First), of(When::Packages), of(When::Beside));
    let needed = !scenarios.is_empty() || !after.is_empty();
    if scenarios.len() < 2 {
        before.append(&mut beside);
    }
    std::thread::scope(|scope| {
        // Packages come over a network while others compute.
        let packages = needed.then(|| scope.spawn(|| part(PACKAGES, || bed.get())));
        for check in before {
            keep(record, part(check.name, || (check.run)(bed)))?;
        }
        if let Some(packages) = packages {
            let failed = |_| Error::Check("The thread that gets packages failed".into());
            let (name, end) = packages.join().map_err(failed)?;
            if all || end.outcome != Outcome::Passed {
                keep(record, (name, end))?;
            }
        }
        Ok::<_, Error>(())
    })?;
    for check in after {
        keep(record, part(check.name, || (check.run)(bed)))?;
    }
    let [first, others @ ..] = scenarios else {
        return Ok(checks.len() > 1);
    };
    let (name, end) = part(BUILD, || bed.prepare());
    let built = end.outcome == Outcome::Passed;
    if all || !built {
        keep(record, (name, end))?;
    }
    if !built {
        return Ok(true);
    }
    if others.is_empty() {
        println!("test {}: {}", first.name, first.about);
        keep(record, (first.name, runner::run(bed, first)))?;
        return Ok(!checks.is_empty());
    }
    lanes::run(bed, &beside, scenarios, |Ended { name, end, printed }| {
        let about = |(of, about)| (of == name).then_some(about);
        let checks = beside.iter().map(|check| (check.name, check.about));
        let all = scenarios
            .iter()
            .map(|scenario| (scenario.name, scenario.about));
        println!(
            "test {name}: {}",
            checks.chain(all).find_map(about).unwrap_or_default()
        );
        print!("{printed}");
        keep(record, (name, end))
    })?;
    Ok(true)
}

/// Runs a part that is no scenario.
fn part(name: &'static str, work: impl FnOnce() -> Result<()>) -> (&'static str, Finished) {
    let begun = Instant::now();
    (name, Finished::new(work(), begun))
}

/// Says what came of a part, and keeps it.
fn keep(record: &mut Record, (name, end): (&str, Finished)) -> Result<()> {
    tell(name, &end);
    record.add(name, end)
}

fn tell(name: &str, end: &Finished) {
    match end.outcome {
        Outcome::Passed => println!("test {name} ... ok ({:.0} s)", end.seconds),
        Outcome::Failed => println!("test {name} ... FAILED: {}", end.why),
        Outcome::Machinery => println!("test {name} ... FAILED by the machinery: {}", end.why),
    }
}

/// The times, and what is to be said of them.
fn end(
    bed: &Bed,
    options: &Options,
    budget: Budget,
    record: &Record,
    begun: Instant,
) -> Result<()> {
    println!("\n{}", times::table(&record.parts));
    for line in budget.grown(&record.parts) {
        println!("time: {line}");
    }
    if options.set_budget {
        budget.set(&bed.layout, &record.parts)?;
    }
    println!(
        "{:.0} s in all; {} has it all",
        begun.elapsed().as_secs_f64(),
        record.path().display()
    );
    Ok(())
}

/// Runs one scenario, or a check, in this process, which was started for it.
pub fn one(bed: &Bed, name: &str, result: &Path) -> Result<Outcome> {
    let end = if let Some(check) = CHECKS.iter().find(|check| check.name == name) {
        part(check.name, || (check.run)(bed)).1
    } else {
        let mut all = plan::scenarios(true);
        all.retain(|scenario| scenario.name == name);
        let scenario = all
            .first()
            .ok_or_else(|| Error::Usage(format!("No test is called {name}")))?;
        runner::run(bed, scenario)
    };
    lanes::leave(&end, result)
}
