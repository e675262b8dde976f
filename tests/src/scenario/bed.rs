//! What scenarios start from.

use crate::layout::Layout;
use crate::packages::Packages;

/// What all scenarios share.
#[derive(Debug)]
pub struct Bed {
    /// The work tree.
    pub layout: Layout,
    /// Debian's packages.
    pub packages: Packages,
}
