//! What other hosts may do, as `[incoming]` and `[hosts]` of the configuration say.

use serde::Deserialize;
use std::path::{Component, Path, PathBuf};
use transhume_base::names::is_name;
use transhume_machine::definition::Accelerator;
use transhume_machine::fields::is_interface;

/// What VMs from other hosts may use here; what is not named is refused.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Incoming {
    /// Directories that all of their files are below: disks, what qcow2 disks are based on, kernels.
    pub paths: Vec<PathBuf>,
    /// Bridges.
    pub bridges: Vec<String>,
    /// Tap devices.
    pub taps: Vec<String>,
    /// The backend `user`, by which a guest reaches what this host reaches.
    pub user_network: bool,
    /// QEMUs that a definition may name beside this host's own.
    pub qemu_binaries: Vec<PathBuf>,
    /// What may run vCPUs; KVM if nothing is said.
    pub accelerators: Vec<Accelerator>,
}

/// Another host.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Peer {
    /// Where it listens: `name-or-address:port`.
    pub address: String,
    /// Whether it may send VMs here.
    #[serde(default = "yes")]
    pub may_send: bool,
    /// Whether VMs may move from here to it.
    #[serde(default = "yes")]
    pub may_take: bool,
    /// What its VMs may use here beside what all may, as in [`Incoming`].
    #[serde(default)]
    pub paths: Vec<PathBuf>,
    /// Likewise.
    #[serde(default)]
    pub bridges: Vec<String>,
    /// Likewise.
    #[serde(default)]
    pub taps: Vec<String>,
    /// Likewise.
    #[serde(default)]
    pub user_network: bool,
    /// Likewise.
    #[serde(default)]
    pub qemu_binaries: Vec<PathBuf>,
    /// Likewise.
    #[serde(default)]
    pub accelerators: Vec<Accelerator>,
}

fn yes() -> bool {
    true
}

impl Peer {
    /// What its VMs may use beside what all may.
    pub(super) fn incoming(&self) -> Incoming {
        Incoming {
            paths: self.paths.clone(),
            bridges: self.bridges.clone(),
            taps: self.taps.clone(),
            user_network: self.user_network,
            qemu_binaries: self.qemu_binaries.clone(),
            accelerators: self.accelerators.clone(),
        }
    }

    pub(super) fn check(&self, host: &str) -> std::result::Result<(), String> {
        if !is_name(host) {
            return Err(format!(
                "`hosts` names {host:?}; a name has at most 63 of a-z, 0-9 and -, and does not start with -"
            ));
        }
        let port = self
            .address
            .rsplit_once(':')
            .filter(|(name, _)| !name.is_empty())
            .and_then(|(_, port)| port.parse::<u16>().ok());
        if port.is_none_or(|port| port == 0) {
            return Err(format!(
                "`hosts.{host}.address` is {:?}; write host:port, as in \"10.0.0.2:7465\"",
                self.address
            ));
        }
        self.incoming().check(&format!("hosts.{host}"))
    }
}

impl Incoming {
    pub(super) fn check(&self, section: &str) -> std::result::Result<(), String> {
        for (key, paths) in [
            ("paths", &self.paths),
            ("qemu-binaries", &self.qemu_binaries),
        ] {
            let is_plain = |path: &Path| {
                path.is_absolute() && !path.components().any(|part| part == Component::ParentDir)
            };
            if let Some(path) = paths.iter().find(|path| !is_plain(path)) {
                return Err(format!(
                    "`{section}.{key}` names {}; write absolute paths without ..",
                    path.display()
                ));
            }
        }
        for (key, names) in [("bridges", &self.bridges), ("taps", &self.taps)] {
            if let Some(name) = names.iter().find(|name| !is_interface(name)) {
                return Err(format!(
                    "`{section}.{key}` names {name:?}; write interfaces of 1 to 15 characters, as in \"br0\""
                ));
            }
        }
        Ok(())
    }
}
