//! Compares what both hosts read. The guest runs meanwhile and writes, so that a block may differ though the disk is
//! the same: what counts is a block that this host reads the same before and after the other one reads something else,
//! and that more than once.

use super::{Error, Storage};
use std::thread;
use std::time::Duration;
use transhume_protocol::link::{Compared, Comparison, MAX_PLACES, Sample};

/// Pauses before blocks that differed are read again.
const RETRY_INTERVAL: [Duration; 4] = [
    Duration::from_millis(5),
    Duration::from_millis(30),
    Duration::from_millis(100),
    Duration::from_millis(300),
];
/// How often a block must have differed while it did not change.
const CERTAIN: usize = 2;
/// Blocks of one node that are read again, at most: so many prove it.
const SUSPECTS: usize = 64;

/// A node that is not the same on both hosts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Number of the disk.
    pub disk: u16,
    /// Number of the node in the disk.
    pub node: u16,
    /// Blocks that differ for certain.
    pub blocks: usize,
    /// The first of them.
    pub first: u64,
    /// Blocks that were compared.
    pub of: usize,
}

/// What was found.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Nodes that differ.
    pub differences: Vec<Difference>,
    /// Blocks that were compared.
    pub blocks: usize,
}

/// A block that differed.
struct Suspect {
    /// Which sample it is of.
    sample: usize,
    place: u64,
    /// How often it differed while it did not change here.
    certain: usize,
}

/// Compares these samples, which the other host answers by `ask`. Blocks.
///
/// # Errors
/// Those of `ask`, and answers that fit no question.
pub fn compare<E: From<Error>>(
    here: &Storage,
    key: &[u8; 16],
    samples: Vec<Sample>,
    ask: impl FnMut(Comparison) -> Result<Compared, E>,
) -> Result<Outcome, E> {
    let mut asking = Asking {
        here,
        key,
        ask,
        number: 0,
        blocks: 0,
    };
    let mut differences = Vec::new();
    for samples in chunks(samples) {
        let (before, theirs) = asking.ask(&samples)?;
        let suspects = suspects(&samples, &before, &theirs, key);
        let proven = asking.again(&samples, suspects)?;
        for (n, sample) in samples.iter().enumerate() {
            let mut places = proven
                .iter()
                .filter(|one| one.sample == n)
                .map(|one| one.place);
            if let Some(first) = places.next() {
                differences.push(Difference {
                    disk: sample.disk,
                    node: sample.node,
                    blocks: 1 + places.count(),
                    first,
                    of: before.digests[n].len(),
                });
            }
        }
    }
    Ok(Outcome {
        differences,
        blocks: asking.blocks,
    })
}

struct Asking<'a, F> {
    here: &'a Storage,
    key: &'a [u8; 16],
    ask: F,
    number: u32,
    blocks: usize,
}

impl<E: From<Error>, F: FnMut(Comparison) -> Result<Compared, E>> Asking<'_, F> {
    /// What is read here, and then there.
    fn ask(&mut self, samples: &[Sample]) -> Result<(Compared, Compared), E> {
        let comparison = Comparison {
            number: self.number,
            samples: samples.to_vec(),
        };
        self.number += 1;
        self.blocks += comparison.places();
        let here = self.here.read(&comparison, self.key)?;
        let there = (self.ask)(comparison)?;
        let lengths = |read: &Compared| read.digests.iter().map(Vec::len).collect::<Vec<_>>();
        if there.number != here.number || lengths(&there) != lengths(&here) {
            return Err(Error::Bounds("an answer of other blocks").into());
        }
        Ok((here, there))
    }

    /// Reads again what differed. Returns what does so for certain.
    fn again(&mut self, samples: &[Sample], mut suspects: Vec<Suspect>) -> Result<Vec<Suspect>, E> {
        let mut proven = Vec::new();
        for pause in RETRY_INTERVAL {
            if suspects.is_empty() {
                break;
            }
            thread::sleep(pause);
            let again = chosen(samples, &suspects);
            let (before, theirs) = self.ask(&again)?;
            let comparison = Comparison {
                number: 0,
                samples: again,
            };
            let after = self.here.read(&comparison, self.key)?;
            let [before, theirs, after] =
                [before, theirs, after].map(|read| read.digests.into_iter().flatten());
            let read = before.zip(theirs).zip(after);
            let mut open = Vec::new();
            for (mut suspect, ((before, theirs), after)) in suspects.into_iter().zip(read) {
                if before == theirs || after == theirs {
                    continue;
                }
                suspect.certain += usize::from(before.is_some() && before == after);
                if suspect.certain >= CERTAIN {
                    proven.push(suspect);
                } else {
                    open.push(suspect);
                }
            }
            suspects = open;
        }
        Ok(proven)
    }
}

/// The blocks that differ, some of each sample.
fn suspects(samples: &[Sample], here: &Compared, there: &Compared, key: &[u8; 16]) -> Vec<Suspect> {
    let mut suspects = Vec::new();
    for (n, sample) in samples.iter().enumerate() {
        let places = super::drawn::all(sample, key);
        let read = here.digests[n].iter().zip(&there.digests[n]);
        let differing = places.into_iter().zip(read);
        let differing = differing.filter(|(_, (here, there))| here.is_some() && here != there);
        suspects.extend(differing.take(SUSPECTS).map(|(place, _)| Suspect {
            sample: n,
            place,
            certain: 0,
        }));
    }
    suspects
}

/// Samples of these blocks alone, in the same order.
fn chosen(samples: &[Sample], suspects: &[Suspect]) -> Vec<Sample> {
    let mut chosen = Vec::new();
    for of_one in suspects.chunk_by(|one, other| one.sample == other.sample) {
        let sample = of_one.first().and_then(|one| samples.get(one.sample));
        chosen.extend(sample.map(|sample| Sample {
            drawn: 0,
            places: of_one.iter().map(|one| one.place).collect(),
            ..*sample
        }));
    }
    chosen
}

/// As many samples at once as may be asked for.
fn chunks(samples: Vec<Sample>) -> Vec<Vec<Sample>> {
    let mut chunks: Vec<Vec<Sample>> = Vec::new();
    let mut places = MAX_PLACES;
    for mut sample in samples {
        sample.places.truncate(MAX_PLACES / 2);
        let more = sample.places.len() + usize::from(sample.drawn);
        if places + more > MAX_PLACES {
            chunks.push(Vec::new());
            places = 0;
        }
        places += more;
        if let Some(chunk) = chunks.last_mut() {
            chunk.push(sample);
        }
    }
    chunks
}
