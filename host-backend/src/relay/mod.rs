//! The two ends of a memory migration, and the phases that they share.

pub mod progress;
