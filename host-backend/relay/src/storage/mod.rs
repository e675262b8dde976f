//! Which disks both hosts have, and how that is proven.

pub(crate) mod agreed;
pub(crate) mod shown;
