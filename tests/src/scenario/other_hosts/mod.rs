//! What other hosts may do, and what they try.

pub(crate) mod confined;
pub(crate) mod false_source;
pub(crate) mod flood;
pub(crate) mod peers;
pub(crate) mod strangers;
