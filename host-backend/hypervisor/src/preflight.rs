//! What a host checks before a VM starts on it or comes to it. Everything that can be known beforehand
//! is refused beforehand: the guest is not touched yet.

use super::files::LaunchSettings;
use super::qmp::Version;
use super::{Build, Error, Result, Vm, ask_binary};
use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;
use transhume_machine::definition::{Accelerator, Backend, Disk, Format};
use transhume_machine::{Definition, Size};
use transhume_protocol::link::{Offer, OfferedDisk};

/// How long storage may take to answer.
pub(super) const TIMEOUT: Duration = Duration::from_secs(20);
/// What QEMU takes beside the guest's memory, roughly.
const OVERHEAD: Size = Size::from_bytes(64 << 20);
const MAX_FLAGS: usize = 1024;

/// What a VM needs of a host, as its source offers it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Needs {
    /// The definition as TOML, its machine type in full.
    pub definition: String,
    /// The disks' sizes as the guest sees them.
    pub disks: Vec<OfferedDisk>,
    /// The processor's features if the guest sees the host's own (`cpu = "host"`); else none.
    pub cpu_flags: Vec<String>,
}

/// Why a VM cannot run here, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// Why.
    pub cause: String,
    /// What to do.
    pub cure: String,
}

impl Refusal {
    pub(super) fn new(cause: impl Into<String>, cure: impl Into<String>) -> Self {
        Self {
            cause: cause.into(),
            cure: cure.into(),
        }
    }

    /// Storage did not answer within [`TIMEOUT`].
    pub(super) fn storage(host: &str) -> Self {
        Self::new(
            format!(
                "the storage of {host} did not answer within {} s",
                TIMEOUT.as_secs()
            ),
            "check its mounts (`findmnt`, `dmesg`)",
        )
    }
}

/// Reads the definition that a source offers.
///
/// # Errors
/// Why it is refused.
pub fn parse_offered(definition: &str) -> std::result::Result<Definition, Refusal> {
    Definition::parse(definition).map_err(|error| {
        Refusal::new(
            format!("the source's definition is refused: {error}"),
            "bring both hosts to the same version of Transhume",
        )
    })
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}; {}", self.cause, self.cure)
    }
}

impl Needs {
    /// Describes a VM that runs here.
    ///
    /// # Errors
    /// Those of QMP.
    pub async fn of(vm: &Vm) -> Result<Self> {
        let mut definition = vm.definition().clone();
        vm.machine_type().clone_into(&mut definition.machine);
        let sees_host = definition.accelerator == Accelerator::Kvm
            && matches!(
                definition.cpu_model().split(',').next(),
                Some("host" | "max")
            );
        Ok(Self {
            disks: disk_sizes(vm, &definition).await?,
            cpu_flags: if sees_host { cpu_flags() } else { Vec::new() },
            definition: definition.to_toml()?,
        })
    }
}

/// Judges whether the VM can come here. Its definition, to launch, if it can; else every reason why
/// it cannot.
///
/// # Errors
/// At least one refusal.
pub async fn check(
    offer: &Offer,
    settings: &LaunchSettings,
) -> std::result::Result<Definition, Vec<Refusal>> {
    let definition = parse_offered(&offer.definition).map_err(|refusal| vec![refusal])?;
    let mut refusals = check_here(&definition, settings, &offer.disks).await;
    refusals.extend(check_version(Version::from(offer.qemu), &definition, settings).await);
    refusals.extend(check_cpu(&offer.cpu_flags, &cpu_flags()));
    if refusals.is_empty() {
        Ok(definition)
    } else {
        Err(refusals)
    }
}

async fn check_version(
    there: Version,
    definition: &Definition,
    settings: &LaunchSettings,
) -> Option<Refusal> {
    // A QEMU that does not run at all is refused by check_here.
    let Some(here) = ask_binary::version(settings.binary(definition))
        .await
        .ok()?
    else {
        return Some(Refusal::new(
            format!("{} tells no version", settings.binary(definition).display()),
            "set `qemu` to a qemu-system-x86_64",
        ));
    };
    ((here.major, here.minor) < (there.major, there.minor)).then(|| {
        Refusal::new(
            format!(
                "QEMU is {here} on {}, and the VM runs by {there}",
                settings.host
            ),
            format!(
                "QEMU loads no state of a newer one: bring {} to QEMU {}.{} or newer",
                settings.host, there.major, there.minor
            ),
        )
    })
}

fn check_cpu(seen: &[String], here: &[String]) -> Option<Refusal> {
    let mut missing: Vec<&str> = seen
        .iter()
        .take(MAX_FLAGS)
        .filter(|flag| !here.contains(flag))
        .map(String::as_str)
        .collect();
    if missing.is_empty() {
        return None;
    }
    let number = missing.len();
    missing.truncate(8);
    Some(Refusal::new(
        format!(
            "the guest sees the processor of its host (cpu = \"host\"), and this one lacks {number} of \
             its features ({}{})",
            missing.join(" "),
            if number > missing.len() { " …" } else { "" }
        ),
        "start the VM with a CPU model that both hosts have, as in cpu = \"Skylake-Server\" \
         (`qemu-system-x86_64 -cpu help` lists them)",
    ))
}

/// The build of the QEMU that would run the VM here; `None` if it tells none.
pub async fn build_here(definition: &Definition, settings: &LaunchSettings) -> Option<Build> {
    ask_binary::build(settings.binary(definition))
        .await
        .ok()
        .flatten()
}

/// Asks this host's own QEMU what will be asked of it when a VM comes.
pub async fn look_at_qemu(settings: &LaunchSettings) {
    let asked = async {
        ask_binary::version(&settings.qemu).await?;
        ask_binary::machines(&settings.qemu).await
    };
    if let Err(error) = asked.await {
        tracing::warn!(qemu = %settings.qemu.display(), %error, "QEMU cannot be run");
    }
}

async fn disk_sizes(vm: &Vm, definition: &Definition) -> Result<Vec<OfferedDisk>> {
    let blocks = vm.qmp().execute("query-block", Value::Null).await?;
    let mut disks = Vec::new();
    for block in blocks.as_array().into_iter().flatten() {
        let Some(device) = block["qdev"].as_str() else {
            continue;
        };
        let serial = vm.qmp().qom_get(device, "serial").await?;
        let size = block["inserted"]["image"]["virtual-size"].as_u64();
        if let (Some(id), Some(size)) = (serial.as_str(), size)
            && definition.disks.iter().any(|disk| disk.id == id)
        {
            disks.push(OfferedDisk {
                id: id.to_owned(),
                size,
            });
        }
    }
    match definition
        .disks
        .iter()
        .find(|disk| disks.iter().all(|one| one.id != disk.id))
    {
        None => Ok(disks),
        Some(disk) => Err(Error::Protocol(format!(
            "query-block does not tell of disk {}",
            disk.id
        ))),
    }
}

/// Judges whether a VM can start here: every reason why it cannot. `sizes` are what the disks must be
/// large, where that is known.
pub async fn check_here(
    definition: &Definition,
    settings: &LaunchSettings,
    sizes: &[OfferedDisk],
) -> Vec<Refusal> {
    if let Err(error) = definition.check_host(&settings.host) {
        return vec![Refusal::new(error.to_string(), "then try again")];
    }
    let mut refusals = Vec::new();
    refusals.extend(check_machine(definition, settings).await);
    refusals.extend(check_name(definition, settings).await);
    let (definition, settings, sizes) = (definition.clone(), settings.clone(), sizes.to_vec());
    let host = settings.host.clone();
    // Storage over a network may not answer, and must not hold the daemon up.
    let files =
        transhume_base::task::blocking(move || check_resources(&definition, &settings, &sizes));
    match tokio::time::timeout(TIMEOUT, files).await {
        Ok(Ok(more)) => refusals.extend(more),
        Ok(Err(error)) => refusals.push(Refusal::new(
            format!("checking the disks on {host} failed: {error}"),
            "see the daemon's log",
        )),
        Err(_) => refusals.push(Refusal::storage(&host)),
    }
    refusals
}

fn check_resources(
    definition: &Definition,
    settings: &LaunchSettings,
    sizes: &[OfferedDisk],
) -> Vec<Refusal> {
    let host = &settings.host;
    let mut refusals = Vec::new();
    for disk in &definition.disks {
        let size = sizes
            .iter()
            .find(|one| one.id == disk.id)
            .map(|one| one.size);
        let path = definition.disk_path(disk, host);
        refusals.extend(check_disk(disk, path, size, host).err());
    }
    if let Some(boot) = &definition.boot {
        let files = [Some(&boot.kernel), boot.initrd.as_ref()];
        refusals.extend(
            files
                .into_iter()
                .flatten()
                .filter_map(|path| check_boot_file(path, host)),
        );
    }
    let available = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    refusals.extend(check_memory(definition.memory, &available, host));
    refusals.extend(check_accelerator(definition.accelerator, host));
    refusals.extend(definition.nics.iter().filter_map(|nic| {
        let (kind, name) = match nic.backend {
            Backend::Tap => ("tap device", nic.ifname.as_deref()?),
            Backend::Bridge => ("bridge", nic.bridge.as_deref()?),
            Backend::User => return None,
        };
        check_interface(kind, name, host)
    }));
    refusals
}

async fn check_machine(definition: &Definition, settings: &LaunchSettings) -> Option<Refusal> {
    let binary = settings.binary(definition);
    let host = &settings.host;
    let help = match ask_binary::machines(binary).await {
        Ok(help) => help,
        Err(error) => {
            return Some(Refusal::new(
                format!("cannot run QEMU ({}) on {host}: {error}", binary.display()),
                "install it there (Debian: apt install qemu-system-x86) or set `qemu` in the definition \
                 or in that host's transhumed.toml",
            ));
        }
    };
    let machine = &definition.machine;
    let known = |line: &str| line.split(' ').next() == Some(machine);
    (!help.lines().any(known)).then(|| {
        Refusal::new(
            format!("QEMU ({}) on {host} knows no machine type {machine}", binary.display()),
            format!(
                "`{} -machine help` lists what it knows: install a QEMU that has {machine}, or start the \
                 VM with a type that all hosts have",
                binary.display()
            ),
        )
    })
}

async fn check_name(definition: &Definition, settings: &LaunchSettings) -> Option<Refusal> {
    let name = &definition.name;
    let socket = settings.files(name).qmp();
    tokio::net::UnixStream::connect(&socket).await.ok()?;
    Some(Refusal::new(
        format!(
            "a QEMU for a VM named {name} runs on {} already ({})",
            settings.host,
            socket.display()
        ),
        format!("see `transhume vm show {name}` there; end it or rename one of the two"),
    ))
}

fn check_disk(
    disk: &Disk,
    path: &Path,
    size: Option<u64>,
    host: &str,
) -> std::result::Result<(), Refusal> {
    let id = &disk.id;
    let shown = path.display();
    let mut file = open_disk(path, !disk.read_only).map_err(|error| {
        let cure = match error.kind() {
            io::ErrorKind::NotFound => format!(
                "mount or create it there, or name its path on that host: [disk.on] {host} = \"/PATH\""
            ),
            io::ErrorKind::PermissionDenied => "let transhumed's user read and write it".to_owned(),
            io::ErrorKind::InvalidInput => {
                "its file system has no direct I/O (O_DIRECT), which shared disks need: put it on one \
                 that has (ext4, XFS, NFS)"
                    .to_owned()
            }
            _ => "check the storage there".to_owned(),
        };
        Refusal::new(format!("disk {id} on {host}: cannot open {shown}: {error}"), cure)
    })?;
    let unreadable = |error: io::Error| {
        Refusal::new(
            format!("disk {id} on {host}: cannot read {shown}: {error}"),
            format!("check that it is a {} image", disk.format),
        )
    };
    let here = match disk.format {
        Format::Raw => raw_size(&mut file).map_err(unreadable)?,
        Format::Qcow2 => qcow2_size(path).map_err(unreadable)?,
    };
    match size {
        // QEMU rounds a raw file up to whole sectors.
        Some(size) if here.next_multiple_of(512) != size => Err(Refusal::new(
            format!("disk {id} has {size} bytes at the source, and {shown} on {host} has {here}"),
            "the two hosts do not see the same disk: correct its path or its mount",
        )),
        _ => Ok(()),
    }
}

/// Opens as QEMU will, past the host's page cache.
fn open_disk(path: &Path, write: bool) -> io::Result<File> {
    let kind = std::fs::metadata(path)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(io::Error::other("it is neither a file nor a block device"));
    }
    OpenOptions::new()
        .read(true)
        .write(write)
        .custom_flags(OFlag::O_DIRECT.bits())
        .open(path)
}

fn raw_size(file: &mut File) -> io::Result<u64> {
    file.seek(SeekFrom::End(0))
}

/// What the guest sees of a qcow2 image, from its header.
fn qcow2_size(path: &Path) -> io::Result<u64> {
    let mut header = [0; 32];
    File::open(path)?.read_exact(&mut header)?;
    let [b'Q', b'F', b'I', 0xfb, ..] = header else {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "it does not start as qcow2 does",
        ));
    };
    let size = header[24..32]
        .iter()
        .fold(0, |size, byte| size << 8 | u64::from(*byte));
    Ok(size)
}

fn check_boot_file(path: &Path, host: &str) -> Option<Refusal> {
    // To open what is no file can do something by itself.
    let error = match std::fs::metadata(path) {
        Ok(found) if !found.is_file() => io::Error::other("it is no file"),
        Ok(_) => File::open(path).err()?,
        Err(error) => error,
    };
    Some(Refusal::new(
        format!("boot file {} on {host}: {error}", path.display()),
        "copy it there: QEMU reads it again when the guest reboots",
    ))
}

fn check_memory(wanted: Size, meminfo: &str, host: &str) -> Option<Refusal> {
    let kib = meminfo.lines().find_map(|line| {
        line.strip_prefix("MemAvailable:")?
            .trim()
            .strip_suffix(" kB")?
            .parse::<u64>()
            .ok()
    });
    // A kernel that does not tell is no reason to refuse.
    let available = kib?.saturating_mul(1024);
    let needed = wanted.bytes().saturating_add(OVERHEAD.bytes());
    (available < needed).then(|| {
        Refusal::new(
            format!(
                "{host} has {} MiB of memory available, and the VM needs {} MiB ({wanted} and {OVERHEAD} for QEMU)",
                available >> 20,
                needed >> 20
            ),
            "move or stop another VM there first",
        )
    })
}

fn check_accelerator(accelerator: Accelerator, host: &str) -> Option<Refusal> {
    if accelerator == Accelerator::Tcg {
        return None;
    }
    let error = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .err()?;
    Some(Refusal::new(
        format!("no KVM on {host}: /dev/kvm: {error}"),
        "load kvm_intel or kvm_amd, switch virtualisation on in its firmware, and let transhumed's user \
         open /dev/kvm (or start the VM with accelerator = \"tcg\", which is slow)",
    ))
}

fn check_interface(kind: &str, name: &str, host: &str) -> Option<Refusal> {
    nix::net::if_::if_nametoindex(name).err()?;
    Some(Refusal::new(
        format!("{host} has no {kind} {name}"),
        match kind {
            "bridge" => format!("make it: ip link add {name} type bridge && ip link set {name} up"),
            _ => format!("make it: ip tuntap add {name} mode tap && ip link set {name} up"),
        },
    ))
}

/// The first processor's features.
fn cpu_flags() -> Vec<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("flags"));
    let flags = line
        .and_then(|line| line.split_once(':'))
        .map_or("", |(_, flags)| flags);
    flags
        .split_whitespace()
        .take(MAX_FLAGS)
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
#[path = "preflight_tests.rs"]
mod tests;
