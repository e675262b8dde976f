//! What a VM's guest and its QEMU wrote: on disk, bounded, and kept when the VM moves away.
//!
//! QEMU writes both files itself, so they go on while this service does not run. Both are opened to append, and what is
//! too long is copied beside and cut off: QEMU's next byte then goes to the beginning (open(2), `O_APPEND`). What it writes
//! between the copy and the cut is lost, some bytes of a guest that floods its console.

use super::{Error, Result};
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};

/// What each line of ours begins with. A guest can write the same.
const MARK: &str = "[transhume] ";
/// Bytes and lines of QEMU's last words.
const WORDS: u64 = 2048;
const MAX_WORDS: usize = 4096;
const LINES: usize = 12;

/// The logs of one VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Logs {
    folder: PathBuf,
}

impl Logs {
    pub(super) fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// What the guest wrote to its serial console.
    pub fn serial(&self) -> PathBuf {
        self.folder.join("serial.log")
    }

    /// What QEMU wrote to its standard output and error.
    pub fn qemu(&self) -> PathBuf {
        self.folder.join("qemu.log")
    }

    /// Makes their folder, for its owner's and group's eyes only.
    pub(super) fn prepare(&self) -> Result<()> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o750)
            .create(&self.folder)
            .map_err(|error| Error::file("create", &self.folder, error))
    }

    /// Notes in both where what follows comes from. Best before QEMU has the files.
    ///
    /// # Errors
    /// [`Error::File`] if one of them cannot be written.
    pub fn note(&self, text: &str) -> Result<()> {
        self.prepare()?;
        let text = transhume_base::text::line(text, 256);
        let now = now();
        for path in [self.serial(), self.qemu()] {
            let write = || {
                let mut file = open(&path)?;
                // What was written last may have no end.
                let begins = file.metadata()?.len() == 0 || ends_in_line(&path)?;
                let end = if begins { "" } else { "\n" };
                file.write_all(format!("{end}{MARK}{now} {text}\n").as_bytes())
            };
            write().map_err(|error| Error::file("write", &path, error))?;
        }
        Ok(())
    }

    /// QEMU's log, to append to.
    pub(super) fn open_qemu(&self) -> Result<File> {
        let path = self.qemu();
        open(&path).map_err(|error| Error::file("open", path, error))
    }

    /// The guest's console, to append to.
    pub(super) fn open_serial(&self) -> Result<File> {
        let path = self.serial();
        open(&path).map_err(|error| Error::file("open", path, error))
    }

    /// Keeps each of them within `most` bytes, and as much of what was before in `NAME.1`.
    ///
    /// # Errors
    /// [`Error::File`] if one of them cannot be cut.
    pub fn bound(&self, most: u64) -> Result<()> {
        for path in [self.serial(), self.qemu()] {
            bound(&path, most).map_err(|error| Error::file("shorten", &path, error))?;
        }
        Ok(())
    }

    /// The last lines of QEMU's log, or where it is.
    pub fn tail(&self) -> String {
        self.last_words()
            .unwrap_or_else(|| format!("(nothing, in {})", self.qemu().display()))
    }

    /// The last lines that the QEMU which was started last wrote, if it said anything.
    pub fn last_words(&self) -> Option<String> {
        let tail = end_of(&self.qemu(), WORDS).unwrap_or_default();
        let text = String::from_utf8_lossy(&tail);
        let all: Vec<&str> = text.lines().collect();
        let since = all.iter().rposition(|line| line.starts_with(MARK));
        let said = &all[since.map_or(0, |mark| mark + 1)..];
        let last = said[said.len().saturating_sub(LINES)..].join("\n");
        let last = transhume_base::text::lines(&last, MAX_WORDS);
        (!last.trim().is_empty()).then_some(last)
    }
}

fn open(path: &Path) -> std::io::Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o640)
        .open(path)
}

fn end_of(path: &Path, bytes: u64) -> std::io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(bytes)))?;
    let mut end = Vec::new();
    file.take(bytes).read_to_end(&mut end)?;
    Ok(end)
}

fn ends_in_line(path: &Path) -> std::io::Result<bool> {
    Ok(end_of(path, 1)?.last() == Some(&b'\n'))
}

fn bound(path: &Path, most: u64) -> std::io::Result<()> {
    let length = match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_file() => metadata.len(),
        Ok(_) => return Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if length <= most {
        return Ok(());
    }
    let mut older = path.as_os_str().to_owned();
    older.push(".1");
    let older = PathBuf::from(older);
    let mut from = File::open(path)?;
    from.seek(SeekFrom::Start(length.saturating_sub(most)))?;
    let fresh = older.with_extension("new");
    let mut to = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o640)
        .open(&fresh)?;
    std::io::copy(&mut from.take(most), &mut to)?;
    std::fs::rename(&fresh, &older)?;
    OpenOptions::new().write(true).open(path)?.set_len(0)
}

/// As in the service's own log.
fn now() -> String {
    let mut now = String::new();
    // Writing to a text does not fail.
    let _ = SystemTime.format_time(&mut Writer::new(&mut now));
    now
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logs() -> (tempfile::TempDir, Logs) {
        let folder = tempfile::tempdir().expect("a folder");
        let logs = Logs::new(folder.path().join("web1"));
        logs.prepare().expect("a folder");
        (folder, logs)
    }

    #[test]
    fn what_is_too_long_goes_beside_and_the_writer_goes_on_at_the_beginning() {
        let (_folder, logs) = logs();
        let mut qemu = open(&logs.serial()).expect("a log");
        let read = |path: PathBuf| std::fs::read_to_string(path).expect("a log");
        let older = || read(logs.folder.join("serial.log.1"));
        qemu.write_all(&[b'a'; 100]).expect("room");
        logs.bound(100).expect("it can be cut");
        assert_eq!(read(logs.serial()).len(), 100);
        qemu.write_all(b"bb").expect("room");
        logs.bound(100).expect("it can be cut");
        assert_eq!(older(), format!("{}bb", "a".repeat(98)));
        qemu.write_all(b"cc").expect("room");
        assert_eq!(read(logs.serial()), "cc");
        // While nobody watched it may have grown without an end.
        qemu.write_all(&[b'd'; 5000]).expect("room");
        logs.bound(100).expect("it can be cut");
        assert_eq!((older(), read(logs.serial()).len()), ("d".repeat(100), 0));
        let files = std::fs::read_dir(&logs.folder).expect("a folder").count();
        assert_eq!(files, 2);
    }

    #[test]
    fn last_words_are_of_the_last_qemu_and_safe() {
        let (_folder, logs) = logs();
        assert_eq!(logs.last_words(), None);
        logs.note("starts").expect("room");
        let mut qemu = logs.open_qemu().expect("a log");
        assert_eq!(logs.last_words(), None);
        qemu.write_all(b"no such disk\x1b[2J").expect("room");
        assert_eq!(logs.last_words().as_deref(), Some("no such disk?[2J"));
        logs.note("comes\nfrom hosta").expect("room");
        assert_eq!(logs.last_words(), None);
        let text = std::fs::read_to_string(logs.qemu()).expect("a log");
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[2].starts_with(MARK) && lines[2].ends_with("comes | from hosta"));
        assert_eq!(lines.len(), 3);
    }
}
