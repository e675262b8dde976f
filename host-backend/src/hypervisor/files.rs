//! Where a host keeps what belongs to a running VM.

use super::{Definition, Error, Result};
use std::path::{Path, PathBuf};

/// What a host gives every VM that it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaunchSettings {
    /// This host's name, which chooses the disks' paths.
    pub host: String,
    /// Where sockets and logs are; each VM has a folder `vms/NAME` in it.
    pub run_directory: PathBuf,
    /// The QEMU for VMs whose definition names none.
    pub qemu: PathBuf,
}

impl LaunchSettings {
    /// The run files of the VM of that name.
    pub fn files(&self, name: &str) -> RunFiles {
        RunFiles {
            folder: self.run_directory.join("vms").join(name),
        }
    }

    /// The QEMU that runs `definition` here.
    pub fn binary<'a>(&'a self, definition: &'a Definition) -> &'a Path {
        definition.qemu.as_deref().unwrap_or(&self.qemu)
    }
}

/// The run directory of one VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunFiles {
    folder: PathBuf,
}

/// The longest path that a unix socket's address holds, its closing NUL left out.
const MAX_SOCKET_PATH: usize = 107;

impl RunFiles {
    /// The folder itself.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// QEMU's QMP socket.
    pub fn qmp(&self) -> PathBuf {
        self.folder.join("qmp.sock")
    }

    /// The agent channel's socket.
    pub fn agent(&self) -> PathBuf {
        self.folder.join("agent.sock")
    }

    /// The serial console's socket.
    pub fn serial(&self) -> PathBuf {
        self.folder.join("serial.sock")
    }

    /// What the guest wrote to its serial console.
    pub fn serial_log(&self) -> PathBuf {
        self.folder.join("serial.log")
    }

    /// The screen's socket.
    pub fn vnc(&self) -> PathBuf {
        self.folder.join("vnc.sock")
    }

    /// What QEMU wrote to its standard error.
    pub fn qemu_log(&self) -> PathBuf {
        self.folder.join("qemu.log")
    }

    /// QEMU's process id.
    pub fn pid(&self) -> PathBuf {
        self.folder.join("qemu.pid")
    }

    /// Makes the folder, for its owner's and group's eyes only, and removes what an ended QEMU left.
    pub(super) fn prepare(&self) -> Result<()> {
        use std::os::unix::fs::DirBuilderExt;
        // The longest of its sockets.
        let socket = self.serial();
        if socket.as_os_str().len() > MAX_SOCKET_PATH {
            return Err(Error::Unfit {
                cause: format!(
                    "{} is longer than the {MAX_SOCKET_PATH} bytes of a unix socket's path",
                    socket.display()
                ),
                cure: "choose a shorter `run-directory` in transhumed.toml or a shorter VM name"
                    .to_owned(),
            });
        }
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o750)
            .create(&self.folder)
            .map_err(|error| Error::file("create", &self.folder, error))?;
        for path in [
            self.qmp(),
            self.agent(),
            self.serial(),
            self.vnc(),
            self.pid(),
        ] {
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::file("remove", path, error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Removes the folder with all that is in it: its VM never ran here.
    ///
    /// # Errors
    /// [`Error::File`] if something stays.
    pub fn remove(&self) -> Result<()> {
        match std::fs::remove_dir_all(&self.folder) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::file("remove", &self.folder, error))
            }
            _ => Ok(()),
        }
    }

    /// The last lines of QEMU's log, or where it is.
    pub fn log_tail(&self) -> String {
        self.last_words()
            .unwrap_or_else(|| format!("(nothing, in {})", self.qemu_log().display()))
    }

    /// The last lines of QEMU's log, if it said anything.
    pub fn last_words(&self) -> Option<String> {
        const BYTES: u64 = 2048;
        const LINES: usize = 12;
        use std::io::{Read, Seek, SeekFrom};
        let read = || -> std::io::Result<Vec<u8>> {
            let mut file = std::fs::File::open(self.qemu_log())?;
            let length = file.metadata()?.len();
            file.seek(SeekFrom::Start(length.saturating_sub(BYTES)))?;
            let mut tail = Vec::new();
            file.take(BYTES).read_to_end(&mut tail)?;
            Ok(tail)
        };
        let tail = read().unwrap_or_default();
        let text = String::from_utf8_lossy(&tail);
        let lines: Vec<&str> = text.lines().collect();
        let last = lines[lines.len().saturating_sub(LINES)..].join("\n");
        (!last.trim().is_empty()).then_some(last)
    }
}
