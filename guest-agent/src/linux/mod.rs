//! The daemon for Linux guests.

mod cache;
mod check;
mod classes;
mod clock;
mod device;
mod disks;
mod extents;
mod gate;
mod mounts;
mod pages;
mod port;
mod tree;
mod userspace;

pub use cache::{LinuxCache, Preference};
pub use check::{Summary, check};
pub use classes::{First, Group, LinuxClasses};
pub use clock::{Correction, LinuxClock};
pub use gate::LinuxGate;
pub use port::{PortPath, serve};

use nix::errno::Errno;
use std::io;
use std::path::PathBuf;
use thiserror::Error;

/// What keeps the agent from its work.
#[derive(Debug, Error)]
pub enum Error {
    /// A file of /proc, /sys or /dev cannot be used.
    #[error("cannot read {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel module's device cannot be used.
    #[error("the kernel module transhume cannot be used ({0}): install and load it")]
    Device(#[source] Errno),
    /// The kernel module speaks another ABI.
    #[error(
        "the kernel module speaks version {found} of its interface, this agent version {wanted}: \
         install both from one release"
    )]
    DeviceVersion {
        /// The module's.
        found: i32,
        /// Ours.
        wanted: i32,
    },
    /// The kernel module is older than its gate.
    #[error("the kernel module cannot put processes to sleep: install the one of this release")]
    GateUnknown,
    /// There is a gate already, or something else has the hook.
    #[error(
        "the kernel module cannot put processes to sleep: a livepatch or another tracer has replaced the \
         kernel's handling of page faults or files, or another agent is at it; the kernel's log says which"
    )]
    GateBusy,
    /// This kernel lacks something.
    #[error(
        "the kernel module cannot put processes to sleep with this kernel; the kernel's log says why"
    )]
    GateImpossible,
    /// Page frame numbers are hidden from this process.
    #[error("page frame numbers are hidden from this process: run the agent as root")]
    NoPageFrames,
    /// A call of the kernel failed.
    #[error("{call} failed: {source}")]
    Call {
        /// The call.
        call: &'static str,
        /// Why.
        source: Errno,
    },
    /// The channel to the host is gone.
    #[error("the port to the host is gone: {0}")]
    Port(#[source] Errno),
    /// There is no channel to the host.
    #[error("no virtio-serial port is named {name}: give the VM one, or name another with --port")]
    NoPort {
        /// The name that was looked for.
        name: &'static str,
    },
}

impl Error {
    fn file(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        |source| Self::File { path, source }
    }

    fn call(call: &'static str) -> impl FnOnce(Errno) -> Self {
        move |source| Self::Call { call, source }
    }
}
