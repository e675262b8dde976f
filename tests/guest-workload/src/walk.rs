//! A process of its own that walks through memory at random and writes a word of every page it comes to, by itself or
//! by system calls, so that it is the kernel that touches the page.
//!
//! While the guest moves, pages that it wrote are what the destination does not have yet.

use crate::memory::{PAGE, Page, Random, random_of, word_at};
use crate::settings::Settings;
use std::io::{BufRead, BufReader, PipeReader, PipeWriter, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How a page is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// By the process.
    Directly,
    /// By the kernel, for the process: `write` of the word into a pipe, and `read` out of it.
    ByCalls,
}

impl Way {
    /// What this program is told to be such a walker.
    fn name(self) -> &'static str {
        match self {
            Self::Directly => "walk",
            Self::ByCalls => "call",
        }
    }

    /// What this program was told to be, if it is a walker.
    pub(crate) fn named(name: &str) -> Option<Self> {
        [Self::Directly, Self::ByCalls]
            .into_iter()
            .find(|way| way.name() == name)
    }
}

/// The word of a page that counts how often it was come to.
const COUNT: usize = 1;
const STEP: Duration = Duration::from_millis(10);
/// Pages between two looks at the clock.
const BATCH: u32 = 32;

/// The memory that is walked.
struct Region {
    pages: Vec<Page>,
    /// How often each was come to.
    visits: Vec<u32>,
    random: Random,
    /// By way of which the kernel writes the pages, where it does.
    pipe: Option<(PipeReader, PipeWriter)>,
}

impl Region {
    fn fill(size: usize, way: Way) -> Result<Self, String> {
        let count = size / PAGE;
        let mut pages: Vec<Page> = Vec::new();
        pages
            .try_reserve_exact(count)
            .map_err(|error| error.to_string())?;
        for page in 0..count {
            let mut random = random_of(page, 0);
            let mut content = Page::ZERO;
            for (index, word) in content.words().iter_mut().enumerate() {
                *word = word_at(&mut random, page, 0, index);
            }
            pages.push(content);
        }
        Ok(Self {
            pages,
            visits: vec![0; count],
            random: Random::new(1),
            pipe: match way {
                Way::Directly => None,
                Way::ByCalls => {
                    Some(std::io::pipe().map_err(|error| format!("cannot make a pipe: {error}"))?)
                }
            },
        })
    }

    fn visit_one(&mut self) -> std::io::Result<()> {
        let count = self.pages.len().max(1) as u64;
        let page = usize::try_from(self.random.next() % count).unwrap_or(0);
        if let (Some(found), Some(visits)) = (self.pages.get_mut(page), self.visits.get_mut(page)) {
            *visits = visits.wrapping_add(1);
            match &mut self.pipe {
                None => found.words()[COUNT] += 1,
                Some(pipe) => count_by_calls(found, pipe)?,
            }
        }
        Ok(())
    }

    /// Compares every page; says how many there are.
    fn check(&mut self) -> Result<usize, String> {
        for (page, visits) in self.visits.iter().enumerate() {
            let mut random = random_of(page, 0);
            for (index, word) in self.pages[page].words().iter().enumerate() {
                let mut expected = word_at(&mut random, page, 0, index);
                if index == COUNT {
                    expected += u64::from(*visits);
                }
                if *word != expected {
                    return Err(format!("page {page} of the walk is not what was written"));
                }
            }
        }
        Ok(self.visits.len())
    }
}

/// The page is touched by the kernel alone.
fn count_by_calls(
    page: &mut Page,
    (reader, writer): &mut (PipeReader, PipeWriter),
) -> std::io::Result<()> {
    let mut count = [0; 8];
    writer.write_all(page.word_in_bytes(COUNT))?;
    reader.read_exact(&mut count)?;
    let count = u64::from_ne_bytes(count).wrapping_add(1);
    writer.write_all(&count.to_ne_bytes())?;
    reader.read_exact(page.word_in_bytes(COUNT))
}

/// The walker's whole life: says `ready`, walks, and answers `check`.
pub(crate) fn run(settings: &Settings, way: Way) -> Result<(), String> {
    let size = match way {
        Way::Directly => settings.walk,
        Way::ByCalls => settings.call,
    };
    let region = Mutex::new(Region::fill(size, way)?);
    let answer = |line: String| {
        let mut out = std::io::stdout().lock();
        out.write_all(format!("{line}\n").as_bytes())
            .and_then(|()| out.flush())
            .map_err(|error| error.to_string())
    };
    answer("ready".into())?;
    std::thread::scope(|scope| {
        scope.spawn(|| walk(&region, settings.walk_rate));
        for line in std::io::stdin().lock().lines() {
            line.map_err(|error| error.to_string())?;
            let checked = region
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .check();
            answer(match checked {
                Ok(pages) => format!("ok {pages}"),
                Err(error) => format!("bad {error}"),
            })?;
        }
        // The walk never ends; who listens to it has.
        std::process::exit(0)
    })
}

/// So many pages a second, or as many as it comes to.
fn walk(region: &Mutex<Region>, rate: u32) {
    let mut last = Instant::now();
    let mut owed = 0.0;
    loop {
        let now = Instant::now();
        // What could not be done in a tenth of a second is given up: the rate is a limit, not a debt.
        owed = f64::min(
            owed + f64::from(rate) * now.duration_since(last).as_secs_f64(),
            f64::from(rate) / 10.0,
        );
        last = now;
        if owed < f64::from(BATCH) {
            std::thread::sleep(STEP);
            continue;
        }
        let mut region = region.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..BATCH {
            if let Err(error) = region.visit_one() {
                // What was lost is found by the next check, and this says why.
                eprintln!("{error}");
                return;
            }
        }
        owed -= f64::from(BATCH);
    }
}

/// The walker, from without.
pub(crate) struct Walker {
    _process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Walker {
    /// Starts it, and waits until it walks.
    pub(crate) fn start(way: Way) -> Result<Self, String> {
        let mut process = Command::new("/proc/self/exe")
            .arg(way.name())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|error| format!("cannot start the walker: {error}"))?;
        let (Some(input), Some(output)) = (process.stdin.take(), process.stdout.take()) else {
            return Err("the walker has no pipes".into());
        };
        let mut walker = Self {
            _process: process,
            input,
            output: BufReader::new(output),
        };
        match walker.line()?.as_str() {
            "ready" => Ok(walker),
            other => Err(format!("the walker said: {other}")),
        }
    }

    fn line(&mut self) -> Result<String, String> {
        let mut line = String::new();
        match self.output.read_line(&mut line) {
            Ok(0) => Err("the walker has ended".into()),
            Ok(_) => Ok(line.trim().to_owned()),
            Err(error) => Err(format!("the walker does not answer: {error}")),
        }
    }

    /// Has it compare every page; says how many there are.
    pub(crate) fn check(&mut self) -> Result<usize, String> {
        self.input
            .write_all(b"check\n")
            .map_err(|error| format!("the walker does not listen: {error}"))?;
        let line = self.line()?;
        match line.strip_prefix("ok ").map(str::parse) {
            Some(Ok(pages)) => Ok(pages),
            _ => Err(line),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_word_and_a_lost_visit_are_found() {
        for way in [Way::Directly, Way::ByCalls] {
            let mut region = Region::fill(64 * PAGE, way).expect("memory");
            for _ in 0..500 {
                region.visit_one().expect("a visit");
            }
            assert_eq!(region.check(), Ok(64));
            region.pages[3].words()[COUNT] -= 1;
            assert!(region.check().is_err());
            region.pages[3].words()[COUNT] += 1;
            region.pages[60].words()[511] ^= 1;
            assert!(region.check().is_err());
        }
    }
}
