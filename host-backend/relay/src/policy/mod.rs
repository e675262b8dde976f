//! What the source chooses from what it has seen: the mode, the pause, when to give up.

pub(crate) mod goal;
pub(crate) mod mode_choice;
