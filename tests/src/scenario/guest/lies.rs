//! Hints are never trusted: whatever the agent says, the migration ends right. Nothing but time and
//! traffic is lost.

use crate::Result;
use crate::error::check;
use crate::scenario::fixture::micro::Micro;
use crate::scenario::fixture::pair::{At, NEWEST, Pair};
use crate::scenario::{Bed, Scenario};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);

/// What must show in the answer.
#[derive(Clone, Copy)]
enum Shows {
    /// The digests did not match.
    Mismatches,
    /// Nothing came from disk.
    NoDisk,
    /// A word in what people are told of it.
    Remark(&'static str),
    /// Nothing in particular.
    Nothing,
}

pub(crate) fn scenarios() -> Vec<Scenario> {
    macro_rules! lies {
        ($($name:literal, $about:literal, $lie:literal, $shows:expr;)*) => {
            vec![$(Scenario {
                name: $name,
                about: $about,
                limit: LIMIT,
                run: |bed| survives(bed, concat!("rate=4M ", $lie), $shows),
            }),*]
        };
    }
    let mut all = lies! {
        "lie-wrong", "every range names other sectors", "lie=wrong", Shows::Mismatches;
        "lie-stale", "pages are named that were written since", "lie=stale cache-rate=16M", Shows::Mismatches;
        "lie-outside-memory", "page frames where no memory is", "lie=outside-memory", Shows::NoDisk;
        "lie-outside-disk", "sectors behind the disk's end", "lie=outside-disk", Shows::NoDisk;
        "lie-flood", "a report without an end", "lie=flood", Shows::Nothing;
        "lie-mid-frame", "silence in the middle of a frame", "lie=mid-frame", Shows::NoDisk;
        "lie-version", "a version that was not offered", "lie=version", Shows::Remark("version");
        "lie-garbage", "random bytes", "lie=garbage", Shows::Nothing;
        "lie-overlap", "ranges that each name the same memory", "lie=overlap", Shows::Mismatches;
    };
    all.push(Scenario {
        name: "lie-many-reports",
        about: "one report after another, over a link that is slower than they are",
        limit: LIMIT,
        run: |bed| {
            survives_at(
                bed,
                "rate=512K lie=many-reports",
                Some(24),
                Shows::Mismatches,
            )
        },
    });
    all
}

/// There and back, since a lying agent must not spoil the channel either.
fn survives(bed: &Bed, saying: &str, shows: Shows) -> Result<()> {
    survives_at(bed, saying, Some(1000), shows)
}

/// The same over so many Mbit/s.
fn survives_at(bed: &Bed, saying: &str, rate: Option<u32>, shows: Shows) -> Result<()> {
    let micro = Micro {
        parameters: format!("cache=48M data=24M zero=16M {saying}"),
        ..Micro::new(bed)?
    };
    let pair = Pair::new(bed, NEWEST, rate)?;
    let mut life = pair.boot(&micro)?;
    for from in [At::A, At::B] {
        let answer = pair.moves(from, &mut life)?;
        let remarks = answer.value["summary"]["remarks"].to_string();
        println!("  remarks: {remarks}");
        match shows {
            Shows::Mismatches => check(
                answer.number("/summary/traffic/mismatched-pages")? > 0,
                || format!("All hints were right: {answer}"),
            )?,
            Shows::NoDisk => check(answer.number("/summary/traffic/disk-pages")? == 0, || {
                format!("Pages came from disk: {answer}")
            })?,
            Shows::Remark(word) => check(remarks.contains(word), || {
                format!("No \"{word}\" in the remarks: {answer}")
            })?,
            Shows::Nothing => {}
        }
    }
    Ok(())
}
