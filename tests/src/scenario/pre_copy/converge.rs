//! A guest that writes faster than the link carries: the command says so, and what would help helps.

use crate::Result;
use crate::error::check;
use crate::scenario::fixture::micro::Micro;
use crate::scenario::fixture::pair::{At, NEWEST, Pair};
use crate::scenario::fixture::transhume::ask;
use crate::scenario::{Bed, Scenario};
use std::time::Duration;

/// In Mbit/s.
const SLOW: u32 = 30;

pub(crate) fn scenarios() -> Vec<Scenario> {
    vec![Scenario {
        name: "converge",
        about: "a guest that writes faster than the link carries, with a deadline, a longer pause, and throttled",
        limit: Duration::from_secs(300),
        run: converge,
    }]
}

fn converge(bed: &Bed) -> Result<()> {
    let micro = Micro {
        memory: 96,
        parameters: "cache=16M data=32M zero=8M rate=60M".into(),
        ..Micro::new(bed)?
    };
    let pair = Pair::new(bed, NEWEST, Some(SLOW))?;
    let mut life = pair.boot(&micro)?;
    let shown = |error| pair.with_logs(error);

    let command = pair.begin_migration(At::A, &["--mode", "pre", "--deadline", "25"])?;
    let job = pair.in_pre_copy(At::A).map_err(shown)?;
    // Which of its reasons it says first depends on how fast this machine is.
    pair.wait("the word that it does not come to an end", || {
        let job = ask(&pair.a, &["job", "show", &job])?.expect(0)?;
        let advice = &job.value["progress"]["forecast"]["advice"];
        check(job.word("/state")? == "running", || {
            format!("It ended before it said so: {job}")
        })?;
        Ok(advice
            .as_str()
            .is_some_and(|advice| advice.contains("What would do")))
    })?;
    let answer = command.end()?.refused(
        4,
        &[
            "deadline has passed",
            "What would do",
            "--mode auto",
            "runs on at hosta",
        ],
    );
    println!("  {}", answer.map_err(shown)?.message());
    pair.stayed(At::A, &mut life)?;

    let options = [
        "--mode",
        "pre",
        "--max-downtime",
        "60000",
        "--deadline",
        "120",
    ];
    pair.migrate(At::A, &options)?.expect(0).map_err(shown)?;
    pair.arrived(At::B, &mut life)?;

    let options = [
        "--mode",
        "pre",
        "--allow-throttling",
        "--max-downtime",
        "2000",
        "--deadline",
        "150",
    ];
    let answer = pair.migrate(At::B, &options)?.expect(0).map_err(shown)?;
    println!("  throttled: {}", answer.value["summary"]["total-ms"]);
    pair.arrived(At::A, &mut life)
}
