//! The test bed's own ground.

pub(crate) mod apart;
pub(crate) mod missed_pages;
