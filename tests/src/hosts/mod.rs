//! Two hosts on one machine: network namespaces joined by one shaped link.
//!
//! They share the file system, which stands for shared storage: the same path is the same image on both.
//! Each has folders of its own for sockets and state.

mod boot;
pub mod daemon;
mod delay;
mod network;
mod packet;
mod sweep;
mod users;
mod wire;

pub use users::{GUEST, Users};
pub use wire::{Sample, Wire};

use crate::cleanup::{Guard, Leftover};
use crate::command::Run;
use crate::{Error, Result};
use delay::Delay;
use nix::mount::{MsFlags, mount};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The first host.
pub const HOST_A: &str = "hosta";
/// The second host.
pub const HOST_B: &str = "hostb";
/// The tap device of either host, for a guest's network card.
pub const TAP: &str = "guest0";
/// Where both keep their sockets, in a folder a run: paths of sockets must be short.
const RUN: &str = "/run";
/// Begins the names of all that a run makes outside the work tree; its process id follows.
const PREFIX: &str = "transhume-testbed-";

/// Ends what runs in a namespace, and removes it.
pub(crate) fn delete_namespace(name: &str) {
    network::delete(name);
}

/// One host.
#[derive(Debug, Clone)]
pub struct Host {
    /// `hosta` or `hostb`.
    pub name: &'static str,
    /// Its address on the link.
    pub address: &'static str,
    /// Its folder for sockets, logs and state.
    pub folder: PathBuf,
    /// What its configuration says of the other host and of VMs that come, if not that all may move.
    pub rules: Option<String>,
    /// Through how many channels its QEMUs hand memory over, if its configuration says.
    pub qemu_channels: Option<u8>,
    /// What its daemon and its QEMUs find in the place of other files: the former lies over the latter.
    pub covered: Vec<(PathBuf, PathBuf)>,
    /// Where each QEMU of a guest listens at a second monitor, named by its process.
    monitors: Option<PathBuf>,
    namespace: String,
}

impl Host {
    /// A program that will run on this host.
    pub fn run(&self, program: impl AsRef<std::ffi::OsStr>) -> Result<Run> {
        Run::new(program).in_namespace(&network::path(&self.namespace))
    }

    /// Where its daemon keeps what must survive a restart.
    pub fn state_folder(&self) -> PathBuf {
        self.folder.join("state")
    }

    /// Makes an empty folder of its own.
    pub fn empty_folder(&self, name: &str) -> Result<PathBuf> {
        let path = self.folder.join(name);
        if path.exists() {
            fs::remove_dir_all(&path).map_err(Error::file("remove", &path))?;
        }
        fs::create_dir_all(&path).map_err(Error::file("create", &path))?;
        Ok(path)
    }

    /// Has each QEMU of a guest that its daemon starts listen at a second monitor, `PROCESS.sock` in the folder that is
    /// returned; before the daemon starts.
    pub fn watch_qemus(&mut self) -> Result<PathBuf> {
        let folder = self.empty_folder("monitors")?;
        // They are users without rights.
        let all = fs::Permissions::from_mode(0o777);
        fs::set_permissions(&folder, all).map_err(Error::file("open to all", &folder))?;
        self.monitors = Some(folder.clone());
        Ok(folder)
    }

    /// What stands for this QEMU on this host.
    fn qemu(&self, qemu: &Path) -> Result<PathBuf> {
        let Some(monitors) = &self.monitors else {
            return Ok(qemu.to_owned());
        };
        let folder = self.folder.join("qemu");
        fs::create_dir_all(&folder).map_err(Error::file("create", &folder))?;
        let path = folder.join("qemu-system-x86_64");
        let (qemu, monitors) = (qemu.display(), monitors.display());
        // Those that are only asked what they can do have no name.
        let script = format!(
            "#!/bin/sh\ncase \" $* \" in\n*\" -name \"*) exec '{qemu}' \"$@\" -qmp \"unix:{monitors}/$$.sock,server=on,wait=off\" ;;\n\
             esac\nexec '{qemu}' \"$@\"\n"
        );
        let draft = path.with_extension("draft");
        let executable = fs::Permissions::from_mode(0o755);
        fs::write(&draft, script)
            .and_then(|()| fs::set_permissions(&draft, executable))
            .and_then(|()| fs::rename(&draft, &path))
            .map_err(Error::file("write", &path))?;
        Ok(path)
    }

    /// Does something from within this host, as far as its network goes: on a thread of its own.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        network::inside(&self.namespace, work)
    }

    /// The processes that run on it.
    pub fn processes(&self) -> Vec<i32> {
        network::processes(&self.namespace)
    }

    /// Counts what its end of the link carries.
    pub fn wire(&self) -> Result<Wire> {
        Wire::watch(&network::path(&self.namespace))
    }
}

/// Both hosts. All is removed when this is dropped.
#[derive(Debug)]
pub struct Hosts {
    /// Where the guest starts.
    pub a: Host,
    /// Where it moves to.
    pub b: Host,
    /// How the daemons' link is protected.
    pub link: Link,
    /// Begins the names of this run's namespaces.
    unique: String,
    /// Between them, if they are apart.
    _wire: Option<Delay>,
    /// Undone before the folders go.
    mounts: Vec<Guard>,
    _guards: Vec<Guard>,
}

/// How the daemons' link is protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// By certificates of an authority that the test makes.
    Tls,
    /// Not at all, for tests that speak to a daemon as another host would.
    Plain,
}

/// What the link carries, in Mbit/s, each way. `None` leaves it unshaped.
pub type Rate = Option<u32>;

impl Hosts {
    /// Sweeps what dead runs left, and makes two hosts.
    pub fn new(rate: Rate) -> Result<Self> {
        Self::make(rate, None)
    }

    /// Two hosts that are so far apart: every packet takes that long, each way.
    pub fn apart(rate: Rate, delay: Duration) -> Result<Self> {
        Self::make(rate, Some(delay))
    }

    fn make(rate: Rate, delay: Option<Duration>) -> Result<Self> {
        sweep::dead_runs();
        let unique = unique();
        let folder = PathBuf::from(RUN).join(&unique);
        let mut guards = Vec::new();
        let host = |name: &'static str, address| -> Result<Host> {
            let folder = folder.join(name);
            fs::create_dir_all(&folder).map_err(Error::file("create", &folder))?;
            Ok(Host {
                name,
                address,
                folder,
                rules: None,
                qemu_channels: None,
                covered: Vec::new(),
                monitors: None,
                namespace: format!("{unique}-{name}"),
            })
        };
        let a = host(HOST_A, network::ADDRESS_A)?;
        let b = host(HOST_B, network::ADDRESS_B)?;
        for host in [&a, &b] {
            guards.push(Guard::new(Leftover::Namespace(host.namespace.clone())));
            network::create(&host.namespace)?;
        }
        // The last to go: nobody must find it gone.
        guards.push(Guard::new(Leftover::Folder(folder)));
        let wire = match delay {
            None => {
                network::join(&a.namespace, &b.namespace)?;
                None
            }
            Some(delay) => {
                let wire = format!("{unique}-wire");
                guards.push(Guard::new(Leftover::Namespace(wire.clone())));
                network::create(&wire)?;
                let ends = network::join_through(&a.namespace, &b.namespace, &wire)?;
                Some(Delay::between(&wire, ends, delay)?)
            }
        };
        let hosts = Self {
            a,
            b,
            link: Link::Tls,
            unique,
            _wire: wire,
            mounts: Vec::new(),
            _guards: guards,
        };
        hosts.shape(rate)?;
        Ok(hosts)
    }

    /// Gives each daemon's state directory a small file system of its own, to be called before they start.
    pub fn limit_state(&mut self) -> Result<()> {
        for host in [&self.a, &self.b] {
            let folder = host.state_folder();
            fs::create_dir_all(&folder).map_err(Error::file("create", &folder))?;
            mount(
                Some("tmpfs"),
                &folder,
                Some("tmpfs"),
                MsFlags::empty(),
                // With all that is kept of ended migrations it is not full.
                Some("size=4m"),
            )
            .map_err(Error::system("mount a tmpfs"))?;
            self.mounts.push(Guard::new(Leftover::Mount(folder)));
        }
        Ok(())
    }

    /// Shapes the link anew.
    pub fn shape(&self, rate: Rate) -> Result<()> {
        for host in [&self.a, &self.b] {
            network::shape(&host.namespace, rate)?;
        }
        Ok(())
    }

    /// Takes the link down, or up again: what a pulled cable does.
    pub fn set_link(&self, up: bool) -> Result<()> {
        network::set_link(&self.a.namespace, up)
    }

    /// Takes the link down and breaks all connections over it.
    pub fn break_link(&self) -> Result<()> {
        self.set_link(false)?;
        for host in [&self.a, &self.b] {
            network::reset_connections(&host.namespace)?;
        }
        Ok(())
    }
}

/// Unlike any other run's, also of this process.
fn unique() -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!(
        "{PREFIX}{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    )
}
