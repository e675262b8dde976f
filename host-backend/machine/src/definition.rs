//! A VM's definition: what it is made of, and where its disks are on each host.

use crate::fields::{check_interface, check_name, check_path, check_word, parse_mac};
use crate::{Error, Result, Size};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};
use transhume_base::names::MAX_DEFINITION_LEN;

/// Disks that a definition may have: as many as there are fixed PCI slots for them.
pub const MAX_DISKS: usize = 16;
/// Network cards that a definition may have.
pub const MAX_NICS: usize = 8;
const MAX_VCPUS: u32 = 255;
const MIN_MEMORY: Size = Size::from_bytes(8 << 20);
const MAX_MEMORY: Size = Size::from_bytes(16 << 40);

/// A VM as its operator describes it, the same on every host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Definition {
    /// Its name on every host: `[a-z0-9][a-z0-9-]{0,62}`.
    pub name: String,
    /// QEMU's machine type: `q35`, `pc`, or a versioned one such as `pc-q35-7.2`.
    pub machine: String,
    /// What runs its vCPUs.
    #[serde(default)]
    pub accelerator: Accelerator,
    /// Whether it may move while it runs, by a translator that misses pages which it writes meanwhile.
    #[serde(default, skip_serializing_if = "MissedWrites::is_refuse")]
    pub missed_writes: MissedWrites,
    /// QEMU's CPU model; see [`Definition::cpu_model`] for the default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu: Option<String>,
    /// Its memory.
    pub memory: Size,
    /// Its virtual CPUs.
    pub vcpus: u32,
    /// The QEMU to run it with; else the daemon's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qemu: Option<PathBuf>,
    /// A kernel to boot; without it the firmware boots the first disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot: Option<Boot>,
    /// Where the guest's agent listens.
    #[serde(default)]
    pub agent: Agent,
    /// How people see the guest.
    #[serde(default)]
    pub console: Console,
    /// Its disks, in the order of their PCI slots.
    #[serde(default, rename = "disk", skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<Disk>,
    /// Its network cards, in the order of their PCI slots.
    #[serde(default, rename = "nic", skip_serializing_if = "Vec::is_empty")]
    pub nics: Vec<Nic>,
}

/// What runs a VM's vCPUs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Accelerator {
    /// The host's processor.
    #[default]
    Kvm,
    /// QEMU's emulation: slow, and it runs anywhere.
    Tcg,
}

/// What becomes of the move of a running VM whose QEMU is known to miss writes; see [`super::build`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MissedWrites {
    /// It is refused.
    #[default]
    Refuse,
    /// The VM may arrive damaged.
    Accept,
}

impl MissedWrites {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes it so")]
    fn is_refuse(&self) -> bool {
        *self == Self::Refuse
    }
}

impl fmt::Display for Accelerator {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        })
    }
}

/// A kernel to boot without firmware's help. Its files must be on every host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Boot {
    /// The kernel.
    pub kernel: PathBuf,
    /// Its initial RAM disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// Its command line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub append: Option<String>,
}

/// A disk on storage that every host reaches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Disk {
    /// The virtio serial, and the disk's name in the agent's report: `[a-z0-9-]{1,20}`.
    pub id: String,
    /// How its file is laid out.
    pub format: Format,
    /// Where it is on every host that `on` does not name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Whether the guest may not write to it.
    #[serde(default)]
    pub read_only: bool,
    /// Whether it takes a proof that hosts have the same storage for it.
    #[serde(default, skip_serializing_if = "Shared::is_proven")]
    pub shared: Shared,
    /// Where it is, by the host's name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub on: BTreeMap<String, PathBuf>,
}

/// What it takes to believe that a disk is the same on two hosts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Shared {
    /// A proof; see `docs/storage.md`.
    #[default]
    Proven,
    /// The operator's word, where nothing can be proved. What both hosts read is compared all the same.
    Trust,
}

impl Shared {
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes it so")]
    fn is_proven(&self) -> bool {
        *self == Self::Proven
    }
}

/// How a disk's file is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// The guest's sectors, one after the other.
    Raw,
    /// QEMU's own format.
    Qcow2,
}

impl fmt::Display for Format {
    /// As QEMU names the driver.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        })
    }
}

/// A network card.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Nic {
    /// Its address: six octets in hexadecimal, the same on every host.
    pub mac: String,
    /// What it is plugged into.
    pub backend: Backend,
    /// The tap device, with backend `tap`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ifname: Option<String>,
    /// The bridge, with backend `bridge`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bridge: Option<String>,
}

/// What a network card is plugged into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backend {
    /// A tap device that exists on every host.
    Tap,
    /// A bridge that exists on every host, through qemu-bridge-helper.
    Bridge,
    /// QEMU's own address translation. Its connections do not survive a migration.
    User,
}

/// The channel to the guest's agent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Agent {
    /// How the guest sees it.
    #[serde(default)]
    pub port: AgentPort,
}

/// How the guest sees the channel to its agent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AgentPort {
    /// The virtio-serial port `org.transhume.agent.0`.
    #[default]
    Serial,
    /// A virtio console, port 0, for guests without the multiport feature.
    Console,
    /// None: the VM migrates without its guest's help.
    None,
}

/// How people see the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Console {
    /// The first serial port, on a unix socket and in a log.
    #[serde(default = "yes")]
    pub serial: bool,
    /// A screen, served by VNC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vnc: Option<Vnc>,
}

impl Default for Console {
    fn default() -> Self {
        Self {
            serial: true,
            vnc: None,
        }
    }
}

/// Where a VM's screen is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Vnc {
    /// On a unix socket in the VM's run directory.
    Unix,
}

/// Bytes of what is said of a wrong definition, which quotes it.
const MAX_SAID: usize = 4096;

#[expect(clippy::needless_pass_by_value, reason = "for `map_err`")]
fn syntax(error: toml::de::Error) -> Error {
    Error::Syntax(transhume_base::text::lines(&error.to_string(), MAX_SAID))
}

fn yes() -> bool {
    true
}

impl Definition {
    /// Reads and checks a definition from TOML.
    ///
    /// # Errors
    /// [`Error::Syntax`] and [`Error::Field`], with cause and cure.
    pub fn parse(text: &str) -> Result<Self> {
        if text.len() > MAX_DEFINITION_LEN {
            return Err(Error::Syntax(format!(
                "it has {} bytes of text, and {MAX_DEFINITION_LEN} are the most; is this the right file?",
                text.len()
            )));
        }
        let definition: Self = toml::from_str(text).map_err(syntax)?;
        definition.validate()?;
        Ok(definition)
    }

    /// The same definition as TOML.
    ///
    /// # Errors
    /// Only for paths that are not UTF-8, which [`Definition::parse`] does not produce.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|error| Error::Syntax(error.to_string()))
    }

    /// The CPU model: `host` with KVM and `qemu64` with TCG, unless one is named.
    pub fn cpu_model(&self) -> &str {
        match (&self.cpu, self.accelerator) {
            (Some(model), _) => model,
            (None, Accelerator::Kvm) => "host",
            (None, Accelerator::Tcg) => "qemu64",
        }
    }

    /// Where `disk` is on `host`; empty if the definition does not say, which
    /// [`Definition::check_host`] refuses.
    pub fn disk_path<'a>(&self, disk: &'a Disk, host: &str) -> &'a Path {
        disk.on
            .get(host)
            .or(disk.path.as_ref())
            .map_or(Path::new(""), PathBuf::as_path)
    }

    /// Checks that every disk has a place on `host`.
    ///
    /// # Errors
    /// [`Error::Field`] for the first disk that has none.
    pub fn check_host(&self, host: &str) -> Result<()> {
        let lost = |disk: &&Disk| self.disk_path(disk, host).as_os_str().is_empty();
        match self.disks.iter().find(lost) {
            None => Ok(()),
            Some(disk) => Err(Error::field(
                format!("disk {}", disk.id),
                format!("has no path on host {host}"),
                format!("add `{host} = \"/PATH\"` to its [disk.on], or a `path` for all hosts"),
            )),
        }
    }

    /// Checks everything that TOML's types do not.
    ///
    /// # Errors
    /// [`Error::Field`] for the first field that is wrong.
    pub fn validate(&self) -> Result<()> {
        check_name("name", &self.name)?;
        check_word("machine", &self.machine, "._-", "q35")?;
        if let Some(cpu) = &self.cpu {
            check_word("cpu", cpu, "._,=+-", "host")?;
        }
        self.validate_size()?;
        if let Some(qemu) = &self.qemu {
            check_path("qemu", qemu)?;
        }
        if let Some(boot) = &self.boot {
            boot.validate()?;
        }
        self.validate_disks()?;
        self.validate_nics()
    }

    fn validate_size(&self) -> Result<()> {
        let memory = self.memory;
        if memory < MIN_MEMORY || memory > MAX_MEMORY {
            return Err(Error::field(
                "memory",
                format!("is {memory}"),
                format!("write a size from {MIN_MEMORY} to {MAX_MEMORY}"),
            ));
        }
        // QEMU rounds to this (`set_memory_options` in its system/vl.c).
        if !memory.bytes().is_multiple_of(8 << 10) {
            return Err(Error::field(
                "memory",
                format!("is {memory}, which is no multiple of 8KiB"),
                "round it to whole MiB",
            ));
        }
        if !(1..=MAX_VCPUS).contains(&self.vcpus) {
            return Err(Error::field(
                "vcpus",
                format!("is {}", self.vcpus),
                format!("write a number from 1 to {MAX_VCPUS}"),
            ));
        }
        Ok(())
    }

    fn validate_disks(&self) -> Result<()> {
        if self.disks.len() > MAX_DISKS {
            return Err(Error::field(
                "disk",
                format!("names {} disks", self.disks.len()),
                format!("{MAX_DISKS} are the most; leave some out"),
            ));
        }
        let mut ids = HashSet::new();
        for (index, disk) in self.disks.iter().enumerate() {
            disk.validate(&format!("disk[{index}]"))?;
            if !ids.insert(&disk.id) {
                return Err(Error::field(
                    format!("disk[{index}].id"),
                    format!("is \"{}\", as another disk's", disk.id),
                    "give each disk an id of its own",
                ));
            }
        }
        Ok(())
    }

    fn validate_nics(&self) -> Result<()> {
        if self.nics.len() > MAX_NICS {
            return Err(Error::field(
                "nic",
                format!("names {} network cards", self.nics.len()),
                format!("{MAX_NICS} are the most; leave some out"),
            ));
        }
        let mut macs = HashSet::new();
        for (index, nic) in self.nics.iter().enumerate() {
            nic.validate(&format!("nic[{index}]"))?;
            if !macs.insert(nic.mac.to_ascii_lowercase()) {
                return Err(Error::field(
                    format!("nic[{index}].mac"),
                    format!("is {}, as another card's", nic.mac),
                    "give each card an address of its own",
                ));
            }
        }
        Ok(())
    }
}

impl Boot {
    fn validate(&self) -> Result<()> {
        check_path("boot.kernel", &self.kernel)?;
        if let Some(initrd) = &self.initrd {
            check_path("boot.initrd", initrd)?;
            // QEMU's multiboot loader takes what follows for another file.
            if initrd.as_os_str().as_encoded_bytes().contains(&b',') {
                return Err(Error::field(
                    "boot.initrd",
                    format!(
                        "is {}, and QEMU splits this path at its comma",
                        initrd.display()
                    ),
                    "rename the file or its folder",
                ));
            }
        }
        if let Some(append) = &self.append
            && (append.len() > 2048 || append.chars().any(char::is_control))
        {
            return Err(Error::field(
                "boot.append",
                "is no kernel command line",
                "write one line of at most 2048 bytes",
            ));
        }
        Ok(())
    }
}

impl Disk {
    fn validate(&self, field: &str) -> Result<()> {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if !(1..=20).contains(&self.id.len()) || !self.id.bytes().all(plain) {
            return Err(Error::field(
                format!("{field}.id"),
                format!("is {:?}", self.id),
                "write 1 to 20 of a-z, 0-9 and -, as in \"root\"",
            ));
        }
        match &self.path {
            Some(path) => check_path(&format!("{field}.path"), path)?,
            None if self.on.is_empty() => {
                return Err(Error::field(
                    format!("{field}.path"),
                    "is missing",
                    "write where the disk is, or a table [disk.on] with its path by host",
                ));
            }
            None => {}
        }
        for (host, path) in &self.on {
            check_name(&format!("{field}.on"), host)?;
            check_path(&format!("{field}.on.{host}"), path)?;
        }
        Ok(())
    }
}

impl Nic {
    fn validate(&self, field: &str) -> Result<()> {
        let Some(octets) = parse_mac(&self.mac) else {
            return Err(Error::field(
                format!("{field}.mac"),
                format!("is {:?}", self.mac),
                "write six octets in hexadecimal, as in \"52:54:00:12:34:56\"",
            ));
        };
        if octets[0] & 1 != 0 || octets == [0; 6] {
            return Err(Error::field(
                format!("{field}.mac"),
                format!("is {}, a group's address or none", self.mac),
                "write a card's own address, as in \"52:54:00:12:34:56\"",
            ));
        }
        let mut wanted = [
            ("ifname", &self.ifname, false),
            ("bridge", &self.bridge, false),
        ];
        match self.backend {
            Backend::Tap => wanted[0].2 = true,
            Backend::Bridge => wanted[1].2 = true,
            Backend::User => {}
        }
        for (key, value, needed) in wanted {
            match value {
                Some(name) if needed => check_interface(&format!("{field}.{key}"), name)?,
                None if !needed => {}
                Some(_) => {
                    return Err(Error::field(
                        format!("{field}.{key}"),
                        "has no meaning for this backend",
                        "leave it out, or change `backend`",
                    ));
                }
                None => {
                    return Err(Error::field(
                        format!("{field}.{key}"),
                        "is missing",
                        format!(
                            "name the {key} that the card is plugged into, as it is called on every host"
                        ),
                    ));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "definition_tests.rs"]
mod tests;
