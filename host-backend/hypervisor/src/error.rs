//! What can go wrong between us and a hypervisor.

use std::io;
use std::path::PathBuf;
use std::time::Duration;
use transhume_base::process_identity::Outlives;

/// An error of the hypervisor's drivers. Each message names the cause and, where there is one, the cure.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A definition.
    #[error(transparent)]
    Definition(#[from] transhume_machine::Error),
    /// A file or a folder could not be used.
    #[error("cannot {action} {path}: {source}")]
    File {
        /// What was tried, as in "create".
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Nobody answers at a QMP socket.
    #[error(
        "cannot connect to QEMU at {path}: {source}; check that QEMU runs and that its \
         `-qmp unix:PATH,server=on,wait=off` names this path"
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// QEMU did not greet: a QMP socket serves one client at a time.
    #[error(
        "QEMU did not greet at {path} within {} s: another client (libvirt, a script) may hold this \
         QMP socket, which serves one at a time; close that client or give QEMU a second `-qmp`",
        waited.as_secs()
    )]
    NoGreeting {
        /// The socket.
        path: PathBuf,
        /// How long we waited.
        waited: Duration,
    },
    /// The peer does not speak QMP as it should.
    #[error("QEMU's QMP answer makes no sense: {0}")]
    Protocol(String),
    /// The connection ended.
    #[error(
        "the QMP connection to QEMU is lost ({0}); QEMU may have ended: see qemu.log in the VM's run directory"
    )]
    Lost(String),
    /// QEMU did not answer in time.
    #[error("QEMU did not answer `{command}` within {} s; it may hang: see its log, and `vm stop --force` ends it", waited.as_secs())]
    Timeout {
        /// The command.
        command: String,
        /// How long we waited.
        waited: Duration,
    },
    /// QEMU refused a command.
    #[error("QEMU refused `{command}`: {description}")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's error class, as in `GenericError`.
        class: String,
        /// QEMU's words.
        description: String,
    },
    /// QEMU ended before it answered QMP.
    #[error("QEMU ended at once ({status}); it said:\n{log}")]
    Exited {
        /// Its exit status, in words.
        status: String,
        /// The last lines of its log.
        log: String,
    },
    /// A QEMU binary that cannot be run.
    #[error(
        "cannot run QEMU ({path}): {source}; install it (Debian: apt install qemu-system-x86) or set \
         `qemu` in the definition or in transhumed.toml"
    )]
    Binary {
        /// The binary.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A running QEMU is not what its definition says.
    #[error("the running QEMU differs from the definition: {cause}; {cure}")]
    Differs {
        /// In what.
        cause: String,
        /// What to do.
        cure: String,
    },
    /// The VM could not be started as things are here.
    #[error("{cause}; {cure}")]
    Unfit {
        /// Why.
        cause: String,
        /// What to do.
        cure: String,
    },
}

impl From<Outlives> for Error {
    fn from(process: Outlives) -> Self {
        Self::Unfit {
            cause: format!("QEMU (process {}) outlives SIGKILL", process.pid),
            cure: "it hangs in the kernel, most likely on storage: see `dmesg`".to_owned(),
        }
    }
}

impl Error {
    /// That a file or a folder could not be used.
    pub fn file(action: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::File {
            action,
            path: path.into(),
            source,
        }
    }
}
