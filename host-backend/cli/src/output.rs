//! What goes to the standard output.

use std::io::Write as _;

/// Writes a line.
pub(crate) fn print_line(text: &str) {
    // A reader that went away (`| head`) is no error of ours.
    let _ = writeln!(std::io::stdout(), "{text}");
}
