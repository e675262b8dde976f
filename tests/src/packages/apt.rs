//! apt, kept apart from this machine's: its own lists, state, archives and configuration.

use super::Recipe;
use super::sources::Mirrors;
use crate::command::Run;
use crate::layout::{Layout, write_whole};
use crate::progress::{say, step};
use crate::{Error, Result};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const CURE: &str =
    "Check the network and apt's mirror (`apt-get update` must work), then run again";

/// The releases whose lists were fetched: once a run, and only by a run that needs something.
static UPDATED: Mutex<Vec<&str>> = Mutex::new(Vec::new());

/// apt with a configuration of ours, for one release of Debian.
pub(super) struct Apt {
    release: &'static str,
    folder: PathBuf,
    archives: PathBuf,
}

/// A package of a closure: its archive's name, and its size in bytes.
struct Package {
    archive: String,
    size: u64,
}

impl Package {
    /// `NAME=VERSION`, as apt takes it. Archives are called `NAME_VERSION_ARCHITECTURE.deb`, with the
    /// colon of an epoch escaped.
    fn pinned(&self) -> Option<String> {
        let mut parts = self.archive.split('_');
        let (name, version) = (parts.next()?, parts.next()?);
        Some(format!("{name}={}", version.replace("%3a", ":")))
    }
}

impl Apt {
    /// Writes the configuration.
    pub(super) fn prepare(layout: &Layout, release: &'static str) -> Result<Self> {
        if !Path::new(KEYRING).exists() {
            return Err(Error::machine(
                format!("{KEYRING} is missing, so packages cannot be checked"),
                "Install the package debian-archive-keyring; the test bed runs on Debian",
            ));
        }
        let folder = PathBuf::from("apt").join(release);
        for part in [
            "lists/partial",
            "cache/archives/partial",
            "cache/none/partial",
        ] {
            layout.folder(folder.join(part))?;
        }
        let folder = layout.folder(&folder)?;
        let archives = folder.join("cache/archives");
        let Mirrors { archive, security } = Mirrors::of_this_machine()?;
        let list: String = [
            (&archive, ""),
            (&archive, "-updates"),
            (&archive, "-backports"),
            (&security, "-security"),
        ]
        .map(|(uri, part)| format!("deb [signed-by={KEYRING}] {uri} {release}{part} main\n"))
        .concat();
        write_whole(&folder.join("sources.list"), list.as_bytes())?;
        // No package counts as installed, so a closure is whole.
        write_whole(&folder.join("status"), b"")?;
        let path = folder.display();
        // Read after the system's own, which may name a proxy; its hooks are for its own cache.
        let configuration = format!(
            "#clear APT::Update::Pre-Invoke;\n#clear APT::Update::Post-Invoke;\n\
             #clear APT::Update::Post-Invoke-Success;\n#clear DPkg::Post-Invoke;\n\
             Dir::Etc::sourcelist \"{path}/sources.list\";\nDir::Etc::sourceparts \"/dev/null\";\n\
             Dir::Etc::preferences \"/dev/null\";\nDir::Etc::preferencesparts \"/dev/null\";\n\
             Dir::State \"{path}\";\nDir::State::status \"{path}/status\";\n\
             Dir::State::lists \"{path}/lists\";\nDir::Cache \"{path}/cache\";\n\
             Dir::Cache::archives \"{path}/cache/archives\";\n\
             APT::Sandbox::User \"root\";\nAPT::Install-Recommends \"false\";\n\
             APT::Architecture \"amd64\";\nAPT::Architectures {{ \"amd64\"; }};\n\
             Acquire::Languages \"none\";\nAcquire::Retries \"3\";\nDebug::NoLocking \"true\";\n"
        );
        write_whole(&folder.join("apt.conf"), configuration.as_bytes())?;
        Ok(Self {
            release,
            folder,
            archives,
        })
    }

    fn apt_get(&self) -> Run {
        Run::new("apt-get")
            .arg("-c")
            .arg(self.folder.join("apt.conf"))
            .cure(CURE)
    }

    fn update(&self) -> Result<()> {
        let mut updated = UPDATED.lock().unwrap_or_else(PoisonError::into_inner);
        if updated.contains(&self.release) {
            return Ok(());
        }
        updated.push(self.release);
        step("Reading Debian's package lists", || {
            // "Error-Mode=any": without it a suite that cannot be had is only a warning.
            self.apt_get()
                .args(["update", "-q", "-o", "APT::Update::Error-Mode=any"])
                .output()
        })?;
        Ok(())
    }

    /// Downloads a recipe's closure, and returns its archives.
    pub(super) fn download(&self, recipe: &Recipe) -> Result<Vec<PathBuf>> {
        self.update()?;
        let packages = self.closure(recipe)?;
        let missing: Vec<&Package> = packages
            .iter()
            .filter(|package| {
                let size =
                    fs::metadata(self.archives.join(&package.archive)).map(|data| data.len());
                size.ok() != Some(package.size)
            })
            .collect();
        if !missing.is_empty() {
            let bytes: u64 = missing.iter().map(|package| package.size).sum();
            let what = format!(
                "Downloading {} ({} packages, {} MB)",
                recipe.title,
                missing.len(),
                bytes / 1_000_000
            );
            step(&what, || self.fetch(&missing))?;
        }
        Ok(packages
            .iter()
            .map(|package| self.archives.join(&package.archive))
            .collect())
    }

    /// Into a folder of this run first: an archive under its final name is whole and was checked.
    fn fetch(&self, packages: &[&Package]) -> Result<()> {
        let draft = self.folder.join(format!("download-{}", std::process::id()));
        fs::create_dir_all(&draft).map_err(Error::file("create", &draft))?;
        let pins = packages.iter().filter_map(|package| package.pinned());
        let result = self
            .apt_get()
            .folder(&draft)
            .args(["download", "-q"])
            .args(pins)
            .output();
        if result.is_ok() {
            for package in packages {
                let from = draft.join(&package.archive);
                fs::rename(&from, self.archives.join(&package.archive))
                    .map_err(Error::file("keep", &from))?;
            }
        }
        if fs::remove_dir_all(&draft).is_err() {
            say(format!("cannot remove {}", draft.display()));
        }
        result.map(drop)
    }

    /// What a recipe needs, as apt resolves it with nothing installed.
    fn closure(&self, recipe: &Recipe) -> Result<Vec<Package>> {
        // apt leaves out what is in its archives already, so it is shown none.
        let empty = format!(
            "Dir::Cache::archives={}",
            self.folder.join("cache/none").display()
        );
        let mut run = self
            .apt_get()
            .args(["install", "--print-uris", "-qq", "-y", "-o", &empty]);
        if let Some(suite) = recipe.preferred() {
            run = run.args(["-t", suite]);
        }
        let text = run.args(recipe.packages).text()?;
        let packages: Vec<Package> = text.lines().filter_map(parse_uri_line).collect();
        let kept: Vec<Package> = packages
            .into_iter()
            .filter(|package| {
                recipe.keep.is_empty()
                    || recipe
                        .keep
                        .iter()
                        .any(|prefix| package.archive.starts_with(prefix))
            })
            .collect();
        if kept.is_empty() {
            return Err(Error::machine(
                format!("apt names no archive for {}", recipe.packages.join(", ")),
                "Remove target/testbed/apt and run again",
            ));
        }
        Ok(kept)
    }
}

/// `'URI' ARCHIVE SIZE HASH`
fn parse_uri_line(line: &str) -> Option<Package> {
    let mut words = line.split_whitespace();
    let uri = words.next()?;
    let archive = words.next()?;
    let size = words.next()?.parse().ok()?;
    let named = uri.starts_with('\'')
        && Path::new(archive)
            .extension()
            .is_some_and(|extension| extension == "deb")
        && !archive.contains('/');
    named.then(|| Package {
        archive: archive.to_owned(),
        size,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_names_its_package_and_version() {
        let line = "'http://m.test/q.deb' qemu-utils_1%3a10.0.2+ds-2_amd64.deb 1917864 SHA256:00";
        let package = parse_uri_line(line).expect("a package");
        assert_eq!(
            package.pinned().as_deref(),
            Some("qemu-utils=1:10.0.2+ds-2")
        );
        assert_eq!(package.size, 1_917_864);
    }

    #[test]
    fn other_lines_are_passed_over() {
        assert!(parse_uri_line("Reading package lists...").is_none());
        assert!(parse_uri_line("'http://m.test/q.deb' ../q.deb 1 SHA256:00").is_none());
    }
}
