//! In which order memory follows in post-copy.

use super::moves::{POST, followed};
use crate::Result;
use crate::error::check;
use crate::scenario::fixture::micro::Micro;
use crate::scenario::fixture::pair::{At, NEWEST, Pair};
use crate::scenario::fixture::transhume::Answer;
use crate::scenario::{Bed, Scenario};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(300);
/// In Mbit/s.
const RATE: u32 = 100;
/// Pages that come with one that the guest waits for and nobody named, at most.
const NEAR: u64 = 16;
/// What the guest works with in the end, in bytes.
const HOT: u64 = 2 << 20;

pub(crate) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario {
            name: "post-copy-order",
            about: "a guest that names what it works with waits for fewer pages than one that does not",
            limit: LIMIT,
            run: order,
        },
        Scenario {
            name: "post-copy-order-lies",
            about: "a guest names frames that are not there, or names without an end, and its memory is right",
            limit: LIMIT,
            run: lies,
        },
    ]
}

fn post(answer: &Answer, name: &str) -> Result<u64> {
    answer.number(&format!("/summary/post-copy/{name}"))
}

/// A guest that writes all of its data until most of the first scan is done, and then a small part.
fn narrowing(bed: &Bed, saying: &str) -> Result<Answer> {
    let micro = Micro {
        memory: 256,
        parameters: format!("cache=32M data=112M rate=60M {saying}"),
        ..Micro::new(bed)?
    };
    let pair = Pair::new(bed, NEWEST, Some(RATE))?;
    let mut life = pair.boot(&micro)?;
    let command = pair.begin_migration(At::A, &POST)?;
    let shown = |error| pair.with_logs(error);
    pair.job_when(At::A, "most of the memory to be scanned", |job| {
        let number = |name: &str| job["progress"][name].as_u64();
        job["progress"]["phase"] == "pre-copy"
            && number("remaining-bytes") < number("total-bytes").map(|all| all / 2)
            && number("remaining-bytes").is_some()
    })
    .map_err(shown)?;
    life.write_only(HOT)?;
    let answer = command.end()?.expect(0).map_err(shown)?;
    pair.arrived(At::B, &mut life).map_err(shown)?;
    Ok(answer)
}

/// Counts of pages are compared, not times: what is not there when it is touched is asked for.
fn order(bed: &Bed) -> Result<()> {
    let unnamed = narrowing(bed, "names=no")?;
    let named = narrowing(bed, "")?;
    followed(&unnamed)?;
    followed(&named)?;
    let all = [
        "pages",
        "requested-pages",
        "ordered-pages",
        "kernel-pages",
        "classes/kernel",
        "classes/working-sets",
    ];
    for name in all {
        println!(
            "  {name}: {} named, {} not",
            post(&named, name)?,
            post(&unnamed, name)?
        );
    }
    let asked = |answer: &Answer| post(answer, "requested-pages");
    let (with, without) = (asked(&named)?, asked(&unnamed)?);
    check(without > 30, || {
        format!("The guest waited for too little to tell: {unnamed}")
    })?;
    check(with * 2 < without, || {
        format!("The guest asked for {with} pages, and without an order for {without}")
    })?;
    check(
        post(&unnamed, "ordered-pages")? <= NEAR * without && post(&unnamed, "kernel-pages")? == 0,
        || format!("Nobody named them: {unnamed}"),
    )?;
    check(
        post(&named, "classes/working-sets")? == HOT / 4096
            && post(&named, "ordered-pages")? > 100
            && post(&named, "kernel-pages")? > 0,
        || format!("What was named did not go first: {named}"),
    )
}

fn lies(bed: &Bed) -> Result<()> {
    // It has time for nothing else, so what it writes may come over without post-copy.
    narrowing(bed, "lie=flood")?;
    let answer = narrowing(bed, "lie=outside-memory")?;
    followed(&answer)?;
    let asked = post(&answer, "requested-pages")?;
    check(post(&answer, "ordered-pages")? <= NEAR * asked, || {
        format!("Pages came that nobody named: {answer}")
    })
}
