//! What came of a run's parts: kept after each of them, so that a run that was ended early can be resumed.

use super::plan::State;
use crate::layout::{Layout, write_whole};
use crate::scenario::{Draw, Finished, Outcome};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::PathBuf;

/// One part that has ended.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Part {
    /// Its name.
    pub(super) name: String,
    /// What came of it.
    #[serde(flatten)]
    pub(super) end: Finished,
    /// It passed in an earlier run, and was not run again.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) earlier: bool,
}

/// A run.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Record {
    /// The commit.
    commit: String,
    /// The state of the work tree.
    tree: String,
    /// What repeats what was drawn at random.
    seed: u64,
    /// Whether what takes long was run, too.
    all: bool,
    /// The parts, in the order in which they ended.
    pub(super) parts: Vec<Part>,
    #[serde(skip)]
    path: PathBuf,
}

impl Record {
    /// Of a run that begins. What passed at that state already is taken over if it is resumed.
    pub(super) fn begin(
        layout: &Layout,
        state: Option<&State>,
        draw: Draw,
        resume: bool,
    ) -> Result<Self> {
        let path = layout.base.join("tests.json");
        let mut record = Self {
            commit: state.map_or(String::new(), |state| state.commit.clone()),
            tree: state.map_or(String::new(), |state| state.tree.clone()),
            seed: draw.seed,
            all: draw.all,
            parts: Vec::new(),
            path,
        };
        if resume {
            let state = state.ok_or_else(|| {
                Error::machine(
                    "There is no commit to resume at",
                    "Run it in a git work tree",
                )
            })?;
            record.parts = record.passed_at(state)?;
        }
        Ok(record)
    }

    /// What passed already at that state, as the last run kept it.
    fn passed_at(&self, state: &State) -> Result<Vec<Part>> {
        let text = match fs::read(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Error::file("read", &self.path)(error)),
        };
        // One that an older test bed wrote is none.
        let Ok(last) = serde_json::from_slice::<Self>(&text) else {
            return Ok(Vec::new());
        };
        // Fewer failures are drawn without --all.
        if last.tree != state.tree || last.all != self.all {
            return Ok(Vec::new());
        }
        let mut parts = last.parts;
        parts.retain(|part| part.end.outcome == Outcome::Passed);
        for part in &mut parts {
            part.earlier = true;
        }
        Ok(parts)
    }

    /// Whether a part need not be run again.
    pub(super) fn has(&self, name: &str) -> bool {
        self.parts.iter().any(|part| part.name == name)
    }

    /// Keeps what came of a part, instead of what an earlier run said of it.
    pub(super) fn add(&mut self, name: &str, end: Finished) -> Result<()> {
        self.parts.retain(|part| part.name != name);
        self.parts.push(Part {
            name: name.to_owned(),
            end,
            earlier: false,
        });
        let text = serde_json::to_vec_pretty(self)
            .map_err(|error| Error::Check(format!("The record of the run: {error}")))?;
        write_whole(&self.path, &text)
    }

    /// How many parts ended so.
    pub(super) fn count(&self, outcome: Outcome) -> usize {
        let of_it = self.parts.iter().filter(|part| part.end.outcome == outcome);
        of_it.count()
    }

    /// Where it is kept.
    pub(super) fn path(&self) -> &std::path::Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(tree: &str) -> State {
        State {
            commit: "c".into(),
            tree: tree.into(),
        }
    }

    fn end(outcome: Outcome) -> Finished {
        Finished {
            outcome,
            seconds: 1.5,
            why: String::new(),
        }
    }

    #[test]
    fn what_passed_at_the_same_state_is_not_run_again() {
        let folder = tempfile::tempdir().unwrap();
        let layout = Layout {
            source: folder.path().into(),
            target: folder.path().into(),
            base: folder.path().into(),
            released: false,
        };
        let draw = Draw { seed: 7, all: true };
        let begin = |at: &State, draw, resume| Record::begin(&layout, Some(at), draw, resume);
        let mut first = begin(&state("1"), draw, true).unwrap();
        assert!(first.parts.is_empty());
        first.add("good", end(Outcome::Passed)).unwrap();
        first.add("bad", end(Outcome::Failed)).unwrap();
        first.add("odd", end(Outcome::Machinery)).unwrap();
        first.add("good", end(Outcome::Passed)).unwrap();
        assert_eq!(first.count(Outcome::Passed), 1);

        let second = begin(&state("1"), draw, true).unwrap();
        let has = ["good", "bad", "odd"].map(|name| second.has(name));
        assert_eq!(has, [true, false, false]);
        assert!(second.parts.iter().all(|part| part.earlier));
        // Another state, a run with less, or one that is not resumed.
        let less = Draw { all: false, ..draw };
        assert!(!begin(&state("2"), draw, true).unwrap().has("good"));
        assert!(!begin(&state("1"), less, true).unwrap().has("good"));
        assert!(!begin(&state("1"), draw, false).unwrap().has("good"));
    }
}
