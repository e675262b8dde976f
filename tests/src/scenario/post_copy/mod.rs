//! A guest runs elsewhere while part of its memory is still to come.

pub(crate) mod gate;
pub(crate) mod hand_over;
pub(crate) mod moves;
pub(crate) mod order;
pub(crate) mod stress;
