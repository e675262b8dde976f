//! Whatever fails: one copy runs.

pub(crate) mod any_moment;
pub(crate) mod broken_start;
pub(crate) mod die;
pub(crate) mod random;
