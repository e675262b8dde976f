//! Texts that others wrote, made safe for terminals, logs and files.

/// Whether a character may change what stands around it: control characters, marks of writing direction, what has no
/// width, line and paragraph separators, tags and variation selectors beyond the usual (Unicode 16, categories Cc, Cf,
/// Zl and Zp).
fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            '\u{ad}'
                | '\u{600}'..='\u{605}'
                | '\u{61c}'
                | '\u{6dd}'
                | '\u{70f}'
                | '\u{890}'..='\u{891}'
                | '\u{8e2}'
                | '\u{180e}'
                | '\u{200b}'..='\u{200f}'
                | '\u{2028}'..='\u{202e}'
                | '\u{2060}'..='\u{206f}'
                | '\u{feff}'
                | '\u{fff9}'..='\u{fffb}'
                | '\u{1d173}'..='\u{1d17a}'
                | '\u{e0000}'..='\u{e0fff}'
        )
}

/// The beginning of a text, `most` bytes of it and a mark where it was cut, with `safe` in the place of each character.
fn clean(text: &str, most: usize, safe: impl Fn(char) -> char) -> String {
    let mut end = text.len().min(most);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let mut cleaned: String = text[..end].chars().map(safe).collect();
    if end < text.len() {
        cleaned.push_str(" […]");
    }
    cleaned
}

/// One line of it: its lines are joined by bars, so that none of them can pass for a line of ours.
pub fn line(text: &str, most: usize) -> String {
    let joined = clean(text.trim(), most, |c| match c {
        '\n' => '|',
        '\t' => ' ',
        c if is_unsafe(c) => '?',
        c => c,
    });
    if joined.contains('|') {
        return joined.replace('|', " | ");
    }
    joined
}

/// The same, with its lines as they are.
pub fn lines(text: &str, most: usize) -> String {
    clean(text, most, |c| match c {
        '\n' => c,
        '\t' => ' ',
        c if is_unsafe(c) => '?',
        c => c,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn nothing_gets_through(text in any::<String>(), most in 0_usize..40) {
            for cleaned in [line(&text, most), lines(&text, most)] {
                prop_assert!(!cleaned.chars().any(|c| c != '\n' && is_unsafe(c)));
                prop_assert!(cleaned.len() <= 3 * most + " […]".len());
            }
            prop_assert!(!line(&text, most).contains('\n'));
        }
    }

    #[test]
    fn what_is_plain_stays() {
        let plain = "QEMU ended: exit status 1 (größer als 4 GiB, 好)";
        assert_eq!(line(plain, 100), plain);
        assert_eq!(line("one\r\n\ttwo\n", 100), "one? |  two");
        assert_eq!(lines("one\n\u{1b}[2Jtwo\u{202e}", 100), "one\n?[2Jtwo?");
        assert_eq!(line("größer", 3), "gr […]");
    }
}
