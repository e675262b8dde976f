//! A text of bounded length, without allocation.

use core::fmt;
use transhume_protocol::agent::MAX_TEXT_LEN;

/// A text as a message of the channel carries it: what does not fit is cut.
#[derive(Debug, Clone)]
pub struct Text {
    bytes: [u8; MAX_TEXT_LEN],
    length: usize,
}

impl Default for Text {
    fn default() -> Self {
        Self::new()
    }
}

impl Text {
    /// An empty text.
    pub const fn new() -> Self {
        Self {
            bytes: [0; MAX_TEXT_LEN],
            length: 0,
        }
    }

    /// What was written.
    pub fn as_str(&self) -> &str {
        // Only whole characters are ever copied in, so this cannot fail.
        core::str::from_utf8(&self.bytes[..self.length]).unwrap_or_default()
    }

    /// Whether nothing was written.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Forgets what was written.
    pub fn clear(&mut self) {
        self.length = 0;
    }
}

impl fmt::Write for Text {
    fn write_str(&mut self, piece: &str) -> fmt::Result {
        let mut take = piece.len().min(MAX_TEXT_LEN - self.length);
        while !piece.is_char_boundary(take) {
            take -= 1;
        }
        self.bytes[self.length..self.length + take].copy_from_slice(&piece.as_bytes()[..take]);
        self.length += take;
        // After a cut nothing more may follow, or the text would lack its middle.
        if take < piece.len() {
            Err(fmt::Error)
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::fmt::Write as _;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_text_is_a_prefix_of_what_was_written(pieces in prop::collection::vec(".{0,90}", 0..6)) {
            let mut text = Text::new();
            let whole = pieces.concat();
            let _ = pieces.iter().try_for_each(|piece| text.write_str(piece));
            prop_assert!(whole.starts_with(text.as_str()));
            prop_assert!(text.as_str().len() == whole.len() || text.as_str().len() > MAX_TEXT_LEN - 4);
        }
    }
}
