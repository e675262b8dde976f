//! Which crate of the host side may know which (docs/decisions/0029): the compiler refuses what a manifest does not name,
//! and this what a manifest must not name.

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

/// Libraries that one room alone links, so that others do without what they cost.
const OF_ONE_ROOM: [(&str, &str); 3] = [("rustls", "link"), ("zstd", "relay"), ("rcgen", "pki")];

/// The packages that a manifest names, but for those that its tests alone need.
fn known(manifest: &str) -> BTreeSet<String> {
    let manifest: toml::Table = manifest.parse().unwrap();
    let mut tables = vec![&manifest];
    let targets = manifest.get("target").and_then(toml::Value::as_table);
    tables.extend(
        targets
            .iter()
            .flat_map(|all| all.values())
            .filter_map(toml::Value::as_table),
    );
    let mut known = BTreeSet::new();
    for table in tables {
        for kind in ["dependencies", "build-dependencies"] {
            let named = table.get(kind).and_then(toml::Value::as_table);
            for (name, value) in named.into_iter().flatten() {
                let package = value.get("package").and_then(toml::Value::as_str);
                known.insert(package.unwrap_or(name).to_owned());
            }
        }
    }
    known
}

#[test]
fn what_a_manifest_names_is_found_wherever_it_stands() {
    let manifest = "[dependencies]\na = \"1\"\nb = { package = \"c\" }\n[build-dependencies]\nd = \"1\"\n\
                    [target.'cfg(unix)'.dependencies]\ne = \"1\"\n[dev-dependencies]\nf = \"1\"\n";
    let found: Vec<String> = known(manifest).into_iter().collect();
    assert_eq!(found, ["a", "c", "d", "e"]);
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
        for package in &found[room] {
            if let Some((_, home)) = OF_ONE_ROOM.iter().find(|(name, _)| name == package) {
                assert_eq!(room, *home, "{room} must not link {package}");
            }
            let other = package.strip_prefix("transhume-");
            if let Some(other) = other.filter(|other| *other != "protocol") {
                assert!(may_know.contains(&other), "{room} must not know {other}");
            }
        }
    }
}
