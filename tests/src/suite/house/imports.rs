//! Which folder of the relay may know which (docs/decisions/0030), and that no files name each other in a circle.

use super::sources::{self, Module, Named};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Folders of the relay, each with those that it may know.
const FOLDERS: [(&str, &[&str]); 7] = [
    ("policy", &[]),
    ("storage", &[]),
    ("send", &["policy", "storage"]),
    ("receive", &["storage"]),
    ("qemu", &["policy", "receive", "send"]),
    ("source", &["policy", "qemu", "send", "storage"]),
    ("destination", &["qemu", "receive", "storage"]),
];
/// Those that name no hypervisor.
const NEUTRAL: [&str; 4] = ["policy", "receive", "send", "storage"];
/// What names one: the beginning of a path.
const HYPERVISORS: [&str; 2] = ["transhume_hypervisor", "transhume_protocol::qemu"];

/// Files that name each other: a type in the one, and what it is made of or read by in the other.
const CIRCLES: [(&str, &[&str]); 0] = [];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

#[test]
fn no_folder_of_the_relay_knows_what_it_must_not() {
    for (module, named) in sources::of(&root().join("host-backend/relay/src")) {
        let Some(folder) = module.first() else {
            continue;
        };
        let may_know = FOLDERS.iter().find(|(name, _)| name == folder);
        let name = module.join("::");
        for other in &named.modules {
            let is_folder = FOLDERS.iter().any(|(folder, _)| *folder == other[0]);
            let may = may_know.is_some_and(|(_, known)| known.contains(&other[0].as_str()));
            assert!(
                !is_folder || other[0] == *folder || may,
                "{name} must not name {}",
                other.join("::")
            );
        }
        if NEUTRAL.contains(&folder.as_str()) {
            assert!(
                !named.modules.contains(&vec!["moved_guest".to_owned()]),
                "{name} must not name moved_guest"
            );
            for path in &named.elsewhere {
                let path = path.join("::");
                let wrong = HYPERVISORS.iter().any(|begin| path.starts_with(begin));
                assert!(!wrong, "{name} must not name {path}");
            }
        }
    }
}

/// The modules that are in circles, or between two of them.
fn circles(mut files: BTreeMap<Module, Named>) -> Vec<String> {
    loop {
        let before = files.len();
        let known: Vec<Module> = files.keys().cloned().collect();
        // A module and those within it are one thing.
        let counts = |this: &Module, other: &Module| {
            known.contains(other) && !this.starts_with(other) && !other.starts_with(this)
        };
        let ends: Vec<Module> = files
            .iter()
            .filter(|(this, named)| !named.modules.iter().any(|other| counts(this, other)))
            .map(|(this, _)| this.clone())
            .collect();
        let named: Vec<&Module> = files
            .iter()
            .flat_map(|(this, named)| named.modules.iter().filter(|other| counts(this, other)))
            .collect();
        let begins: Vec<Module> = files
            .keys()
            .filter(|this| !named.contains(this))
            .cloned()
            .collect();
        for this in ends.iter().chain(&begins) {
            files.remove(this);
        }
        if files.len() == before {
            return files.keys().map(|module| module.join("::")).collect();
        }
    }
}

#[test]
fn no_files_name_each_other_in_a_circle() {
    let host = root().join("host-backend");
    for entry in std::fs::read_dir(host).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.join("src").is_dir() {
            let allowed = CIRCLES.iter().find(|(room, _)| *room == name);
            let allowed = allowed.map_or(&[][..], |(_, files)| *files);
            assert_eq!(
                circles(sources::of(&path.join("src"))),
                allowed,
                "in {name}"
            );
        }
    }
}

#[test]
fn a_circle_is_found() {
    let module = |name: &str| vec![name.to_owned()];
    let names = |others: &[&str]| Named {
        modules: others.iter().map(|name| module(name)).collect(),
        ..Named::default()
    };
    let files = [
        ("a", names(&["b"])),
        ("b", names(&["c", "d"])),
        ("c", names(&["b"])),
        ("d", names(&[])),
    ];
    let files = files.map(|(name, named)| (module(name), named));
    assert_eq!(circles(files.into()), ["b", "c"]);
}
