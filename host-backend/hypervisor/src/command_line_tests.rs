use super::super::files::LaunchSettings;
use super::super::handed::{Handed, OpenedFiles};
use super::*;
use transhume_testing::qcow2_header as header;

fn files() -> RunFiles {
    let settings = LaunchSettings {
        host: "hosta".to_owned(),
        run_directory: "/run/transhume".into(),
        log_directory: "/var/log/transhume".into(),
        qemu: "/usr/bin/qemu-system-x86_64".into(),
        user: None,
    };
    settings.files("web1")
}

fn lines(definition: &str, start: Start) -> Vec<String> {
    let definition = Definition::parse(definition).expect("a definition");
    let names = Names::paths(&definition, "hosta", &files(), |path| {
        path.starts_with("/dev")
    });
    let arguments = arguments(&definition, &files(), start, &names);
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
        r#"-blockdev {"aio":"threads","cache":{"direct":true},"driver":"file","filename":"/srv/a,b.raw","node-name":"file-root","read-only":false}"#,
        r#"-blockdev {"cache":{"direct":true},"driver":"raw","file":"file-root","node-name":"disk-root","read-only":false}"#,
        "-device virtio-blk-pci,id=blk-root,bus=pcie.0,addr=0x4,drive=disk-root,serial=root",
        r#"-blockdev {"aio":"threads","cache":{"direct":true},"driver":"file","filename":"/srv/data.qcow2","node-name":"file-data","read-only":true}"#,
        r#"-blockdev {"cache":{"direct":true},"driver":"qcow2","file":"file-data","node-name":"disk-data","read-only":true}"#,
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
        r#"-blockdev {"aio":"threads","cache":{"direct":true},"driver":"host_device","filename":"/dev/vg/web1","node-name":"file-root","read-only":false}"#,
        r#"-blockdev {"cache":{"direct":true},"driver":"raw","file":"file-root","node-name":"disk-root","read-only":false}"#,
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

#[test]
fn what_was_handed_over_is_all_that_is_opened() {
    let folder = tempfile::tempdir().expect("a folder");
    let run = folder.path().join("run");
    let path = |name: &str| folder.path().join(name);
    let write = |name: &str, bytes: &[u8]| std::fs::write(path(name), bytes).expect("written");
    write("base.raw", &[0; 4096]);
    write("middle", &header("base.raw", Some("raw"), 0));
    write("top,", &header("middle", Some("qcow2"), 0));
    write("kernel", b"k");
    let settings = LaunchSettings {
        host: "hosta".to_owned(),
        run_directory: run,
        log_directory: path("log"),
        qemu: "/usr/bin/qemu-system-x86_64".into(),
        user: None,
    };
    let text = format!(
        "name = \"web1\"\nmachine = \"q35\"\nmemory = \"64MiB\"\nvcpus = 1\n\
         [boot]\nkernel = \"{}\"\n[[disk]]\nid = \"root\"\nformat = \"qcow2\"\npath = \"{}\"\n",
        path("kernel").display(),
        path("top,").display()
    );
    let definition = Definition::parse(&text).expect("a definition");
    let files = settings.files("web1");
    files.prepare(None).expect("a run directory");
    let opened = OpenedFiles::open(&definition, &settings, None).expect("all is there");
    let handed = Handed::make(&definition, &files, &opened).expect("it can be made");
    let line = arguments(&definition, &files, Start::Running, &handed.names);
    let after = |option: &str| -> Vec<&str> {
        let pairs = line.windows(2).filter(|pair| pair[0] == option);
        pairs.map(|pair| pair[1].as_str()).collect()
    };
    assert_eq!(after("-sandbox"), [SANDBOX]);
    assert!(after("-kernel")[0].starts_with("/proc/self/fd/"));
    for address in after("-chardev") {
        assert!(
            address.contains(",fd=") && !address.contains("path="),
            "{address}"
        );
    }
    let nodes: Vec<serde_json::Value> = after("-blockdev")
        .iter()
        .map(|node| serde_json::from_str(node).expect("JSON"))
        .collect();
    let files: Vec<&str> = nodes
        .iter()
        .filter_map(|node| node["filename"].as_str())
        .collect();
    assert_eq!(files, ["/dev/fdset/3", "/dev/fdset/2", "/dev/fdset/1"]);
    let based: Vec<_> = nodes
        .iter()
        .filter(|node| node["driver"] == "qcow2")
        .map(|node| (&node["node-name"], &node["backing"], &node["read-only"]))
        .collect();
    assert_eq!(
        format!("{based:?}"),
        "[(String(\"disk.1-root\"), String(\"disk.2-root\"), Bool(true)), \
         (String(\"disk-root\"), String(\"disk.1-root\"), Bool(false))]"
    );
    // What is based on nothing says so, lest the image says otherwise later.
    write("top,", &header("", None, 0));
    let opened = OpenedFiles::open(&definition, &settings, None).expect("all is there");
    settings
        .files("web1")
        .prepare(None)
        .expect("a run directory");
    let handed = Handed::make(&definition, &settings.files("web1"), &opened).expect("made");
    let line = arguments(
        &definition,
        &settings.files("web1"),
        Start::Running,
        &handed.names,
    );
    assert!(
        line.iter().any(|word| word.contains("\"backing\":null")),
        "{line:?}"
    );
    assert!(
        line.iter()
            .any(|word| word.contains("opaque=") && word.ends_with("top,,"))
    );
}
