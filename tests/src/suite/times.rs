//! How long parts took, beside how long they are planned to take. It is said, and fails nothing.

use super::record::Part;
use crate::layout::Layout;
use crate::scenario::Outcome;
use crate::{Error, Result};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

/// Below so many seconds more a part has not grown: machines differ.
const LEAST: f64 = 5.0;
/// A part that takes so much of what is planned has grown.
const GROWN: f64 = 1.5;

/// Seconds that are planned for each part.
#[derive(Debug, Default)]
pub(super) struct Budget(BTreeMap<String, f64>);

fn path(layout: &Layout) -> PathBuf {
    layout.source.join("tests/budget.json")
}

impl Budget {
    /// That of the work tree.
    pub(super) fn read(layout: &Layout) -> Result<Self> {
        let path = path(layout);
        let text = fs::read(&path).map_err(Error::file("read", &path))?;
        let parts = serde_json::from_slice(&text)
            .map_err(|error| Error::Check(format!("{}: {error}", path.display())))?;
        Ok(Self(parts))
    }

    /// What is planned for a part, in seconds; none where it is new.
    pub(super) fn of(&self, name: &str) -> Option<f64> {
        self.0.get(name).copied()
    }

    /// What was measured is planned from now on; what was not measured stays as it was.
    pub(super) fn set(mut self, layout: &Layout, parts: &[Part]) -> Result<()> {
        for part in parts {
            if part.end.outcome == Outcome::Passed && !part.earlier {
                self.0.insert(part.name.clone(), part.end.seconds.ceil());
            }
        }
        let mut text = serde_json::to_string_pretty(&self.0)
            .map_err(|error| Error::Check(format!("The budget: {error}")))?;
        text.push('\n');
        let path = path(layout);
        fs::write(&path, text).map_err(Error::file("write", &path))
    }

    /// Says which parts take half as long again as planned, and which are new.
    pub(super) fn grown(&self, parts: &[Part]) -> Vec<String> {
        let measured = parts.iter().filter(|part| !part.earlier);
        let grown = measured.filter_map(|part| {
            let (name, seconds) = (&part.name, part.end.seconds);
            match self.of(name) {
                None => Some(format!(
                    "{name} is not in tests/budget.json ({seconds:.0} s)"
                )),
                Some(planned) if seconds > planned * GROWN && seconds > planned + LEAST => Some(
                    format!("{name} took {seconds:.0} s, and {planned:.0} s are planned"),
                ),
                Some(_) => None,
            }
        });
        grown.collect()
    }
}

/// All parts, the slowest first.
pub(super) fn table(parts: &[Part]) -> String {
    let mut sorted: Vec<&Part> = parts.iter().collect();
    sorted.sort_by(|one, other| other.end.seconds.total_cmp(&one.end.seconds));
    let mut text = String::from("    seconds  part\n");
    for part in sorted {
        let note = match (part.end.outcome, part.earlier) {
            (Outcome::Passed, false) => "",
            (Outcome::Passed, true) => "  (passed earlier)",
            (Outcome::Failed, _) => "  FAILED",
            (Outcome::Machinery, _) => "  FAILED by the machinery",
        };
        let _ = writeln!(text, "{:>11.1}  {}{note}", part.end.seconds, part.name);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::Finished;

    fn part(name: &str, seconds: f64) -> Part {
        let end = Finished {
            outcome: Outcome::Passed,
            seconds,
            why: String::new(),
        };
        Part {
            name: name.into(),
            end,
            earlier: false,
        }
    }

    #[test]
    fn it_is_said_what_has_grown_by_half_and_what_is_new() {
        let planned = [("same", 100.0), ("grown", 20.0), ("short", 2.0)];
        let planned = planned.map(|(name, seconds)| (name.to_owned(), seconds));
        let budget = Budget(planned.into_iter().collect());
        let parts = [
            part("same", 149.0),
            part("grown", 31.0),
            part("short", 6.0),
            part("new", 3.0),
        ];
        let said = budget.grown(&parts);
        assert_eq!(said.len(), 2, "{said:?}");
        assert!(said[0].contains("grown took 31 s"), "{said:?}");
        assert!(said[1].contains("new is not in"), "{said:?}");
    }

    #[test]
    fn the_slowest_is_first() {
        let text = table(&[part("fast", 1.0), part("slow", 20.0)]);
        assert!(text.find("slow") < text.find("fast"), "{text}");
    }
}
