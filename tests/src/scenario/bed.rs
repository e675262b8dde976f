//! What scenarios start from.

use crate::Result;
use crate::guest::build;
use crate::layout::Layout;
use crate::packages::Packages;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// What all scenarios share.
#[derive(Debug)]
pub struct Bed {
    /// The work tree.
    pub layout: Layout,
    /// Debian's packages.
    pub packages: Packages,
    built: OnceLock<Built>,
}

#[derive(Debug)]
struct Built {
    programs: PathBuf,
    micro_guest: PathBuf,
}

impl Bed {
    /// On a work tree.
    pub fn new(layout: Layout, packages: Packages) -> Self {
        Self {
            layout,
            packages,
            built: OnceLock::new(),
        }
    }

    /// Gets and builds what scenarios need, so that none of their time goes into it.
    pub fn prepare(&self) -> Result<()> {
        self.packages.all()?;
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
