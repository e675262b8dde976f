//! A host's Transhume: its daemon, and the command line that talks to it.

use super::{HOST_A, HOST_B, Host, Hosts, Link, TAP};
use crate::cleanup::{Guard, Leftover};
use crate::command::{Process, Run};
use crate::guest::build;
use crate::{Error, Result};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::Once;
use std::time::{Duration, Instant, SystemTime};

/// The daemons' port on the link.
pub const PORT: u16 = 7465;
const PATIENCE: Duration = Duration::from_secs(20);

/// A running `transhumed`. Dropping it kills it.
#[derive(Debug)]
pub struct Daemon {
    host: Host,
    programs: PathBuf,
    process: Process,
    log: PathBuf,
}

/// A job as `transhume job show --follow --json` tells of it, and when it did.
#[derive(Debug, Clone)]
pub struct Message {
    /// When.
    pub at: SystemTime,
    /// The job.
    pub value: Value,
}

/// How a `transhume` ended.
#[derive(Debug)]
pub struct Ended {
    /// Its exit code.
    pub code: i32,
    /// Its messages.
    pub messages: Vec<Message>,
    /// What it said to people.
    pub errors: String,
}

/// Makes a host's certificate, and the authority before the first one; what transhumed.toml says of them.
fn certificates(hosts: &Hosts, host: &Host, programs: &Path) -> Result<String> {
    let folder = host.folder.join("pki");
    let authority = hosts.a.folder.join("authority");
    let pki = |arguments: &[&str]| -> Result<()> {
        Run::new(programs.join("transhume"))
            .arg("pki")
            .args(arguments)
            .args(["--dir".as_ref(), authority.as_os_str()])
            .cure("See its words")
            .output()
            .map(drop)
    };
    if !authority.exists() {
        pki(&["init"])?;
    }
    if !folder.exists() {
        let out = folder.display().to_string();
        pki(&["issue", host.name, "--out", &out])?;
    }
    Ok(format!(
        "\n[tls]\nauthority = \"{}\"\ncertificate = \"{}\"\nkey = \"{}\"\n",
        authority.join("ca.crt").display(),
        folder.join(format!("{}.crt", host.name)).display(),
        folder.join(format!("{}.key", host.name)).display(),
    ))
}

/// Who a QEMU runs as: somebody without rights, if there is anybody and others get through to that QEMU, which is
/// unpacked below this tree; else root, which is said.
pub(crate) fn qemu_user(qemu: &Path) -> &'static str {
    static SAID: Once = Once::new();
    let closed = |folder: &&Path| {
        fs::metadata(folder).is_ok_and(|found| found.permissions().mode() & 0o001 == 0)
    };
    match nix::unistd::User::from_name("nobody") {
        Ok(Some(_)) => {}
        _ => return "root",
    }
    let Some(folder) = qemu.ancestors().skip(1).find(closed) else {
        return "nobody";
    };
    SAID.call_once(|| {
        println!(
            "  QEMU runs as root (without capabilities), as users without rights do not get through {}: chmod o+x lets \
             them",
            folder.display()
        );
    });
    "root"
}

/// Lets users without rights catch page faults, those of the kernel's included.
const SYSCTL: &str = "/proc/sys/vm/unprivileged_userfaultfd";

/// Puts back at a run's end what hosts set for the whole machine. The processes that a run starts leave that to it, as
/// others may be at work.
pub fn keep_settings() -> Option<Guard> {
    if std::env::var_os(build::RUN).is_some() {
        return None;
    }
    let value = fs::read_to_string(SYSCTL).ok()?;
    Some(Guard::new(Leftover::Setting(SYSCTL, value)))
}

/// A script that gives a host files of its own: what lies over others, and devices where this machine's are for root
/// alone, which udev's rules do on hosts. It ends in "&&" if there is anything to do.
fn own_files(host: &Host, qemu: &Path) -> Result<String> {
    let mut script = Vec::new();
    let folder = host.folder.join("devices");
    let folder = folder.display();
    // It knows no device: the kernel lets it only by this switch.
    let is_old = qemu.components().any(|part| part.as_os_str() == "qemu-7.2");
    if is_old && fs::read_to_string(SYSCTL).is_ok_and(|value| value.trim() == "0") {
        println!("  vm.unprivileged_userfaultfd = 1, for QEMU 7.2");
        fs::write(SYSCTL, "1").map_err(Error::file("write", SYSCTL))?;
    }
    for name in ["kvm", "userfaultfd"] {
        let device = Path::new("/dev").join(name);
        let is_covered = host.covered.iter().any(|(_, under)| *under == device);
        let Ok(found) = fs::metadata(&device) else {
            continue;
        };
        if is_covered || found.permissions().mode() & 0o006 == 0o006 {
            continue;
        }
        if script.is_empty() {
            script.push(format!(
                "mkdir -p {folder} && mount -t tmpfs -o mode=755 tmpfs {folder}"
            ));
        }
        let (major, minor) = (
            nix::sys::stat::major(found.rdev()),
            nix::sys::stat::minor(found.rdev()),
        );
        script.push(format!(
            "mknod -m 666 {folder}/{name} c {major} {minor} && mount --bind {folder}/{name} /dev/{name}"
        ));
    }
    for (over, under) in &host.covered {
        let (over, under) = (over.display(), under.display());
        script.push(format!("mount --bind '{over}' '{under}'"));
    }
    script.push(String::new());
    Ok(script.join(" && "))
}

impl Daemon {
    /// Starts a host's daemon and waits until it answers.
    pub fn start(hosts: &Hosts, host: &Host, programs: &Path, qemu: &Path) -> Result<Self> {
        let peer = if host.name == HOST_A {
            &hosts.b
        } else {
            &hosts.a
        };
        let configuration = host.folder.join("transhumed.toml");
        let link = match hosts.link {
            Link::Tls => certificates(hosts, host, programs)?,
            Link::Plain => "plain-link = true\n".to_owned(),
        };
        let rules = match &host.rules {
            Some(rules) => rules.clone(),
            None => Self::rules(peer, programs),
        };
        fs::write(
            &configuration,
            Self::configuration(host, qemu, &host.qemu(qemu)?, &link, &rules),
        )
        .map_err(Error::file("write", &configuration))?;
        let log = host.folder.join("transhumed.log");
        let output = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .map_err(Error::file("open", &log))?;
        let errors = output.try_clone().map_err(Error::file("copy", &log))?;
        let program = programs.join("transhumed");
        let own = own_files(host, qemu)?;
        let run = if own.is_empty() {
            host.run("sh")?
        } else {
            // In a mount namespace of its own.
            host.run("unshare")?
                .args(["--mount", "--propagation", "slave", "sh"])
        };
        let run = run
            // The limit as the unit has it, by what hosts that run as guests have too; in KiB.
            .arg("-c")
            .arg(format!("{own}ulimit -S -d \"$0\" && exec \"$@\""))
            .arg((2 << 20).to_string())
            .arg(program);
        let mut run = run
            .arg("--config")
            .arg(&configuration)
            .cure("Build it: cargo build --release -p transhume-control -p transhume-cli");
        run.command()
            .stdout(Stdio::from(output))
            .stderr(Stdio::from(errors));
        let daemon = Self {
            host: host.clone(),
            programs: programs.to_owned(),
            process: run.spawn()?,
            log,
        };
        daemon.wait_until_it_answers()?;
        Ok(daemon)
    }

    /// Lets the other host's VMs use what this test makes, and what is nowhere.
    fn rules(peer: &Host, programs: &Path) -> String {
        format!(
            "[incoming]\npaths = [\"{}\", \"/srv\", \"/dev\"]\naccelerators = [\"tcg\", \"kvm\"]\ntaps = [\"{TAP}\"]\n[hosts.{}]\naddress = \"{}:{PORT}\"\n",
            programs.parent().unwrap_or(programs).display(),
            peer.name,
            peer.address,
        )
    }

    /// `started` is what stands for the QEMU.
    fn configuration(host: &Host, qemu: &Path, started: &Path, link: &str, rules: &str) -> String {
        let mut text = String::new();
        if let Some(channels) = host.qemu_channels {
            let _ = writeln!(text, "qemu-channels = {channels}");
        }
        let _ = write!(
            text,
            "host = \"{}\"\nqemu-user = \"{}\"\nlisten = \"{}:{PORT}\"\nrun-directory = \"{}\"\nstate-directory = \"{}\"\nlog-directory = \"{}\"\nlog-size = \"64KiB\"\nqemu = \"{}\"\n{link}\n{rules}",
            host.name,
            qemu_user(qemu),
            host.address,
            host.folder.join("run").display(),
            host.folder.join("state").display(),
            host.folder.join("log").display(),
            started.display(),
        );
        text
    }

    fn socket(&self) -> PathBuf {
        self.host.folder.join("run/control.sock")
    }

    fn wait_until_it_answers(&self) -> Result<()> {
        let start = Instant::now();
        while UnixStream::connect(self.socket()).is_err() {
            self.alive()?;
            if start.elapsed() > PATIENCE {
                return Err(Error::Late {
                    what: format!("transhumed's control socket on {}", self.host.name),
                    seconds: PATIENCE.as_secs(),
                    hint: self.words(),
                });
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// All of its log.
    pub(crate) fn log(&self) -> Result<String> {
        fs::read_to_string(&self.log).map_err(Error::file("read", &self.log))
    }

    /// The end of its log.
    pub fn words(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }

    /// How often its log has these words.
    pub fn count_words(&self, words: &str) -> usize {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        text.matches(words).count()
    }

    /// The lines of its log that have these words.
    pub fn lines_with(&self, words: &str) -> Vec<String> {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines = text.lines().filter(|line| line.contains(words));
        lines.map(str::to_owned).collect()
    }

    /// Waits until it has ended by itself.
    pub fn wait(&mut self) -> Result<()> {
        self.process.wait().map(drop)
    }

    /// Fails when it has ended.
    pub fn alive(&self) -> Result<()> {
        if self.process.ended() {
            return Err(Error::Check(format!(
                "transhumed on {} has ended:\n{}",
                self.host.name,
                self.words()
            )));
        }
        Ok(())
    }

    /// Kills it as a crash would.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.process.signal(signal)
    }

    /// The most memory that it ever had, in bytes.
    pub fn peak_memory(&self) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.id())).ok()?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))?;
        Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
    }

    /// The memory that is its own now, without files that are mapped, in bytes.
    pub fn own_memory(&self) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.id())).ok()?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:"))?;
        Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
    }

    /// How many threads of that name it has.
    pub fn threads(&self, name: &str) -> usize {
        let folder = format!("/proc/{}/task", self.process.id());
        let threads = fs::read_dir(folder).into_iter().flatten().flatten();
        let names = threads.map(|thread| fs::read_to_string(thread.path().join("comm")));
        names
            .filter(|found| found.as_deref().is_ok_and(|found| found.trim_end() == name))
            .count()
    }

    /// Its process id.
    pub fn id(&self) -> i32 {
        self.process.id()
    }

    /// The run folder of a VM on this host.
    pub fn vm_folder(&self, vm: &str) -> PathBuf {
        self.host.folder.join("run/vms").join(vm)
    }

    /// A VM's folder of logs.
    pub fn vm_logs(&self, vm: &str) -> PathBuf {
        self.host.folder.join("log").join(vm)
    }

    /// A `transhume` that talks to this daemon.
    pub(crate) fn transhume(&self, arguments: &[&str]) -> Run {
        Run::new(self.programs.join("transhume"))
            .env("TRANSHUME_SOCKET", self.socket())
            .args(arguments)
            .cure("See its words, and the daemons' logs")
    }

    /// Runs `transhume` to its end, whatever that is.
    pub fn try_run(&self, arguments: &[&str]) -> Result<Output> {
        self.transhume(arguments).finish().map(|(_, output)| output)
    }

    /// Runs `transhume`; anything but success is an error.
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        self.transhume(arguments)
            .text()
            .map_err(|error| self.with_log(error))
    }

    fn with_log(&self, error: Error) -> Error {
        match error {
            Error::Command {
                program,
                status,
                cure,
                output,
            } => {
                let output = format!(
                    "{output}\ntranshumed on {}:\n{}",
                    self.host.name,
                    self.words()
                );
                Error::Command {
                    program,
                    status,
                    cure,
                    output,
                }
            }
            other => other,
        }
    }

    /// Begins a migration and follows it to its end, with each message shown to `watch` as it comes.
    pub fn migrate(&self, vm: &str, watch: impl FnMut(&Message)) -> Result<Ended> {
        self.migrate_by(vm, &[], watch)
    }

    /// The same with more arguments for `transhume migrate`.
    pub fn migrate_by(
        &self,
        vm: &str,
        arguments: &[&str],
        mut watch: impl FnMut(&Message),
    ) -> Result<Ended> {
        let to = if self.host.name == HOST_A {
            HOST_B
        } else {
            HOST_A
        };
        let fixed = ["migrate", vm, "--to", to, "--detach", "--json"];
        let begun = self.run(&[&fixed, arguments].concat())?;
        let id = serde_json::from_str::<Value>(&begun)
            .ok()
            .and_then(|job| job["id"].as_u64());
        let id = id.ok_or_else(|| Error::Check(format!("No job: {begun}")))?;
        let mut run = self.transhume(&["job", "show", &id.to_string(), "--follow", "--json"]);
        run.command().stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut process = run.spawn()?;
        let out = process.child().stdout.take();
        let mut err = process.child().stderr.take();
        let mut messages = Vec::new();
        let errors = std::thread::scope(|scope| {
            let errors = scope.spawn(|| {
                let mut text = String::new();
                if let Some(err) = err.as_mut() {
                    // What came before an error is what there is to show.
                    let _ = err.read_to_string(&mut text);
                }
                text
            });
            for line in out.into_iter().flat_map(|out| BufReader::new(out).lines()) {
                let Ok(line) = line else { break };
                if let Ok(value) = serde_json::from_str(&line) {
                    let message = Message {
                        at: SystemTime::now(),
                        value,
                    };
                    watch(&message);
                    messages.push(message);
                }
            }
            errors.join().unwrap_or_default()
        });
        let status = process.wait()?;
        crate::cleanup::still_time()?;
        Ok(Ended {
            code: status.code().unwrap_or(-1),
            messages,
            errors,
        })
    }
}
