//! A QEMU with the micro-guest in it.

use micro_guest::control::Control;
use micro_guest::image::write_image;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread::sleep;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Bounds every wait: far beyond what a loaded machine needs.
pub(crate) const LONG: Duration = Duration::from_secs(120);
/// Seed and size of the disk.
const DISK_SEED: u64 = 1;
const DISK_BYTES: u64 = 64 << 20;

/// Builds the guest once.
fn guest() -> &'static Path {
    static GUEST: OnceLock<PathBuf> = OnceLock::new();
    GUEST.get_or_init(|| {
        let output = Command::new(env!("CARGO"))
            .args([
                "build",
                "--package",
                "transhume-micro-guest",
                "--profile",
                "micro-guest",
            ])
            .args(["--features", "bare-metal", "--message-format", "json"])
            .stderr(Stdio::inherit())
            .output()
            .expect("cargo runs");
        assert!(output.status.success(), "the guest does not build");
        let messages = String::from_utf8(output.stdout).expect("cargo writes UTF-8");
        messages
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .find_map(|message| Some(PathBuf::from(message["executable"].as_str()?)))
            .expect("cargo names the executable")
    })
}

/// A running QEMU; killed when dropped.
pub(crate) struct Machine {
    process: Child,
    directory: TempDir,
    qmp: BufReader<UnixStream>,
    pub(crate) control: Control,
}

/// What machines of one test share.
pub(crate) struct Setting {
    pub(crate) machine: &'static str,
    pub(crate) memory: &'static str,
    pub(crate) parameters: &'static str,
    pub(crate) disk: PathBuf,
    _directory: TempDir,
}

impl Setting {
    pub(crate) fn new(
        machine: &'static str,
        memory: &'static str,
        parameters: &'static str,
    ) -> Self {
        let directory = TempDir::new().expect("a directory");
        let disk = directory.path().join("disk.raw");
        write_image(&disk, DISK_SEED, DISK_BYTES).expect("an image");
        Self {
            machine,
            memory,
            parameters,
            disk,
            _directory: directory,
        }
    }

    /// Starts a machine; one that is `incoming` waits for a migration.
    pub(crate) fn start(&self, incoming: bool) -> Machine {
        let directory = TempDir::new().expect("a directory");
        let path = |name: &str| directory.path().join(name).display().to_string();
        let socket = |name: &str| format!("unix:{},server=on,wait=off", path(name));
        let mut command =
            Command::new(std::env::var_os("QEMU").unwrap_or("qemu-system-x86_64".into()));
        command
            .args([
                "-machine",
                &format!("{},accel=tcg", self.machine),
                "-m",
                self.memory,
            ])
            .args([
                "-nodefaults",
                "-no-user-config",
                "-display",
                "none",
                "-no-reboot",
            ])
            .arg("-kernel")
            .arg(guest())
            .args(["-append", self.parameters])
            .args([
                "-chardev",
                &format!("socket,id=agent,path={},server=on,wait=off", path("agent")),
            ])
            .args([
                "-device",
                "virtio-serial-pci,max_ports=1",
                "-device",
                "virtconsole,chardev=agent",
            ])
            .args([
                "-drive",
                &format!(
                    "if=none,id=root,file={},format=raw,cache=none",
                    self.disk.display()
                ),
            ])
            .args(["-device", "virtio-blk-pci,drive=root,serial=root"])
            .args(["-serial", &socket("serial"), "-qmp", &socket("qmp")])
            .stdin(Stdio::null());
        if incoming {
            command.args(["-incoming", &format!("unix:{}", path("incoming"))]);
        }
        let process = command
            .spawn()
            .expect("qemu-system-x86_64 starts; $QEMU names another one");
        let qmp = BufReader::new(retry(|| UnixStream::connect(path("qmp")).ok()));
        let control = retry(|| Control::connect(&directory.path().join("serial")).ok());
        let mut machine = Machine {
            process,
            directory,
            qmp,
            control,
        };
        machine.read();
        machine.execute("qmp_capabilities", &json!({}));
        if !incoming {
            machine
                .control
                .wait_ready(LONG)
                .expect("the guest is ready");
        }
        machine
    }
}

/// Tries until there is something.
pub(crate) fn retry<T>(mut attempt: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LONG;
    loop {
        if let Some(result) = attempt() {
            return result;
        }
        assert!(Instant::now() < deadline, "waited in vain");
        sleep(Duration::from_millis(20));
    }
}

impl Machine {
    fn read(&mut self) -> Value {
        let mut line = String::new();
        self.qmp.read_line(&mut line).expect("QMP answers");
        serde_json::from_str(&line).expect("QMP speaks JSON")
    }

    /// Executes a QMP command.
    pub(crate) fn execute(&mut self, command: &str, arguments: &Value) -> Value {
        let request = json!({"execute": command, "arguments": arguments});
        let stream = self.qmp.get_mut();
        stream
            .write_all(format!("{request}\n").as_bytes())
            .expect("QMP takes a command");
        loop {
            let mut answer = self.read();
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            if answer.get("return").is_some() {
                return answer["return"].take();
            }
        }
    }

    /// Moves the guest to a machine that is incoming, at a bandwidth in bytes per second.
    pub(crate) fn migrate_to(&mut self, other: &Machine, bandwidth: u64) {
        self.execute(
            "migrate-set-parameters",
            &json!({"max-bandwidth": bandwidth, "downtime-limit": 500}),
        );
        let uri = format!("unix:{}", other.directory.path().join("incoming").display());
        self.execute("migrate", &json!({"uri": uri}));
        retry(|| {
            let info = self.execute("query-migrate", &json!({}));
            assert_ne!(info["status"], "failed", "{info}");
            (info["status"] == "completed").then_some(())
        });
    }

    /// What the guest's memory holds there.
    pub(crate) fn physical(&mut self, address: u64, size: u64) -> Vec<u8> {
        let path = self.directory.path().join("memory");
        self.execute(
            "pmemsave",
            &json!({"val": address, "size": size, "filename": path}),
        );
        std::fs::read(path).expect("QEMU saved the memory")
    }

    /// The host's end of the agent's channel.
    pub(crate) fn agent(&self) -> UnixStream {
        UnixStream::connect(self.directory.path().join("agent")).expect("the agent's channel")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
