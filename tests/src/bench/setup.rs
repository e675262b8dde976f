//! What a measurement needs, got and built before its clock starts.

use super::Profile;
use crate::Result;
use crate::guest::build;
use crate::layout::Layout;
use crate::packages::{Kernel, Packages, Qemu};
use crate::qemu::Machine;
use std::path::PathBuf;

/// All that it takes to move a guest.
#[derive(Debug, Clone)]
pub struct Setup {
    /// The guest.
    pub machine: Machine,
    /// The QEMU of both hosts.
    pub qemu: PathBuf,
    /// The folder of transhumed and transhume, for the side that uses them.
    pub programs: Option<PathBuf>,
    /// The link, in Mbit/s.
    pub rate: u32,
}

impl Setup {
    /// Gets and builds everything. `transhume` says whether that side is measured too.
    pub fn prepare(
        layout: &Layout,
        packages: &Packages,
        profile: Profile,
        version: Qemu,
        transhume: bool,
    ) -> Result<Self> {
        Ok(Self {
            machine: profile.machine(layout, packages, Kernel::V6_12)?,
            qemu: packages.qemu(version)?,
            programs: if transhume {
                Some(build::host_programs(layout)?)
            } else {
                None
            },
            rate: profile.rate,
        })
    }
}
