//! Which parts a run has, and for which state of the work tree.

use crate::command::Run;
use crate::layout::Layout;
use crate::scenario::{self, Scenario, schedule};
use crate::{Error, Result};
use std::hash::Hasher as _;
use xxhash_rust::xxh64::Xxh64;

/// What is asked for.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Only these parts: names, or patterns with `*` and `?`.
    pub only: Vec<String>,
    /// What takes long, too.
    pub all: bool,
    /// All twins, not one of each group.
    pub twins: bool,
    /// Not what passed already at the same state of the work tree.
    pub resume: bool,
    /// What was measured is what is planned from now on.
    pub set_budget: bool,
}

/// How long ago what twins are about may have changed for all of them to run, before the commit.
const JUST: u64 = 4 * 3600;

/// The state of the work tree.
#[derive(Debug, Clone)]
pub(super) struct State {
    /// The commit.
    pub(super) commit: String,
    /// A digest of the commit and of all that differs from it.
    pub(super) tree: String,
}

fn git(layout: &Layout, arguments: &[&str]) -> Result<Vec<u8>> {
    Run::new("git")
        .folder(&layout.source)
        .args(arguments)
        .cure("See git's words")
        .output()
}

fn line(layout: &Layout, arguments: &[&str]) -> Result<String> {
    let out = git(layout, arguments)?;
    Ok(String::from_utf8_lossy(&out).trim().to_owned())
}

impl State {
    /// That of the work tree now.
    pub(super) fn find(layout: &Layout) -> Result<Self> {
        let commit = line(layout, &["rev-parse", "HEAD"])?;
        let mut digest = Xxh64::new(0);
        digest.write(commit.as_bytes());
        digest.write(&git(layout, &["diff", "--binary", "HEAD"])?);
        let others = git(
            layout,
            &["ls-files", "--others", "--exclude-standard", "-z"],
        )?;
        for name in others.split(|byte| *byte == 0) {
            let path = layout.source.join(&*String::from_utf8_lossy(name));
            if path.is_file() {
                digest.write(name);
                digest.write(&std::fs::read(&path).map_err(Error::file("read", &path))?);
            }
        }
        Ok(Self {
            commit,
            tree: format!("{:016x}", digest.finish()),
        })
    }

    /// Which of so many twins runs.
    fn turn(&self, names: &[&str]) -> usize {
        let mut digest = Xxh64::new(0);
        digest.write(self.commit.as_bytes());
        digest.write(names.first().copied().unwrap_or_default().as_bytes());
        let count = u64::try_from(names.len()).unwrap_or(1).max(1);
        usize::try_from(digest.finish() % count).unwrap_or(0)
    }
}

/// Whether a folder was changed by the commit or shortly before it; also where nobody can tell.
fn just_changed(layout: &Layout, folder: &str) -> bool {
    let time = |of: &[&str]| {
        let all = [&["log", "-1", "--format=%ct"], of].concat();
        line(layout, &all).ok()?.parse::<u64>().ok()
    };
    let clean = line(layout, &["status", "--porcelain", "--", folder]);
    let clean = clean.is_ok_and(|changes| changes.is_empty());
    match (time(&["HEAD"]), time(&["HEAD", "--", folder])) {
        (Some(now), Some(then)) => now.saturating_sub(then) < JUST || !clean,
        _ => true,
    }
}

/// Leaves one of each group of twins, unless what they are about has just changed; returns the names of the others.
pub(super) fn take_turns(
    layout: &Layout,
    state: Option<&State>,
    scenarios: &mut Vec<Scenario>,
) -> Vec<&'static str> {
    let Some(state) = state else {
        return Vec::new();
    };
    let mut left_out = Vec::new();
    for group in schedule::TWINS {
        if group
            .about
            .is_some_and(|folder| just_changed(layout, folder))
        {
            continue;
        }
        let turn = state.turn(group.names);
        let others = group.names.iter().enumerate();
        left_out.extend(others.filter(|(at, _)| *at != turn).map(|(_, name)| *name));
    }
    scenarios.retain(|scenario| !left_out.contains(&scenario.name));
    left_out
}

/// Whether a name is that, or is of that pattern: `*` stands for any characters, `?` for one.
fn is_of(name: &[u8], pattern: &[u8]) -> bool {
    match pattern {
        [] => name.is_empty(),
        [b'*', rest @ ..] => (0..=name.len()).any(|skipped| is_of(&name[skipped..], rest)),
        [b'?', rest @ ..] => !name.is_empty() && is_of(&name[1..], rest),
        [byte, rest @ ..] => name.first() == Some(byte) && is_of(&name[1..], rest),
    }
}

/// Those of the names that are asked for. Every word must mean some.
pub(super) fn select<'a>(names: &[&'a str], only: &[String]) -> Result<Vec<&'a str>> {
    let mut found = Vec::new();
    for word in only {
        let of_word = |name: &&&str| is_of(name.as_bytes(), word.as_bytes());
        let before = found.len();
        found.extend(names.iter().filter(of_word));
        if found.len() == before {
            let near: Vec<&str> = names
                .iter()
                .copied()
                .filter(|name| name.contains(word))
                .collect();
            let near = if near.is_empty() {
                "`cargo testbed test --list` names all".to_owned()
            } else {
                format!(
                    "There are {}; --only '*{word}*' takes them all",
                    near.join(", ")
                )
            };
            return Err(Error::Usage(format!("No test is called {word}. {near}")));
        }
    }
    let mut chosen: Vec<&str> = names.to_vec();
    chosen.retain(|name| found.contains(name));
    Ok(chosen)
}

/// All scenarios, and those that only `--all` runs, or the names that are asked for.
pub(super) fn scenarios(all: bool) -> Vec<Scenario> {
    let mut scenarios = scenario::all();
    if all {
        scenarios.extend(scenario::long());
    }
    scenarios
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMES: [&str; 4] = ["lie-wrong", "post-copy-10.0", "post-copy-lost", "post-copy"];

    fn chosen(only: &[&str]) -> Result<Vec<&'static str>> {
        let only: Vec<String> = only.iter().map(|word| (*word).to_owned()).collect();
        select(&NAMES, &only)
    }

    #[test]
    fn a_name_is_that_one_and_a_pattern_is_several() {
        assert_eq!(chosen(&["post-copy"]).unwrap(), ["post-copy"]);
        let several = ["post-copy-10.0", "post-copy-lost"];
        assert_eq!(chosen(&["post-copy-*"]).unwrap(), several);
        assert_eq!(chosen(&["post-copy-10?0"]).unwrap(), ["post-copy-10.0"]);
        assert_eq!(chosen(&["*"]).unwrap(), NAMES);
    }

    #[test]
    fn several_are_run_once_each_in_the_order_of_all() {
        let found = chosen(&["post-copy", "lie-wrong", "p*copy"]).unwrap();
        assert_eq!(found, ["lie-wrong", "post-copy"]);
    }

    #[test]
    fn a_name_that_is_none_is_an_error_that_says_what_there_is() {
        let error = chosen(&["lie-wrong", "lost"]).unwrap_err().to_string();
        assert!(
            error.contains("called lost") && error.contains("post-copy-lost"),
            "{error}"
        );
        assert!(chosen(&["x-*"]).unwrap_err().to_string().contains("--list"));
    }

    #[test]
    fn each_commit_has_its_turn_of_twins() {
        let turn = |commit: &str| {
            let state = State {
                commit: commit.into(),
                tree: String::new(),
            };
            state.turn(&["a", "b"])
        };
        let turns: Vec<usize> = (0..64).map(|commit| turn(&commit.to_string())).collect();
        assert!(turns.contains(&0) && turns.contains(&1));
        assert_eq!(turn("7"), turn("7"));
    }
}
