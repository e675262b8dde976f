//! How far a stream is in the switch to post-copy.

/// How far the stream is in the switch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Switch {
    /// The VM runs here.
    #[default]
    Before,
    /// The destination forgets pages.
    Discards,
    /// So many bytes of the package are still to come.
    Package(u32),
    /// The VM was handed over; pages follow.
    Done,
}

impl Switch {
    /// Whether pages that come now are for a VM in post-copy.
    pub(crate) fn has_begun(self) -> bool {
        self != Self::Before
    }

    /// Whether nobody runs the VM because of it.
    pub(crate) fn is_under_way(self) -> bool {
        matches!(self, Self::Discards | Self::Package(_))
    }

    /// Part of the package has come.
    pub(crate) fn came(&mut self, bytes: usize) {
        if let Self::Package(left) = self {
            *left = left.saturating_sub(u32::try_from(bytes).unwrap_or(u32::MAX));
        }
    }
}
