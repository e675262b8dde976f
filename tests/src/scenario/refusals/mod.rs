//! What cannot work is refused before the guest is touched.

pub(crate) mod hosts;
pub(crate) mod storage;
