//! What becomes of a guest and of what its agent says.

pub(crate) mod clock;
pub(crate) mod ends;
pub(crate) mod lies;
pub(crate) mod linux;
