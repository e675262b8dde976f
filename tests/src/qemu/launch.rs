//! Starts a QEMU for the test bed's guest.

use super::qmp::Qmp;
use super::serial::{Console, Side};
use crate::command::Process;
use crate::guest::Boot;
use crate::hosts::{Host, TAP};
use crate::{Error, Result};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

/// How long a guest may take to boot and warm up.
pub(crate) const BOOT: Duration = Duration::from_secs(180);

/// A disk of a guest.
#[derive(Debug, Clone)]
pub struct DiskImage {
    /// Its serial number, and its place below /disk in the guest.
    pub id: String,
    /// The image.
    pub path: PathBuf,
    /// "raw" or "qcow2".
    pub format: &'static str,
}

/// The agent's channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AgentPort {
    /// A named port, for the Linux agent.
    Serial,
    /// A console, which is all that the micro-guest has a driver for.
    Console,
}

/// What runs a guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// QEMU's translator, which every machine has.
    Tcg,
    /// The same, with a clock that counts a nanosecond an instruction: a guest's CPU time is that of no other load on
    /// this machine.
    Counting,
    /// The kernel's, on a host that has it.
    Kvm,
}

impl Accelerator {
    /// As a definition names it.
    fn name(self) -> &'static str {
        match self {
            Self::Tcg | Self::Counting => "tcg",
            Self::Kvm => "kvm",
        }
    }
}

/// A guest's network card, plugged into [`TAP`] on whichever host it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Card {
    /// Its address.
    pub mac: &'static str,
}

/// What a guest is made of; the same for either side of a comparison.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Its name.
    pub name: String,
    /// "q35", "pc", or a versioned type.
    pub machine: String,
    /// In MiB.
    pub memory: u64,
    /// In KiB, beyond that.
    pub memory_kib: u64,
    /// How many.
    pub vcpus: u32,
    /// What runs it.
    pub accelerator: Accelerator,
    /// What it boots.
    pub boot: Boot,
    /// How its agent speaks.
    pub agent: AgentPort,
    /// Its disks.
    pub disks: Vec<DiskImage>,
    /// Its network card, if it has one.
    pub card: Option<Card>,
    /// Settings of the workload: `testbed.KEY=VALUE` on the kernel's command line.
    pub settings: Vec<(&'static str, String)>,
}

impl Machine {
    /// The kernel's command line.
    pub fn append(&self) -> String {
        let mut line = self.boot.append.clone();
        for (key, value) in &self.settings {
            let _ = write!(line, " testbed.{key}={value}");
        }
        line
    }

    /// The definition of the same machine for `transhume vm start`.
    pub fn definition(&self) -> String {
        let mut text = format!(
            "name = \"{}\"\nmachine = \"{}\"\naccelerator = \"{}\"\nmemory = \"{}KiB\"\nvcpus = {}\n\n\
             [console]\nserial = true\n\n[agent]\nport = \"{}\"\n\n\
             [boot]\nkernel = \"{}\"\nappend = \"{}\"\n",
            self.name,
            self.machine,
            self.accelerator.name(),
            (self.memory << 10) + self.memory_kib,
            self.vcpus,
            match self.agent {
                AgentPort::Serial => "serial",
                AgentPort::Console => "console",
            },
            self.boot.kernel.display(),
            self.append(),
        );
        if let Some(initrd) = &self.boot.initrd {
            let _ = writeln!(text, "initrd = \"{}\"", initrd.display());
        }
        for DiskImage { id, path, format } in &self.disks {
            let _ = write!(
                text,
                "\n[[disk]]\nid = \"{id}\"\nformat = \"{format}\"\npath = \"{}\"\n",
                path.display()
            );
        }
        if let Some(Card { mac }) = self.card {
            let _ = write!(
                text,
                "\n[[nic]]\nmac = \"{mac}\"\nbackend = \"tap\"\nifname = \"{TAP}\"\n"
            );
        }
        text
    }

    fn arguments(&self, folder: &Path) -> Vec<String> {
        let path = |name: &str| folder.join(name).display().to_string();
        let mut arguments: Vec<String> = Vec::new();
        let mut add =
            |words: &[&str]| arguments.extend(words.iter().map(|word| (*word).to_owned()));
        add(&[
            "-name",
            &self.name,
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ]);
        add(&["-machine", &self.machine]);
        add(match self.accelerator {
            Accelerator::Tcg => &["-accel", "tcg,thread=multi"],
            Accelerator::Counting => &["-accel", "tcg,thread=single", "-icount", "shift=0"],
            Accelerator::Kvm => &["-accel", "kvm", "-cpu", "host"],
        });
        add(&[
            "-m",
            &format!("{}K", (self.memory << 10) + self.memory_kib),
            "-smp",
            &self.vcpus.to_string(),
        ]);
        add(&["-kernel", &self.boot.kernel.display().to_string()]);
        if let Some(initrd) = &self.boot.initrd {
            add(&["-initrd", &initrd.display().to_string()]);
        }
        add(&["-append", &self.append()]);
        add(&[
            "-qmp",
            &format!("unix:{},server=on,wait=off", path("qmp.sock")),
        ]);
        add(&[
            "-chardev",
            &format!(
                "socket,id=serial,path={},server=on,wait=off,logfile={}",
                path("serial.sock"),
                path("serial.log")
            ),
        ]);
        let (ports, port) = match self.agent {
            AgentPort::Serial => (
                "",
                "virtserialport,chardev=agent,name=org.transhume.agent.0",
            ),
            AgentPort::Console => (",max_ports=1", "virtconsole,chardev=agent"),
        };
        add(&["-serial", "chardev:serial"]);
        add(&["-device", &format!("virtio-serial-pci{ports}")]);
        add(&[
            "-chardev",
            &format!(
                "socket,id=agent,path={},server=on,wait=off",
                path("agent.sock")
            ),
        ]);
        add(&["-device", port]);
        for (index, disk) in self.disks.iter().enumerate() {
            let DiskImage { id, path, format } = disk;
            add(&[
                "-drive",
                &format!(
                    "if=none,id=drive{index},cache=none,aio=threads,format={format},file={}",
                    path.display()
                ),
            ]);
            add(&[
                "-device",
                &format!("virtio-blk-pci,drive=drive{index},serial={id}"),
            ]);
        }
        if let Some(Card { mac }) = self.card {
            add(&[
                "-netdev",
                &format!("tap,id=net0,ifname={TAP},script=no,downscript=no"),
            ]);
            add(&[
                "-device",
                &format!("virtio-net-pci,netdev=net0,mac={mac},romfile="),
            ]);
        }
        arguments
    }

    /// Starts it on a host; `incoming` waits for a migration.
    pub fn start(&self, host: &Host, qemu: &Path, incoming: bool) -> Result<Vm> {
        let folder = host.empty_folder(&self.name)?;
        let log = folder.join("qemu.log");
        let output = File::create(&log).map_err(Error::file("create", &log))?;
        let errors = output.try_clone().map_err(Error::file("copy", &log))?;
        let mut run = host
            .run(qemu)?
            .args(self.arguments(&folder))
            .cure("See its words");
        if incoming {
            run = run.args(["-incoming", "defer"]);
        }
        run.command()
            .stdout(Stdio::from(output))
            .stderr(Stdio::from(errors));
        let process = run.spawn()?;
        let name = format!("{} on {}", self.name, host.name);
        let alive = || still_runs(&name, &process, &log);
        let qmp = Qmp::connect(&name, &folder.join("qmp.sock"), alive)?;
        Ok(Vm {
            name,
            folder,
            qmp,
            process,
            log,
        })
    }

    /// Starts it on a host and waits until it works.
    pub fn start_warm(&self, host: &Host, qemu: &Path, console: &Console) -> Result<Vm> {
        let begin = || {
            let vm = self.start(host, qemu, false)?;
            vm.listen(console, Side::Source)?;
            console.wait_for("ready", 0, BOOT, || vm.alive())?;
            Ok(vm)
        };
        // What began is killed where it is dropped.
        boots(console, begin, || Ok(()))
    }
}

/// Begins a guest. One that does not boot as its kernel stands still is ended and begun once more, which is said: seen once,
/// of Linux 6.1 by QEMU's translator on a machine with other work, where a thread of RCU's was not run.
pub(crate) fn boots<T>(
    console: &Console,
    begin: impl Fn() -> Result<T>,
    end: impl FnOnce() -> Result<()>,
) -> Result<T> {
    match begin() {
        Err(error @ Error::Late { .. }) if error.to_string().contains("rcu: ") => {
            println!("  it is started anew, as its kernel stood still: {error}");
            end()?;
            console.begin_anew();
            begin()
        }
        ended => ended,
    }
}

fn still_runs(name: &str, process: &Process, log: &Path) -> Result<()> {
    if process.ended() {
        let words = fs::read_to_string(log).unwrap_or_default();
        return Err(Error::Qemu {
            name: name.to_owned(),
            what: format!("it has ended: {}", words.trim()),
        });
    }
    Ok(())
}

/// A running QEMU. Dropping it kills it.
#[derive(Debug)]
pub struct Vm {
    /// Of the guest and the host.
    pub name: String,
    /// Its sockets and logs.
    pub folder: PathBuf,
    /// Its monitor.
    pub qmp: Qmp,
    process: Process,
    log: PathBuf,
}

impl Vm {
    /// Fails when it has ended.
    pub fn alive(&self) -> Result<()> {
        still_runs(&self.name, &self.process, &self.log)
    }

    /// Listens to its serial line.
    pub fn listen(&self, console: &Console, side: Side) -> Result<()> {
        console.attach(side, &self.folder.join("serial.sock"), || self.alive())
    }

    /// Its process id.
    pub fn id(&self) -> i32 {
        self.process.id()
    }
}
