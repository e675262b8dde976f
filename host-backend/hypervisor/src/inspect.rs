//! Whether a running QEMU is the machine that a definition describes. A VM whose definition is wrong
//! would be given a different machine at its destination, which cannot load its state.

use super::command_line::{self, AGENT_PORT, PciDevice};
use super::{Error, Qmp, Result};
use serde::Deserialize;
use serde_json::Value;
use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use transhume_machine::Definition;
use transhume_machine::definition::AgentPort;

/// Where QEMU keeps the devices of its command line, with and without an id.
const PERIPHERALS: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];

/// Checks machine type, accelerator, memory, vCPUs, disks and PCI devices; returns the machine type in
/// full.
pub(super) async fn check(qmp: &Qmp, definition: &Definition, host: &str) -> Result<String> {
    let machine = check_machine(qmp, definition).await?;
    check_accelerator(qmp, definition).await?;
    check_size(qmp, definition).await?;
    check_disks(qmp, definition, host).await?;
    check_pci(qmp, definition).await?;
    Ok(machine)
}

fn differs(cause: impl Into<String>, cure: impl Into<String>) -> Error {
    Error::Differs {
        cause: cause.into(),
        cure: cure.into(),
    }
}

async fn check_machine(qmp: &Qmp, definition: &Definition) -> Result<String> {
    let runs = qmp.machine_type().await?;
    let asked = &definition.machine;
    let machines = qmp.machines().await?;
    let same = *asked == runs
        || machines
            .iter()
            .any(|one| one.name == runs && one.alias.as_ref() == Some(asked));
    if same {
        return Ok(runs);
    }
    Err(differs(
        format!("it is a {runs}, and `machine` says {asked}"),
        format!("write machine = \"{runs}\""),
    ))
}

async fn check_accelerator(qmp: &Qmp, definition: &Definition) -> Result<()> {
    let runs = qmp.accelerator().await?;
    if runs == definition.accelerator {
        return Ok(());
    }
    Err(differs(
        format!(
            "it runs by {runs}, and `accelerator` says {}",
            definition.accelerator
        ),
        format!("write accelerator = \"{runs}\""),
    ))
}

async fn check_size(qmp: &Qmp, definition: &Definition) -> Result<()> {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Memory {
        base_memory: u64,
        #[serde(default)]
        plugged_memory: u64,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Cpu {
        qom_path: String,
    }
    let memory: Memory = qmp.query("query-memory-size-summary", Value::Null).await?;
    if memory.plugged_memory != 0 {
        return Err(differs(
            format!(
                "{} of its memory were plugged in",
                transhume_machine::Size::from_bytes(memory.plugged_memory)
            ),
            "definitions have no such memory: unplug it first",
        ));
    }
    if memory.base_memory != definition.memory.bytes() {
        let runs = transhume_machine::Size::from_bytes(memory.base_memory);
        return Err(differs(
            format!(
                "it has {runs} of memory, and `memory` says {}",
                definition.memory
            ),
            format!("write memory = \"{runs}\""),
        ));
    }
    let cpus: Vec<Cpu> = qmp.query("query-cpus-fast", Value::Null).await?;
    if u32::try_from(cpus.len()) != Ok(definition.vcpus) {
        return Err(differs(
            format!(
                "it has {} vCPUs, and `vcpus` says {}",
                cpus.len(),
                definition.vcpus
            ),
            format!("write vcpus = {}", cpus.len()),
        ));
    }
    let Some(cpu) = cpus.first() else {
        return Ok(());
    };
    let kind = qmp.qom_get(&cpu.qom_path, "type").await?;
    let runs = kind
        .as_str()
        .and_then(|kind| kind.strip_suffix("-x86_64-cpu"))
        .unwrap_or("?");
    let asked = definition.cpu_model().split(',').next().unwrap_or_default();
    if runs == asked {
        return Ok(());
    }
    Err(differs(
        format!("its CPU model is {runs}, and `cpu` says {asked}"),
        format!("write cpu = \"{runs}\", with the features that its -cpu names"),
    ))
}

/// An entry of `query-block`.
#[derive(Deserialize)]
struct Block {
    #[serde(default)]
    device: String,
    qdev: Option<String>,
    inserted: Option<Inserted>,
}

#[derive(Deserialize)]
struct Inserted {
    drv: String,
    ro: bool,
    image: Image,
    cache: Cache,
}

#[derive(Deserialize)]
struct Image {
    filename: PathBuf,
}

#[derive(Deserialize)]
struct Cache {
    direct: bool,
}

async fn check_disks(qmp: &Qmp, definition: &Definition, host: &str) -> Result<()> {
    let blocks: Vec<Block> = qmp.query("query-block", Value::Null).await?;
    let mut found = Vec::new();
    let handed = handed_files(qmp).await?;
    for block in &blocks {
        let qdev = block.qdev.as_deref().unwrap_or_default();
        let serial = match qdev {
            "" => String::new(),
            path => match qmp.qom_get(path, "serial").await {
                Ok(serial) => serial.as_str().unwrap_or_default().to_owned(),
                // A device without serials: a floppy, a pflash.
                Err(Error::Refused { .. }) => String::new(),
                Err(error) => return Err(error),
            },
        };
        let Some(disk) = definition.disks.iter().find(|disk| disk.id == serial) else {
            let name = if qdev.is_empty() { &block.device } else { qdev };
            return Err(differs(
                format!(
                    "it has the disk {name} with serial \"{serial}\", which no [[disk]] has as its id"
                ),
                "add it with that id, or start QEMU with serial=ID (and with -nodefaults, which leaves out \
                 the CD drive that nobody asked for)",
            ));
        };
        let Some(inserted) = &block.inserted else {
            return Err(differs(
                format!("its disk {serial} has no medium"),
                "insert one, or leave the disk out of both",
            ));
        };
        check_disk(inserted, disk, definition.disk_path(disk, host), &handed)?;
        found.push(serial);
    }
    match definition
        .disks
        .iter()
        .find(|disk| !found.contains(&disk.id))
    {
        None => Ok(()),
        Some(disk) => Err(differs(
            format!("it has no disk with serial \"{}\"", disk.id),
            "start QEMU with that serial on its virtio-blk-pci, or change the disk's id",
        )),
    }
}

/// The paths of files that QEMU was handed, by the names that it has for them.
async fn handed_files(qmp: &Qmp) -> Result<HashMap<PathBuf, PathBuf>> {
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Set {
        fdset_id: u64,
        fds: Vec<Descriptor>,
    }
    #[derive(Deserialize)]
    struct Descriptor {
        opaque: Option<PathBuf>,
    }
    let sets: Vec<Set> = qmp.query("query-fdsets", Value::Null).await?;
    let named = sets.into_iter().filter_map(|set| {
        let path = set.fds.into_iter().find_map(|one| one.opaque)?;
        Some((PathBuf::from(format!("/dev/fdset/{}", set.fdset_id)), path))
    });
    Ok(named.collect())
}

/// The file of an image, for which QEMU has a name in JSON where more than a path was said of it.
fn image_file(name: &Path) -> PathBuf {
    let file = || {
        let json = name.to_str()?.strip_prefix("json:")?;
        let value: Value = serde_json::from_str(json).ok()?;
        let file = value["file"]["filename"].as_str();
        file.or(value["filename"].as_str()).map(PathBuf::from)
    };
    file().unwrap_or_else(|| name.to_owned())
}

fn check_disk(
    inserted: &Inserted,
    disk: &transhume_machine::definition::Disk,
    path: &Path,
    handed: &HashMap<PathBuf, PathBuf>,
) -> Result<()> {
    let id = &disk.id;
    let file = image_file(&inserted.image.filename);
    let runs = handed.get(&file).unwrap_or(&file);
    if runs.as_path() != path && !same_file(runs, path) {
        return Err(differs(
            format!(
                "its disk {id} is {}, and the definition says {}",
                runs.display(),
                path.display()
            ),
            "write the path that this host's QEMU uses",
        ));
    }
    if inserted.drv != disk.format.to_string() {
        return Err(differs(
            format!(
                "its disk {id} is opened as {}, and `format` says {}",
                inserted.drv, disk.format
            ),
            format!("write format = \"{}\"", inserted.drv),
        ));
    }
    if inserted.ro != disk.read_only {
        let runs = inserted.ro;
        return Err(differs(
            format!(
                "its disk {id} has read-only={runs}, and the definition says {}",
                disk.read_only
            ),
            format!("write read-only = {runs}"),
        ));
    }
    if !inserted.cache.direct {
        return Err(differs(
            format!(
                "its disk {id} goes through this host's page cache, which another host does not see"
            ),
            "start QEMU with cache=none (cache.direct=on) on it",
        ));
    }
    Ok(())
}

fn same_file(one: &Path, other: &Path) -> bool {
    match (std::fs::metadata(one), std::fs::metadata(other)) {
        (Ok(one), Ok(other)) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
        _ => false,
    }
}

async fn check_pci(qmp: &Qmp, definition: &Definition) -> Result<()> {
    #[derive(Deserialize)]
    struct Bus {
        bus: u64,
        devices: Vec<Device>,
    }
    #[derive(Deserialize)]
    struct Device {
        slot: usize,
        function: u64,
        id: Id,
    }
    #[derive(Deserialize)]
    struct Id {
        vendor: u16,
        device: u16,
    }
    let buses: Vec<Bus> = qmp.query("query-pci", Value::Null).await?;
    let ours = |device: &&Device| device.slot > 1 && device.slot < 31;
    let mut runs: Vec<PciDevice> = buses
        .iter()
        .filter(|bus| bus.bus == 0)
        .flat_map(|bus| bus.devices.iter().filter(ours))
        .filter(|device| device.function == 0)
        .map(|device| PciDevice {
            slot: device.slot,
            vendor: device.id.vendor,
            device: device.id.device,
        })
        .collect();
    runs.sort_unstable();
    let mut asked = command_line::pci_devices(definition);
    asked.sort_unstable();
    let cure = "a destination would build another machine: start this VM by `transhume vm start`, or QEMU \
                with the arguments that `transhume vm arguments DEF.toml` shows";
    if let Some(device) = runs.iter().find(|device| !asked.contains(device)) {
        return Err(differs(
            format!("it has {device}, and the definition makes none"),
            cure,
        ));
    }
    match asked.iter().find(|device| !runs.contains(device)) {
        None => Ok(()),
        Some(device) => Err(differs(
            format!("it has no {device}, which the definition makes"),
            cure,
        )),
    }
}

impl std::fmt::Display for PciDevice {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let kind = match (self.vendor, self.device) {
            (0x1234, 0x1111) => "VGA screen",
            (0x1af4, 0x1000) => "virtio-net-pci",
            (0x1af4, 0x1001) => "virtio-blk-pci",
            (0x1af4, 0x1003) => "virtio-serial-pci",
            _ => "PCI device",
        };
        let Self {
            slot,
            vendor,
            device,
        } = self;
        write!(
            formatter,
            "{kind} ({vendor:04x}:{device:04x}) in PCI slot {slot:#x}"
        )
    }
}

/// The socket of the channel to the guest's agent.
pub(super) async fn agent_socket(qmp: &Qmp, port: AgentPort) -> Result<Option<PathBuf>> {
    let kind = match port {
        AgentPort::None => return Ok(None),
        AgentPort::Serial => "child<virtserialport>",
        AgentPort::Console => "child<virtconsole>",
    };
    for parent in PERIPHERALS {
        for (child, child_kind) in qmp.qom_list(parent).await? {
            if child_kind != kind {
                continue;
            }
            let path = format!("{parent}/{child}");
            let named =
                port == AgentPort::Console || qmp.qom_get(&path, "name").await? == AGENT_PORT;
            if named {
                let chardev = qmp.qom_get(&path, "chardev").await?;
                return chardev_socket(qmp, chardev.as_str().unwrap_or_default())
                    .await
                    .map(Some);
            }
        }
    }
    Err(differs(
        match port {
            AgentPort::Console => "it has no virtconsole for the agent".to_owned(),
            _ => format!("it has no virtserialport named {AGENT_PORT}"),
        },
        "add it to QEMU's command line, or write port = \"none\" in [agent] and go without the guest's help",
    ))
}

async fn chardev_socket(qmp: &Qmp, label: &str) -> Result<PathBuf> {
    #[derive(Deserialize)]
    struct Chardev {
        label: String,
        filename: String,
    }
    let all: Vec<Chardev> = qmp.query("query-chardev", Value::Null).await?;
    let found = all.iter().find(|one| one.label == label);
    found
        .and_then(|one| socket_path(&one.filename))
        .ok_or_else(|| {
            let filename = found.map_or("missing", |one| &one.filename);
            differs(
                format!(
                    "the agent's chardev \"{label}\" is {filename}, no unix socket that QEMU serves"
                ),
                "give it -chardev socket,path=/ABSOLUTE/PATH,server=on,wait=off",
            )
        })
}

/// The path in QEMU's name for a chardev, as in `disconnected:unix:/run/a.sock,server=on`.
fn socket_path(filename: &str) -> Option<PathBuf> {
    let rest = filename.strip_prefix("disconnected:").unwrap_or(filename);
    let path = Path::new(rest.strip_prefix("unix:")?.strip_suffix(",server=on")?);
    path.is_absolute().then(|| path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_qemus_names_of_images() {
        let name = |text: &str| image_file(Path::new(text)).display().to_string();
        let json = "json:{\"backing\": {\"driver\": \"raw\", \"file\": {\"driver\": \"file\", \"filename\": \"/dev/fdset/2\"}}, \
                    \"driver\": \"qcow2\", \"file\": {\"driver\": \"file\", \"filename\": \"/dev/fdset/1\"}}";
        assert_eq!(name(json), "/dev/fdset/1");
        assert_eq!(name("/srv/a.qcow2"), "/srv/a.qcow2");
        assert_eq!(name("json:{"), "json:{");
    }

    #[test]
    fn reads_qemus_names_of_sockets() {
        let path = Some(PathBuf::from("/run/a,b.sock"));
        assert_eq!(socket_path("unix:/run/a,b.sock,server=on"), path);
        assert_eq!(
            socket_path("disconnected:unix:/run/a,b.sock,server=on"),
            path
        );
        for other in [
            "unix:a.sock,server=on",
            "unix:/run/a.sock",
            "pty:/dev/pts/3",
            "null",
            "",
        ] {
            assert_eq!(socket_path(other), None, "{other}");
        }
    }
}
