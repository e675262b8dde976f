//! Files that documents name exist.

use std::fs;
use std::path::Path;

/// What names of files end with.
const ENDS: [&str; 6] = [".rs", ".c", ".h", ".toml", ".service", ".md"];

/// Words between backticks that look like a file in a folder.
fn named(text: &str) -> impl Iterator<Item = &str> {
    let quoted = text.split('`').skip(1).step_by(2);
    quoted.filter(|word| {
        let is_path =
            word.contains('/') && !word.starts_with('/') && !word.contains([' ', '*', '<']);
        is_path && ENDS.iter().any(|end| word.ends_with(end))
    })
}

#[test]
fn what_documents_name_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut pages = vec![root.join("README.md"), root.join("CONTRIBUTING.md")];
    for entry in fs::read_dir(root.join("docs")).unwrap() {
        let path = entry.unwrap().path();
        // Decisions tell what was so when they were taken.
        if path.extension().is_some_and(|end| end == "md") {
            pages.push(path);
        }
    }
    let mut found = 0;
    for page in pages {
        // Code may quote backticks of its own.
        let text = fs::read_to_string(&page).unwrap().replace("```", "");
        for name in named(&text) {
            let is_there = ["", "host-backend", "protocol/src"]
                .iter()
                .any(|folder| root.join(folder).join(name).exists());
            assert!(
                is_there,
                "{} names {name}, which is not there",
                page.display()
            );
            found += 1;
        }
    }
    assert!(found > 40, "{found} names");
}

#[test]
fn names_are_told_from_other_words() {
    let text = "see `a/b.rs` and `c.rs`, `cargo run x/y.rs`, `/etc/x.toml`, a/z.rs and `src/*.rs`";
    assert_eq!(named(text).collect::<Vec<_>>(), ["a/b.rs"]);
}
