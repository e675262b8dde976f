//! Which mirrors this machine uses for Debian: read from apt's own lists, in both of their formats.

use crate::{Error, Result};
use std::path::Path;

/// Where Debian comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mirrors {
    /// The archive: releases, updates, backports.
    pub(super) archive: String,
    /// The security archive.
    pub(super) security: String,
}

/// Debian's releases that a machine may run; any mirror of one also carries bookworm.
const RELEASES: [&str; 8] = [
    "bookworm",
    "trixie",
    "forky",
    "sid",
    "stable",
    "oldstable",
    "testing",
    "unstable",
];

impl Mirrors {
    /// This machine's.
    pub(super) fn of_this_machine() -> Result<Self> {
        let mut texts = Vec::new();
        let folder = Path::new("/etc/apt");
        texts.extend(read(&folder.join("sources.list")).map(|text| (false, text)));
        if let Ok(entries) = std::fs::read_dir(folder.join("sources.list.d")) {
            let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
            paths.sort();
            for path in paths {
                let stanzas = match path.extension().and_then(|extension| extension.to_str()) {
                    Some("sources") => true,
                    Some("list") => false,
                    _ => continue,
                };
                texts.extend(read(&path).map(|text| (stanzas, text)));
            }
        }
        Self::find(&texts).ok_or_else(|| {
            Error::machine(
                "No Debian mirror in /etc/apt/sources.list or /etc/apt/sources.list.d",
                "Configure apt for Debian (a main archive and its security archive) and run again",
            )
        })
    }

    /// From apt's lists; `true` marks the stanza format of `.sources` files.
    fn find(texts: &[(bool, String)]) -> Option<Self> {
        let mut archive = None;
        let mut security = None;
        for (stanzas, text) in texts {
            let entries = if *stanzas {
                stanza_entries(text)
            } else {
                line_entries(text)
            };
            for (uri, suite) in entries {
                if !uri.contains("://") && !uri.starts_with("mirror+") || uri.starts_with("cdrom:")
                {
                    continue;
                }
                let (release, part) = suite.split_once(['-', '/']).unwrap_or((&suite, ""));
                if !RELEASES.contains(&release) {
                    continue;
                }
                let slot = match part {
                    "" => &mut archive,
                    "security" => &mut security,
                    _ => continue,
                };
                slot.get_or_insert(uri);
            }
        }
        let archive = archive?;
        // A mirror laid out as Debian's own has the security archive beside the main one.
        let security =
            security.unwrap_or_else(|| format!("{}-security", archive.trim_end_matches('/')));
        Some(Self { archive, security })
    }
}

fn read(path: &Path) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

/// `deb [options] URI SUITE COMPONENT…`
fn line_entries(text: &str) -> Vec<(String, String)> {
    let mut entries = Vec::new();
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default().trim();
        let Some(rest) = line.strip_prefix("deb ") else {
            continue;
        };
        let rest = rest.trim_start();
        let rest = if rest.starts_with('[') {
            rest.split_once(']').map_or("", |(_, rest)| rest)
        } else {
            rest
        };
        let mut words = rest.split_whitespace();
        if let (Some(uri), Some(suite)) = (words.next(), words.next()) {
            entries.push((uri.to_owned(), suite.to_owned()));
        }
    }
    entries
}

/// Stanzas of `Key: value`, values going on in lines that begin with a blank.
fn stanza_entries(text: &str) -> Vec<(String, String)> {
    let mut entries = Vec::new();
    let mut stanza: Vec<(String, String)> = Vec::new();
    for line in text.lines().chain([""]) {
        if line.trim().is_empty() {
            entries.extend(of_stanza(&stanza));
            stanza.clear();
        } else if line.starts_with('#') {
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = stanza.last_mut() {
                value.push(' ');
                value.push_str(line.trim());
            }
        } else if let Some((key, value)) = line.split_once(':') {
            stanza.push((key.trim().to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
    entries
}

fn of_stanza(stanza: &[(String, String)]) -> Vec<(String, String)> {
    let field = |name: &str| {
        stanza
            .iter()
            .find(|(key, _)| key == name)
            .map_or("", |(_, value)| value.as_str())
    };
    let off = field("enabled").eq_ignore_ascii_case("no");
    if off || !field("types").split_whitespace().any(|kind| kind == "deb") {
        return Vec::new();
    }
    let uris = field("uris").split_whitespace();
    uris.flat_map(|uri| {
        field("suites")
            .split_whitespace()
            .map(move |suite| (uri.to_owned(), suite.to_owned()))
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mirrors(archive: &str, security: &str) -> Mirrors {
        Mirrors {
            archive: archive.into(),
            security: security.into(),
        }
    }

    #[test]
    fn reads_stanzas_and_skips_what_is_not_debian() {
        let text = "Types: deb\n# a note\nURIs: http://mirror.test/debian\nSuites: bookworm\n bookworm-updates\n\n\
                    Types: deb\nURIs: http://mirror.test/sec\nSuites: bookworm-security\n\n\
                    Types: deb\nURIs: http://other.test/x\nSuites: nodistro\n";
        assert_eq!(
            Mirrors::find(&[(true, text.into())]),
            Some(mirrors(
                "http://mirror.test/debian",
                "http://mirror.test/sec"
            ))
        );
    }

    #[test]
    fn reads_lines_and_takes_the_first() {
        let text = "# deb http://no.test/debian bookworm main\n\
                    deb-src http://src.test/debian bookworm main\n\
                    deb cdrom:[Debian]/ bookworm main\n\
                    deb [arch=amd64 signed-by=/k] http://a.test/debian trixie main\n\
                    deb http://b.test/debian bookworm main\n";
        assert_eq!(
            Mirrors::find(&[(false, text.into())]),
            Some(mirrors(
                "http://a.test/debian",
                "http://a.test/debian-security"
            ))
        );
    }

    #[test]
    fn a_disabled_stanza_counts_for_nothing() {
        let text = "Types: deb\nURIs: http://m.test/debian\nSuites: bookworm\nEnabled: no\n";
        assert_eq!(Mirrors::find(&[(true, text.into())]), None);
    }
}
