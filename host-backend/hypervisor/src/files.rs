//! Where a host keeps what belongs to a running VM.

use super::logs::Logs;
use super::{Error, Result};
use std::path::{Path, PathBuf};
use transhume_base::confine::{User, give};
use transhume_machine::Definition;

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
    /// Who QEMU runs as; nobody else than we if there is none.
    pub user: Option<User>,
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

    /// Where QEMU makes the sockets that it can only be told of by a path. The rest of the folder is not QEMU's.
    pub fn qemu_folder(&self) -> PathBuf {
        self.folder.join("qemu")
    }

    /// The screen's socket.
    pub fn vnc(&self) -> PathBuf {
        self.qemu_folder().join("vnc.sock")
    }

    /// What QEMU wrote to its standard error.
    pub fn qemu_log(&self) -> PathBuf {
        self.logs.join("qemu.log")
    }

    /// QEMU's process id.
    pub fn pid(&self) -> PathBuf {
        self.folder.join("qemu.pid")
    }

    /// What is noted of its guest's clock while that is not right.
    pub fn clock_note(&self) -> PathBuf {
        self.folder.join("clock")
    }

    /// Its logs, which stay when it has gone.
    pub fn logs(&self) -> Logs {
        Logs::new(self.logs.clone())
    }

    /// Makes the folder, with one in it that is the user's, and removes what an ended QEMU left. Others get through
    /// it, and see nothing.
    pub(super) fn prepare(&self, user: Option<&User>) -> Result<()> {
        use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
        // The longest of its sockets.
        let socket = self.qemu_folder().join("resume.sock");
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
            .mode(0o711)
            .create(&self.folder)
            .and_then(|()| {
                let mode = std::fs::Permissions::from_mode(0o711);
                std::fs::set_permissions(&self.folder, mode)
            })
            .map_err(|error| Error::file("create", &self.folder, error))?;
        self.logs().prepare()?;
        let own = self.qemu_folder();
        match std::fs::remove_dir_all(&own) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::file("remove", own, error));
            }
            _ => {}
        }
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&own)
            .map_err(|error| Error::file("create", &own, error))?;
        give(&own, user).map_err(|error| Error::file("give away", &own, error))?;
        for path in [
            self.qmp(),
            self.agent(),
            self.serial(),
            self.pid(),
            self.clock_note(),
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
