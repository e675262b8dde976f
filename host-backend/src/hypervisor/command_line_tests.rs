use super::super::files::LaunchSettings;
use super::*;

fn files() -> RunFiles {
    let settings = LaunchSettings {
        host: "hosta".to_owned(),
        run_directory: "/run/transhume".into(),
        log_directory: "/var/log/transhume".into(),
        qemu: "/usr/bin/qemu-system-x86_64".into(),
    };
    settings.files("web1")
}

fn lines(definition: &str, start: Start) -> Vec<String> {
    let definition = Definition::parse(definition).expect("a definition");
    let arguments = arguments(&definition, "hosta", &files(), start, |path| {
        path.starts_with("/dev")
    });
    // An option and its value on one line.
    let mut lines: Vec<String> = Vec::new();
    for argument in arguments {
        match lines.last_mut() {
            Some(last) if !argument.starts_with('-') => {
                last.push(' ');
                last.push_str(&argument);
            }
            _ => lines.push(argument),
        }
    }
    lines
}

#[test]
fn a_full_machine() {
    let expected = [
        "-name web1,debug-threads=on",
        "-nodefaults",
        "-no-user-config",
        "-display none",
        "-msg timestamp=on",
        "-pidfile /run/transhume/vms/web1/qemu.pid",
        "-machine q35",
        "-accel kvm",
        "-cpu host",
        "-m size=2048M",
        "-smp cpus=2,sockets=1,cores=2,threads=1",
        "-chardev socket,id=qmp,path=/run/transhume/vms/web1/qmp.sock,server=on,wait=off",
        "-mon chardev=qmp,mode=control",
        "-kernel /srv/vms/vmlinuz",
        "-initrd /srv/vms/initrd",
        "-append console=ttyS0 quiet",
        "-chardev socket,id=serial0,path=/run/transhume/vms/web1/serial.sock,server=on,wait=off,logfile=/var/log/transhume/web1/serial.log,logappend=on",
        "-serial chardev:serial0",
        "-device VGA,id=screen,bus=pcie.0,addr=0x2",
        "-vnc unix:/run/transhume/vms/web1/vnc.sock",
        "-chardev socket,id=agent,path=/run/transhume/vms/web1/agent.sock,server=on,wait=off",
        "-device virtio-serial-pci,id=agent-bus,bus=pcie.0,addr=0x3",
        "-device virtserialport,id=agent-port,bus=agent-bus.0,nr=1,chardev=agent,name=org.transhume.agent.0",
        "-blockdev driver=file,node-name=file-root,filename=/srv/a,,b.raw,aio=threads,cache.direct=on,read-only=off",
        "-blockdev driver=raw,node-name=disk-root,file=file-root,cache.direct=on,read-only=off",
        "-device virtio-blk-pci,id=blk-root,bus=pcie.0,addr=0x4,drive=disk-root,serial=root",
        "-blockdev driver=file,node-name=file-data,filename=/srv/data.qcow2,aio=threads,cache.direct=on,read-only=on",
        "-blockdev driver=qcow2,node-name=disk-data,file=file-data,cache.direct=on,read-only=on",
        "-device virtio-blk-pci,id=blk-data,bus=pcie.0,addr=0x5,drive=disk-data,serial=data",
        "-netdev tap,id=net0,ifname=tap0,script=no,downscript=no",
        "-device virtio-net-pci,id=nic0,bus=pcie.0,addr=0x14,netdev=net0,mac=52:54:00:12:34:56,romfile=",
        "-netdev user,id=net1",
        "-device virtio-net-pci,id=nic1,bus=pcie.0,addr=0x15,netdev=net1,mac=52:54:00:12:34:57,romfile=",
        "-S",
    ];
    let definition = r#"
        name = "web1"
        machine = "q35"
        memory = "2GiB"
        vcpus = 2
        boot = { kernel = "/srv/vms/vmlinuz", initrd = "/srv/vms/initrd", append = "console=ttyS0 quiet" }
        disk = [
            { id = "root", format = "raw", path = "/elsewhere", on = { hosta = "/srv/a,b.raw" } },
            { id = "data", format = "qcow2", path = "/srv/data.qcow2", read-only = true },
        ]
        nic = [
            { mac = "52:54:00:12:34:56", backend = "tap", ifname = "tap0" },
            { mac = "52:54:00:12:34:57", backend = "user" },
        ]
        console = { serial = true, vnc = "unix" }
    "#;
    assert_eq!(lines(definition, Start::Running), expected);
}

#[test]
fn a_small_machine_that_waits_for_its_state() {
    let expected = [
        "-name web1,debug-threads=on",
        "-nodefaults",
        "-no-user-config",
        "-display none",
        "-msg timestamp=on",
        "-pidfile /run/transhume/vms/web1/qemu.pid",
        "-machine pc",
        "-accel tcg",
        "-cpu qemu64",
        "-m size=64M",
        "-smp cpus=1,sockets=1,cores=1,threads=1",
        "-chardev socket,id=qmp,path=/run/transhume/vms/web1/qmp.sock,server=on,wait=off",
        "-mon chardev=qmp,mode=control",
        "-chardev socket,id=agent,path=/run/transhume/vms/web1/agent.sock,server=on,wait=off",
        "-device virtio-serial-pci,id=agent-bus,bus=pci.0,addr=0x3,max_ports=1",
        "-device virtconsole,id=agent-port,bus=agent-bus.0,chardev=agent",
        "-blockdev driver=host_device,node-name=file-root,filename=/dev/vg/web1,aio=threads,cache.direct=on,read-only=off",
        "-blockdev driver=raw,node-name=disk-root,file=file-root,cache.direct=on,read-only=off",
        "-device virtio-blk-pci,id=blk-root,bus=pci.0,addr=0x4,drive=disk-root,serial=root,bootindex=1",
        "-netdev bridge,id=net0,br=br0",
        "-device virtio-net-pci,id=nic0,bus=pci.0,addr=0x14,netdev=net0,mac=52:54:00:12:34:56,romfile=",
        "-S",
        "-incoming defer",
    ];
    let definition = r#"
        name = "web1"
        machine = "pc"
        accelerator = "tcg"
        memory = "64MiB"
        vcpus = 1
        disk = [{ id = "root", format = "raw", path = "/dev/vg/web1" }]
        nic = [{ mac = "52:54:00:12:34:56", backend = "bridge", bridge = "br0" }]
        agent = { port = "console" }
        console = { serial = false }
    "#;
    assert_eq!(lines(definition, Start::Incoming), expected);
}

#[test]
fn knows_each_machines_root_bus() {
    for (machine, bus) in [
        ("pc", "pci.0"),
        ("pc-i440fx-7.2", "pci.0"),
        ("pc-1.3", "pci.0"),
        ("q35", "pcie.0"),
        ("pc-q35-10.0", "pcie.0"),
    ] {
        assert_eq!(root_bus(machine), bus, "{machine}");
    }
}
