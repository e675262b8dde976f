//! How far a guest's clock has to be ahead of this host's once it is right again, noted before the guest stands still: so it is
//! set right also by a daemon that was started anew meanwhile. The note is in the VM's run directory, which ends with
//! the VM's QEMU and with the host, as the host's clock does that is compared with.

use std::fs;
use std::io;
use std::path::PathBuf;

use crate::clock::{Known, Lead};
use transhume_base::bounded;

const VERSION: u32 = 1;
/// Its bytes at most.
const LENGTH: u64 = 128;

/// The note of one VM.
#[derive(Debug, Clone)]
pub struct ClockNote(PathBuf);

impl ClockNote {
    /// That at this path.
    pub fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// Notes it in place of what was noted. No power cut matters, which ends the VM.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&self, known: Known) -> io::Result<()> {
        let Some((lead, read_ns)) = known.parts() else {
            return Ok(());
        };
        let Lead {
            ahead_ns,
            within_ns,
        } = lead;
        let draft = self.0.with_extension("new");
        fs::write(
            &draft,
            format!("{VERSION} {ahead_ns} {within_ns} {read_ns}\n"),
        )?;
        fs::rename(&draft, &self.0)
    }

    /// What is noted, if that can be read.
    pub fn read(&self) -> Option<Known> {
        let text = bounded::read_text(&self.0, LENGTH).ok()?;
        let mut words = text.strip_suffix('\n')?.split(' ');
        if words.next()?.parse() != Ok(VERSION) {
            return None;
        }
        let lead = Lead {
            ahead_ns: words.next()?.parse().ok()?,
            within_ns: words.next()?.parse().ok()?,
        };
        let read_ns = words.next()?.parse().ok()?;
        words.next().is_none().then(|| Known::new(lead, read_ns))
    }

    /// The clock is right, or cannot be set.
    pub fn forget(&self) {
        match fs::remove_file(&self.0) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::debug!(path = %self.0.display(), %error, "a note of a guest's clock stays");
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_read_as_written_or_not_at_all() {
        let folder = tempfile::tempdir().expect("a folder");
        let note = ClockNote::new(folder.path().join("clock"));
        assert_eq!(note.read(), None);
        let lead = Lead {
            ahead_ns: -3,
            within_ns: u64::MAX,
        };
        let known = Known::new(lead, 77);
        note.write(known).expect("written");
        assert_eq!(note.read(), Some(known));
        for bad in [
            "",
            "1 2 3 4",
            "2 2 3 4\n",
            "1 2 -3 4\n",
            "1 2 3\n",
            "1 2 3 4 5\n",
        ] {
            fs::write(&note.0, bad).expect("written");
            assert_eq!(note.read(), None, "{bad}");
        }
        note.forget();
        note.forget();
        assert!(!note.0.exists());
    }
}
