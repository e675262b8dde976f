//! QEMU's command line for a definition. Two hosts that are given the same definition must build the
//! same machine, or the stream of the one does not load at the other: so nothing is left to QEMU's
//! defaults that its binary or its order of arguments would decide, PCI slots above all.

use super::files::RunFiles;
use super::handed::{Names, NodeName, escape};
use serde_json::{Value, json};
use std::path::Path;
use transhume_machine::Definition;
use transhume_machine::definition::{AgentPort, Disk, Format, Nic};

/// Slot 0 is the host bridge's; 1 (pc) and 31 (q35) are the south bridge's.
const SLOT_SCREEN: usize = 0x2;
const SLOT_AGENT: usize = 0x3;
const SLOT_DISKS: usize = 0x4;
const SLOT_NICS: usize = SLOT_DISKS + transhume_machine::definition::MAX_DISKS;
const _: () = assert!(SLOT_NICS + transhume_machine::definition::MAX_NICS <= 31);

/// The name of the guest's port to its host.
pub const AGENT_PORT: &str = "org.transhume.agent.0";

/// How a QEMU starts. Either way its vCPUs stand still until it is told to `cont`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// A VM that boots.
    Running,
    /// A VM whose state comes by `migrate-incoming`.
    Incoming,
}

/// What a definition's machine has on its PCI bus beside what its machine type brings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct PciDevice {
    pub(super) slot: usize,
    pub(super) vendor: u16,
    pub(super) device: u16,
}

/// What a QEMU may not do that was handed what it needs, even where its user may.
const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

/// The arguments for QEMU, with what it uses of this host by these names.
pub fn arguments(
    definition: &Definition,
    files: &RunFiles,
    start: Start,
    names: &Names,
) -> Vec<String> {
    let bus = root_bus(&definition.machine);
    let mut line = Line(Vec::new());
    line.add("-name", format!("{},debug-threads=on", definition.name));
    line.flag("-nodefaults");
    line.flag("-no-user-config");
    line.add("-display", "none");
    line.add("-msg", "timestamp=on");
    if names.handed {
        line.add("-sandbox", SANDBOX);
    } else {
        line.add("-pidfile", text(&files.pid()));
    }
    for set in &names.add_fds {
        line.add("-add-fd", set);
    }
    line.add("-machine", &definition.machine);
    line.add("-accel", definition.accelerator.to_string());
    line.add("-cpu", definition.cpu_model());
    let memory = definition.memory.bytes();
    line.add(
        "-m",
        if memory.is_multiple_of(1 << 20) {
            format!("size={}M", memory >> 20)
        } else {
            format!("size={}K", memory >> 10)
        },
    );
    let vcpus = definition.vcpus;
    line.add(
        "-smp",
        format!("cpus={vcpus},sockets=1,cores={vcpus},threads=1"),
    );
    line.add("-chardev", socket("qmp", &names.qmp));
    line.add("-mon", "chardev=qmp,mode=control");
    if let Some(boot) = &definition.boot {
        if let Some(kernel) = &names.kernel {
            line.add("-kernel", kernel);
        }
        if let Some(initrd) = &names.initrd {
            line.add("-initrd", initrd);
        }
        if let Some(append) = &boot.append {
            line.add("-append", append);
        }
    }
    if definition.console.serial {
        line.add(
            "-chardev",
            format!("{},{}", socket("serial0", &names.serial), names.serial_log),
        );
        line.add("-serial", "chardev:serial0");
    }
    if definition.console.vnc.is_some() {
        line.add(
            "-device",
            format!("VGA,id=screen,bus={bus},addr={SLOT_SCREEN:#x}"),
        );
        line.add("-vnc", format!("unix:{}", escape(&text(&names.vnc))));
    }
    add_agent(&mut line, definition.agent.port, bus, &names.agent);
    for (index, (disk, nodes)) in definition.disks.iter().zip(&names.disks).enumerate() {
        let boots = index == 0 && definition.boot.is_none();
        add_nodes(&mut line, disk, nodes, names.handed);
        add_disk(&mut line, disk, bus, SLOT_DISKS + index, boots);
    }
    for (index, (nic, plug)) in definition.nics.iter().zip(&names.nics).enumerate() {
        add_nic(&mut line, nic, plug, index, bus);
    }
    line.flag("-S");
    if start == Start::Incoming {
        line.add("-incoming", "defer");
    }
    line.0
}

/// The PCI devices that [`arguments`] adds, by slot.
pub(super) fn pci_devices(definition: &Definition) -> Vec<PciDevice> {
    const RED_HAT: u16 = 0x1af4;
    let device = |slot, vendor, device| PciDevice {
        slot,
        vendor,
        device,
    };
    let mut devices = Vec::new();
    if definition.console.vnc.is_some() {
        devices.push(device(SLOT_SCREEN, 0x1234, 0x1111));
    }
    if definition.agent.port != AgentPort::None {
        devices.push(device(SLOT_AGENT, RED_HAT, 0x1003));
    }
    let disks =
        (0..definition.disks.len()).map(|index| device(SLOT_DISKS + index, RED_HAT, 0x1001));
    devices.extend(disks);
    let nics = (0..definition.nics.len()).map(|index| device(SLOT_NICS + index, RED_HAT, 0x1000));
    devices.extend(nics);
    devices
}

struct Line(Vec<String>);

impl Line {
    fn flag(&mut self, flag: &str) {
        self.0.push(flag.to_owned());
    }

    fn add(&mut self, option: &str, value: impl Into<String>) {
        self.flag(option);
        self.0.push(value.into());
    }
}

fn root_bus(machine: &str) -> &'static str {
    // The i440FX machines: pc, pc-i440fx-7.2, and the ancient pc-1.0.
    let old = machine == "pc"
        || machine.starts_with("pc-i440fx-")
        || machine
            .strip_prefix("pc-")
            .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
    if old { "pci.0" } else { "pcie.0" }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn socket(id: &str, address: &str) -> String {
    format!("socket,id={id},{address},server=on,wait=off")
}

fn add_agent(line: &mut Line, port: AgentPort, bus: &str, address: &str) {
    let ports = match port {
        AgentPort::None => return,
        AgentPort::Serial => "",
        // One port, or the guest would need the multiport feature to find it.
        AgentPort::Console => ",max_ports=1",
    };
    line.add("-chardev", socket("agent", address));
    line.add(
        "-device",
        format!("virtio-serial-pci,id=agent-bus,bus={bus},addr={SLOT_AGENT:#x}{ports}"),
    );
    let device = match port {
        AgentPort::Console => "virtconsole,id=agent-port,bus=agent-bus.0,chardev=agent".to_owned(),
        _ => format!(
            "virtserialport,id=agent-port,bus=agent-bus.0,nr=1,chardev=agent,name={AGENT_PORT}"
        ),
    };
    line.add("-device", device);
}

/// A disk's nodes, from the lowest: QEMU makes each of what it has already. One that is `complete` names what it is
/// based on or that it is based on nothing; else that is left to what the image says.
fn add_nodes(line: &mut Line, disk: &Disk, nodes: &[NodeName], complete: bool) {
    let id = &disk.id;
    let name = |kind: &str, depth: usize| match depth {
        0 => format!("{kind}-{id}"),
        // No other disk's name can make it the same.
        _ => format!("{kind}.{depth}-{id}"),
    };
    for (depth, node) in nodes.iter().enumerate().rev() {
        let driver = if node.block_device {
            "host_device"
        } else {
            "file"
        };
        // Around the host's page cache: the other host would not see what it holds.
        let cache = json!({"direct": true});
        let file = json!({
            "driver": driver, "node-name": name("file", depth), "filename": node.filename,
            "aio": "threads", "cache": cache, "read-only": node.read_only,
        });
        let mut format = json!({
            "driver": node.format.to_string(), "node-name": name("disk", depth), "file": name("file", depth),
            "cache": cache, "read-only": node.read_only,
        });
        if complete && node.format == Format::Qcow2 {
            format["backing"] = match nodes.get(depth + 1) {
                Some(_) => Value::String(name("disk", depth + 1)),
                None => Value::Null,
            };
        }
        line.add("-blockdev", file.to_string());
        line.add("-blockdev", format.to_string());
    }
}

fn add_disk(line: &mut Line, disk: &Disk, bus: &str, slot: usize, boots: bool) {
    let id = &disk.id;
    let bootindex = if boots { ",bootindex=1" } else { "" };
    line.add(
        "-device",
        format!(
            "virtio-blk-pci,id=blk-{id},bus={bus},addr={slot:#x},drive=disk-{id},serial={id}{bootindex}"
        ),
    );
}

fn add_nic(line: &mut Line, nic: &Nic, plug: &(&str, String), index: usize, bus: &str) {
    let (kind, rest) = plug;
    line.add("-netdev", format!("{kind},id=net{index}{rest}"));
    // Without its boot ROM: that is a block of memory in the stream, as large as the file of the
    // host's package, and two packages with different files would not take each other's VMs.
    line.add(
        "-device",
        format!(
            "virtio-net-pci,id=nic{index},bus={bus},addr={:#x},netdev=net{index},mac={},romfile=",
            SLOT_NICS + index,
            nic.mac
        ),
    );
}

#[cfg(test)]
#[path = "command_line_tests.rs"]
mod tests;
