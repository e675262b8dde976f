//! All of a guest's memory moves before it runs elsewhere.

pub(crate) mod channels;
pub(crate) mod choice;
pub(crate) mod converge;
pub(crate) mod migrate;
