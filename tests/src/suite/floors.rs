//! Which room of the host side may know which (docs/decisions/0029): the compiler refuses what a manifest does not name, and
//! this what a manifest must not name.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// Rooms, each with those that it may know beside `protocol`. One that may know another need not.
const ROOMS: [(&str, &[&str]); 13] = [
    ("api", &["base"]),
    ("base", &[]),
    ("cli", &["api", "base", "pki"]),
    (
        "control",
        &[
            "api",
            "base",
            "hypervisor",
            "link",
            "machine",
            "pki",
            "relay",
        ],
    ),
    ("guest", &["base", "pages"]),
    ("hypervisor", &["base", "machine"]),
    ("link", &["base"]),
    ("machine", &["base"]),
    ("pages", &[]),
    ("pki", &["base"]),
    (
        "relay",
        &[
            "api",
            "base",
            "guest",
            "hypervisor",
            "link",
            "machine",
            "pages",
            "volume",
        ],
    ),
    ("testing", &[]),
    ("volume", &["base", "machine", "pages"]),
];

/// The rooms that a manifest names, but for those that its tests alone need.
fn known(manifest: &str) -> BTreeSet<String> {
    let manifest: toml::Table = manifest.parse().unwrap();
    let dependencies = manifest["dependencies"].as_table().unwrap();
    let rooms = dependencies
        .keys()
        .filter_map(|name| name.strip_prefix("transhume-"));
    rooms
        .filter(|name| *name != "protocol")
        .map(str::to_owned)
        .collect()
}

#[test]
fn no_room_knows_what_it_must_not() {
    let host = Path::new(env!("CARGO_MANIFEST_DIR")).join("../host-backend");
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(host).unwrap() {
        let path = entry.unwrap().path();
        if let Ok(manifest) = fs::read_to_string(path.join("Cargo.toml")) {
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            found.insert(name, known(&manifest));
        }
    }
    let rooms: Vec<&str> = found.keys().map(String::as_str).collect();
    assert_eq!(rooms, ROOMS.map(|(room, _)| room));
    for (room, may_know) in ROOMS {
        for other in &found[room] {
            assert!(
                may_know.contains(&other.as_str()),
                "{room} must not know {other}"
            );
        }
    }
}
