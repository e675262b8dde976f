//! What a QEMU binary tells of itself. Each is asked once: a start takes some 30 ms, which a migration need
//! not wait for.

use super::Build;
use super::qmp::Version;
use std::collections::HashMap;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::process::Command;

/// How long a QEMU may take to tell of itself.
const TIMEOUT: Duration = Duration::from_secs(20);
/// The most that it may tell, in bytes.
const MAX_HELP: u64 = 256 << 10;
/// Answers kept; a host has few QEMUs.
const KEPT: usize = 16;

/// A file's state, which another version of QEMU would not have.
#[derive(Debug, PartialEq, Eq, Hash)]
struct State {
    path: PathBuf,
    inode: (u64, u64),
    length: u64,
    changed: (i64, i64),
}

/// The answers to `--version` and to `-machine help`.
type Told = HashMap<(State, &'static str), String>;
static TOLD: LazyLock<Mutex<Told>> = LazyLock::new(Mutex::default);

fn state(binary: &Path) -> io::Result<State> {
    let file = std::fs::metadata(binary)?;
    Ok(State {
        path: binary.to_owned(),
        inode: (file.dev(), file.ino()),
        length: file.len(),
        changed: (file.ctime(), file.ctime_nsec()),
    })
}

/// The version; `None` if it tells none.
///
/// # Errors
/// When the binary cannot be run.
pub(super) async fn version(binary: &Path) -> io::Result<Option<Version>> {
    Ok(build(binary).await?.map(|build| build.version))
}

/// The version, and what its distribution says of it; `None` if it tells none.
///
/// # Errors
/// When the binary cannot be run.
pub(super) async fn build(binary: &Path) -> io::Result<Option<Build>> {
    let text = ask(binary, "version", &["--version"]).await?;
    Ok(parse_build(&text))
}

/// The table of machine types, as QEMU prints it: a line each, the name first.
///
/// # Errors
/// When the binary cannot be run.
pub(super) async fn machines(binary: &Path) -> io::Result<String> {
    ask(binary, "machines", &["-machine", "help"]).await
}

async fn ask(binary: &Path, question: &'static str, arguments: &[&str]) -> io::Result<String> {
    let told = || TOLD.lock().unwrap_or_else(PoisonError::into_inner);
    let key = (state(binary)?, question);
    if let Some(text) = told().get(&key) {
        return Ok(text.clone());
    }
    let text = run(binary, arguments).await?;
    let mut told = told();
    if told.len() >= KEPT {
        told.clear();
    }
    told.insert(key, text.clone());
    Ok(text)
}

async fn run(binary: &Path, arguments: &[&str]) -> io::Result<String> {
    let mut child = Command::new(binary)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let mut text = String::new();
    let read = async {
        if let Some(output) = child.stdout.take() {
            output.take(MAX_HELP).read_to_string(&mut text).await?;
        }
        Ok(text)
    };
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, "it did not answer in time");
    tokio::time::timeout(TIMEOUT, read).await.map_err(late)?
}

fn parse_build(text: &str) -> Option<Build> {
    let line = text.lines().next()?;
    let rest = line.strip_prefix("QEMU emulator version ")?;
    let (word, package) = rest.split_once(' ').unwrap_or((rest, ""));
    let mut numbers = word.split('.').map(|number| number.parse().ok());
    let package = package.strip_prefix('(').unwrap_or(package);
    let package = package.strip_suffix(')').unwrap_or(package);
    Some(Build {
        version: Version {
            major: numbers.next()??,
            minor: numbers.next()??,
            micro: numbers.next()??,
        },
        package: package.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[tokio::test]
    async fn a_binary_is_asked_once_and_a_newer_one_again() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("qemu");
        let count = folder.path().join("count");
        let install = |version: &str| {
            let new = folder.path().join(version);
            let script = format!(
                "#!/bin/sh\necho >> {}\necho 'QEMU emulator version {version} (Debian)'\n",
                count.display()
            );
            std::fs::write(&new, script).expect("written");
            let mode = std::fs::Permissions::from_mode(0o755);
            std::fs::set_permissions(&new, mode).expect("executable");
            std::fs::rename(&new, &path).expect("installed");
        };
        for told in ["7.2.22", "10.0.8"] {
            install(told);
            for _ in 0..3 {
                let build = build(&path).await.expect("it runs").expect("a version");
                assert_eq!(build.to_string(), format!("{told} (Debian)"));
            }
        }
        let asked = std::fs::read_to_string(&count).expect("counted");
        assert_eq!(asked.lines().count(), 2);
        assert!(version(&folder.path().join("none")).await.is_err());
    }
}
