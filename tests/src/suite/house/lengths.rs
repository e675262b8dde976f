//! No file of ours is longer than it may be.

use std::fs;
use std::path::{Path, PathBuf};

/// In lines.
const MOST: usize = 600;
/// Files that are longer, and why.
const LONGER: [(&str, &str); 0] = [];

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            collect(&path, files);
        } else if ["rs", "c", "h"]
            .iter()
            .any(|end| path.extension().is_some_and(|is| is == *end))
        {
            files.push(path);
        }
    }
}

#[test]
fn no_file_is_too_long() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut files = Vec::new();
    for part in [
        "benches",
        "guest-agent",
        "host-backend",
        "kernel-module",
        "protocol",
        "tests",
    ] {
        collect(&root.join(part), &mut files);
    }
    let mut longer: Vec<(String, usize)> = files
        .iter()
        .map(|path| {
            let name = path.strip_prefix(&root).unwrap().display().to_string();
            (name, fs::read_to_string(path).unwrap().lines().count())
        })
        .filter(|(name, lines)| *lines > MOST && !LONGER.iter().any(|(known, _)| known == name))
        .collect();
    longer.sort();
    assert!(longer.is_empty(), "more than {MOST} lines: {longer:?}");
}
