//! What scenarios start from.

use crate::guest::build;
use crate::layout::Layout;
use crate::packages::Packages;
use crate::{Error, Result};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

/// What all scenarios share.
#[derive(Debug)]
pub struct Bed {
    /// The work tree.
    pub layout: Layout,
    /// Debian's packages.
    pub packages: Packages,
    /// What is drawn at random.
    pub draw: Draw,
    built: OnceLock<Built>,
}

/// What is drawn at random, and how much of it.
#[derive(Debug, Clone, Copy)]
pub struct Draw {
    /// Repeats it.
    pub seed: u64,
    /// As much as before a release.
    pub all: bool,
}

impl Draw {
    /// The environment's name of a seed: a number, or "now".
    pub const SEED: &str = "TRANSHUME_TEST_SEED";

    /// From the seed that the environment names, or else another one each time.
    pub fn new(all: bool) -> Result<Self> {
        let now = || {
            let since = SystemTime::now().duration_since(UNIX_EPOCH);
            since.map_or(0, |since| since.as_secs())
        };
        let seed = match std::env::var(Self::SEED) {
            Ok(text) if text != "now" => text
                .parse()
                .map_err(|error| Error::Check(format!("{}: {error}", Self::SEED)))?,
            _ => now(),
        };
        Ok(Self { seed, all })
    }

    /// Every other one, by the seed; all of them before a release.
    pub fn half<T>(self, of: impl IntoIterator<Item = T>) -> impl Iterator<Item = T> {
        let (skipped, step) = if self.all {
            (0, 1)
        } else {
            (usize::from(!self.seed.is_multiple_of(2)), 2)
        };
        of.into_iter().skip(skipped).step_by(step)
    }

    /// How many are drawn: some for each change, or those before a release.
    pub fn count(self, some: u64, all: u64) -> u64 {
        if self.all { all } else { some }
    }
}

#[derive(Debug)]
struct Built {
    programs: PathBuf,
    micro_guest: PathBuf,
}

impl Bed {
    /// On a work tree.
    pub fn new(layout: Layout, packages: Packages, draw: Draw) -> Self {
        Self {
            layout,
            packages,
            draw,
            built: OnceLock::new(),
        }
    }

    /// Gets what tests need.
    pub fn get(&self) -> Result<()> {
        let fetched = build::cargo()
            .folder(&self.layout.source)
            .args(["fetch", "--quiet", "--locked"])
            .args(["--target", "x86_64-unknown-linux-gnu"])
            .output();
        let cure = "Check the network, then run again";
        fetched.map_err(|error| Error::machine(format!("Cannot get crates: {error}"), cure))?;
        self.packages.for_tests()
    }

    /// Builds what all scenarios need, so that none of their time goes into it.
    pub fn prepare(&self) -> Result<()> {
        self.built().map(|_| ())
    }

    fn built(&self) -> Result<&Built> {
        if let Some(built) = self.built.get() {
            return Ok(built);
        }
        let fresh = Built {
            programs: build::host_programs(&self.layout)?,
            micro_guest: build::micro_guest(&self.layout)?,
        };
        Ok(self.built.get_or_init(|| fresh))
    }

    /// The folder of transhumed and transhume.
    pub fn programs(&self) -> Result<&Path> {
        Ok(&self.built()?.programs)
    }

    /// The micro-guest.
    pub fn micro_guest(&self) -> Result<&Path> {
        Ok(&self.built()?.micro_guest)
    }
}
