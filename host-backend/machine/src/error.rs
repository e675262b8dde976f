//! What can be wrong with a definition.

/// Each message names the cause and the cure.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It is not TOML, or its fields are not those of a definition.
    #[error("the definition cannot be read: {0}")]
    Syntax(String),
    /// A field holds what it must not.
    #[error("the definition's `{field}` {cause}; {cure}")]
    Field {
        /// The field, as in `disk[1].path`.
        field: String,
        /// What is wrong with it.
        cause: String,
        /// What to write instead.
        cure: String,
    },
}

impl Error {
    pub(crate) fn field(
        field: impl Into<String>,
        cause: impl Into<String>,
        cure: impl Into<String>,
    ) -> Self {
        Self::Field {
            field: field.into(),
            cause: cause.into(),
            cure: cure.into(),
        }
    }
}
