//! A migration chooses by itself between pre-copy and post-copy, and says why.

use crate::Result;
use crate::error::check;
use crate::hosts::Hosts;
use crate::scenario::fixture::micro::{Life, Micro, NAME};
use crate::scenario::fixture::pair::{At, NEWEST, Pair};
use crate::scenario::fixture::transhume::{Answer, ask};
use crate::scenario::post_copy::moves::followed;
use crate::scenario::{Bed, Scenario};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(240);
/// In Mbit/s: less than the guest writes.
const SLOW: u32 = 40;
const TRIES: u32 = 3;

pub(crate) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario {
            name: "choice",
            about: "a guest that writes faster than the link carries goes over to post-copy, a quiet one does not; \
                    one with a deadline does in time",
            limit: LIMIT,
            run: choice,
        },
        Scenario {
            name: "choice-without-userfaultfd",
            about: "a host that can take nobody in post-copy: by itself it is pre-copy, and asked for it is refused",
            limit: LIMIT,
            run: without_userfaultfd,
        },
    ]
}

fn busy(bed: &Bed) -> Result<Micro> {
    Ok(Micro {
        memory: 64,
        parameters: "cache=8M data=32M rate=60M".into(),
        ..Micro::new(bed)?
    })
}

fn quiet(bed: &Bed) -> Result<Micro> {
    Ok(Micro {
        memory: 128,
        parameters: "cache=16M data=64M rate=200K".into(),
        ..Micro::new(bed)?
    })
}

/// It was that mode, for a reason with these words, and it was foretold.
fn chosen(answer: &Answer, mode: &str, words: &[&str]) -> Result<()> {
    let why = answer.word("/summary/choice/why")?;
    let number = |name: &str| {
        let value = answer.value.pointer(&format!("/summary/{name}"));
        value.and_then(serde_json::Value::as_f64).unwrap_or(-1.0)
    };
    println!(
        "  {mode}, because {why}; {:.0} ms, downtime {:.0}; expected {:.0} and {:.0}",
        number("total-ms"),
        number("downtime/total-ms"),
        number("expected/total-ms"),
        number("expected/downtime-ms"),
    );
    check(answer.word("/summary/choice/mode")? == mode, || {
        format!("Another choice: {answer}")
    })?;
    check(words.iter().all(|word| why.contains(word)), || {
        format!("Another reason: {answer}")
    })?;
    check(number("expected/total-ms") > 0.0, || {
        format!("Nothing was expected: {answer}")
    })?;
    let followed = answer.value["summary"]["post-copy"].is_object();
    check(followed == (mode == "post"), || {
        format!("It was not what it says: {answer}")
    })
}

fn choice(bed: &Bed) -> Result<()> {
    let pair = Pair::new(bed, NEWEST, Some(SLOW))?;
    let shown = |error| pair.with_logs(error);
    let mut life = pair.boot(&busy(bed)?)?;
    let answer = pair.moves(At::A, &mut life).map_err(shown)?;
    // How fast it writes beside the link goes by the machine: either reason is right.
    chosen(&answer, "post", &["the guest writes", "pre-copy"])?;
    // Before all of memory was sent once: that would take half a minute.
    pair.hosts.shape(Some(SLOW / 5))?;
    let answer = in_time(&pair, &mut life).map_err(shown)?;
    chosen(&answer, "post", &["one pass over memory", "--deadline"])?;
    // Not when it ran there, for how late this machine is says nothing: but that it did before one pass was over.
    followed(&answer)?;
    drop(life);
    ask(&pair.a, &["vm", "stop", NAME, "--force"])?.expect(0)?;

    pair.hosts.shape(Some(SLOW))?;
    let mut life = pair.boot(&quiet(bed)?)?;
    let answer = pair.moves(At::A, &mut life).map_err(shown)?;
    chosen(&answer, "pre", &["the guest writes"])?;
    let asked = ["--mode", "pre"];
    let answer = pair.moves_by(At::B, &asked, &mut life).map_err(shown)?;
    chosen(&answer, "pre", &["asked for"])
}

/// Moves it back with a deadline. A machine with other work may be too late for it: then the VM stays, and it is tried again.
fn in_time(pair: &Pair<'_>, life: &mut Life) -> Result<Answer> {
    let deadline = ["--deadline", "8"];
    for _ in 1..TRIES {
        match pair.moves_by(At::B, &deadline, life) {
            Err(error) if error.to_string().contains("the deadline has passed") => {
                println!("  too late, and once more");
                pair.stayed(At::B, life)?;
            }
            ended => return ended,
        }
    }
    pair.moves_by(At::B, &deadline, life)
}

fn without_userfaultfd(bed: &Bed) -> Result<()> {
    let mut hosts = Hosts::new(Some(10 * SLOW))?;
    let nothing = ("/dev/null".into(), "/dev/userfaultfd".into());
    hosts.b.covered.push(nothing);
    let pair = Pair::on(bed, NEWEST, hosts)?;
    let shown = |error| pair.with_logs(error);
    let mut life = pair.boot(&quiet(bed)?)?;
    let refused = pair.migrate(At::A, &["--mode", "post"])?;
    refused
        .refused(4, &["userfaultfd", "--mode pre", "runs on at hosta"])
        .map_err(shown)?;
    pair.stayed(At::A, &mut life)?;
    let answer = pair.moves(At::A, &mut life).map_err(shown)?;
    let why = answer.word("/summary/choice/why")?;
    println!("  {why}");
    check(
        answer.word("/summary/choice/mode")? == "pre" && why.contains("userfaultfd"),
        || format!("Another reason: {answer}"),
    )
}
