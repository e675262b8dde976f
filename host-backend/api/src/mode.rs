//! How memory moves.

use serde::{Deserialize, Serialize};

/// How memory is to move.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// As `pre`, and as `post` when it shows that the goal would not be reached otherwise.
    #[default]
    Auto,
    /// All of it before the VM runs at its destination.
    Pre,
    /// Once; then the VM runs at its destination, and what it wrote meanwhile follows.
    Post,
}

impl Mode {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
    pub(crate) fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// How memory moves in a migration, and why. Never [`Mode::Auto`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Choice {
    /// How.
    pub mode: Mode,
    /// For people.
    pub why: String,
}
