//! Where a host keeps what belongs to a running VM.

use super::logs::Logs;
use super::{Definition, Error, Result};
use std::path::{Path, PathBuf};

/// What a host gives every VM that it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaunchSettings {
    /// This host's name, which chooses the disks' paths.
    pub host: String,
    /// Where sockets are; each VM has a folder `vms/NAME` in it.
    pub run_directory: PathBuf,
    /// Where logs are; each VM has a folder of its name in it.
    pub log_directory: PathBuf,
    /// The QEMU for VMs whose definition names none.
    pub qemu: PathBuf,
}

impl LaunchSettings {
    /// The run files of the VM of that name.
    pub fn files(&self, name: &str) -> RunFiles {
        RunFiles {
            folder: self.run_directory.join("vms").join(name),
            logs: self.log_directory.join(name),
        }
    }

    /// The QEMU that runs `definition` here.
    pub fn binary<'a>(&'a self, definition: &'a Definition) -> &'a Path {
        definition.qemu.as_deref().unwrap_or(&self.qemu)
    }
}

/// The run directory of one VM, and its logs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunFiles {
    folder: PathBuf,
    logs: PathBuf,
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
        self.logs.join("serial.log")
    }

    /// The screen's socket.
    pub fn vnc(&self) -> PathBuf {
        self.folder.join("vnc.sock")
    }

    /// What QEMU wrote to its standard error.
    pub fn qemu_log(&self) -> PathBuf {
        self.logs.join("qemu.log")
    }

    /// QEMU's process id.
    pub fn pid(&self) -> PathBuf {
        self.folder.join("qemu.pid")
    }

    /// Its logs, which stay when it has gone.
    pub fn logs(&self) -> Logs {
        Logs::new(self.logs.clone())
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
        self.logs().prepare()?;
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

    /// Removes the folder with all that is in it, when its VM is not here any more. The logs stay.
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
}
