//! The fixture: two hosts with their daemons, and a micro-guest that runs on one of them.

use super::Bed;
use super::copies::Copies;
use super::micro::{Life, Micro, NAME, Qemus};
use super::transhume::{Answer, Running, ask, begin};
use crate::cleanup::still_time;
use crate::command::Process;
use crate::error::check;
use crate::hosts::daemon::Daemon;
use crate::hosts::{HOST_A, HOST_B, Host, Hosts, Link, Rate};
use crate::packages::Qemu;
use crate::{Error, Result};
use serde_json::Value;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

/// Bounds every wait for something that the daemons do by themselves.
const PATIENCE: Duration = Duration::from_secs(60);
/// In bytes.
const MOST_MEMORY: u64 = 256 << 20;
/// What both hosts run unless a scenario says otherwise.
pub(super) const NEWEST: Qemus = (Qemu::V10_0, Qemu::V10_0);

/// Those that keep a VM in post-copy until its devices are loaded at its destination.
pub(super) const KEEPS: Qemus = (Qemu::V11_1, Qemu::V11_1);

/// One of the hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum At {
    /// Where guests start.
    A,
    /// Where they move to.
    B,
}

impl At {
    pub(super) fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::A => HOST_A,
            Self::B => HOST_B,
        }
    }
}

/// Both hosts. What runs on them ends when this is dropped, the daemons first.
pub(super) struct Pair<'a> {
    pub(super) bed: &'a Bed,
    pub(super) a: Daemon,
    pub(super) b: Daemon,
    pub(super) hosts: Hosts,
    pub(super) copies: Copies,
    qemus: (PathBuf, PathBuf),
    /// Where guests start.
    first: Qemu,
}

impl<'a> Pair<'a> {
    /// Two hosts and their daemons, no guest yet.
    pub(super) fn new(bed: &'a Bed, qemus: Qemus, rate: Rate) -> Result<Self> {
        Self::on(bed, qemus, Hosts::new(rate)?)
    }

    /// The same with QEMUs that hand memory over through so many channels.
    pub(super) fn with_channels(
        bed: &'a Bed,
        qemus: Qemus,
        rate: Rate,
        channels: u8,
    ) -> Result<Self> {
        let mut hosts = Hosts::new(rate)?;
        for host in [&mut hosts.a, &mut hosts.b] {
            host.qemu_channels = Some(channels);
        }
        Self::on(bed, qemus, hosts)
    }

    /// The same without encryption, to speak to a daemon as another host would.
    pub(super) fn plain(bed: &'a Bed, qemus: Qemus, rate: Rate) -> Result<Self> {
        let mut hosts = Hosts::new(rate)?;
        hosts.link = Link::Plain;
        Self::on(bed, qemus, hosts)
    }

    /// The same with little room for the daemons' state: see [`Pair::fill_state`].
    pub(super) fn with_small_state(bed: &'a Bed, qemus: Qemus, rate: Rate) -> Result<Self> {
        let mut hosts = Hosts::new(rate)?;
        hosts.limit_state()?;
        Self::on(bed, qemus, hosts)
    }

    /// Leaves no room for a daemon's state.
    pub(super) fn fill_state(&self, at: At) -> Result<()> {
        let path = self.host(at).state_folder().join("ballast");
        let mut file = fs::File::create(&path).map_err(Error::file("create", &path))?;
        while file.write_all(&[0; 4096]).is_ok() {}
        Ok(())
    }

    /// Gives the room back.
    pub(super) fn empty_state(&self, at: At) -> Result<()> {
        let path = self.host(at).state_folder().join("ballast");
        fs::remove_file(&path).map_err(Error::file("remove", &path))
    }

    /// Two daemons on these hosts.
    pub(super) fn on(bed: &'a Bed, qemus: Qemus, mut hosts: Hosts) -> Result<Self> {
        let copies = Copies::watch([&mut hosts.a, &mut hosts.b])?;
        let (first, second) = qemus;
        let qemus = (bed.packages.qemu(first)?, bed.packages.qemu(second)?);
        let programs = bed.programs()?;
        let a = Daemon::start(&hosts, &hosts.a, programs, &qemus.0)?;
        let b = Daemon::start(&hosts, &hosts.b, programs, &qemus.1)?;
        Ok(Self {
            bed,
            a,
            b,
            hosts,
            copies,
            qemus,
            first,
        })
    }

    /// The QEMU where guests start.
    pub(super) fn first_qemu(&self) -> Qemu {
        self.first
    }

    /// A host's daemon.
    pub(super) fn daemon(&self, at: At) -> &Daemon {
        match at {
            At::A => &self.a,
            At::B => &self.b,
        }
    }

    /// A host.
    pub(super) fn host(&self, at: At) -> &Host {
        match at {
            At::A => &self.hosts.a,
            At::B => &self.hosts.b,
        }
    }

    /// Starts a daemon again that was killed.
    pub(super) fn restart(&mut self, at: At) -> Result<()> {
        let programs = self.bed.programs()?;
        match at {
            At::A => {
                self.a = Daemon::start(&self.hosts, &self.hosts.a, programs, &self.qemus.0)?;
            }
            At::B => {
                self.b = Daemon::start(&self.hosts, &self.hosts.b, programs, &self.qemus.1)?;
            }
        }
        Ok(())
    }

    /// Writes a definition where `transhume vm start` can read it.
    pub(super) fn write(&self, definition: &str) -> Result<String> {
        let path = self.hosts.a.folder.join("definition.toml");
        fs::write(&path, definition).map_err(Error::file("write", &path))?;
        Ok(path.display().to_string())
    }

    /// Starts a guest at the first host, and lets it check itself there.
    pub(super) fn boot(&self, micro: &Micro) -> Result<Life> {
        self.boot_definition(&micro.definition_for(self.bed, self.first)?)
    }

    /// The same with a definition of its own.
    pub(super) fn boot_definition(&self, definition: &str) -> Result<Life> {
        let path = self.write(definition)?;
        ask(&self.a, &["vm", "start", &path])?.expect(0)?;
        let mut life = Life::begin(&self.folder(At::A))?;
        life.check()?;
        Ok(life)
    }

    /// Starts a guest's QEMU by hand at the first host, with the arguments that `vm arguments` tells, and
    /// lets the daemon adopt it.
    pub(super) fn adopt(&self, micro: &Micro) -> Result<(Process, Life)> {
        self.adopt_with(micro, &[])
    }

    /// The same with more arguments for QEMU.
    pub(super) fn adopt_with(&self, micro: &Micro, more: &[&str]) -> Result<(Process, Life)> {
        let path = self.write(&micro.definition_for(self.bed, self.first)?)?;
        let arguments = ask(&self.a, &["vm", "arguments", &path])?.expect(0)?;
        let mut arguments = arguments
            .value
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|argument| argument.as_str());
        let folder = self.folder(At::A);
        for folder in [&folder, &self.a.vm_logs(NAME)] {
            fs::create_dir_all(folder).map_err(Error::file("create", folder))?;
        }
        let mut run = self.hosts.a.run(arguments.next().unwrap_or_default())?;
        run.command().stdout(Stdio::null());
        let qemu = run.args(arguments).args(more).spawn()?;
        let qmp = folder.join("qmp.sock");
        self.wait("QEMU to listen", || Ok(qmp.exists()))?;
        let qmp = qmp.display().to_string();
        ask(&self.a, &["vm", "adopt", &path, "--qmp", &qmp])?.expect(0)?;
        // As all QEMUs that are started with these arguments it waits to be told.
        ask(&self.a, &["vm", "resume", NAME])?.expect(0)?;
        let mut life = Life::begin(&folder)?;
        life.check()?;
        Ok((qemu, life))
    }

    /// The guest's run folder.
    pub(super) fn folder(&self, at: At) -> PathBuf {
        self.daemon(at).vm_folder(NAME)
    }

    /// Moves the guest away from a host.
    pub(super) fn migrate(&self, from: At, more: &[&str]) -> Result<Answer> {
        self.begin_migration(from, more)?.end()
    }

    /// Begins to move the guest away from a host.
    pub(super) fn begin_migration(&self, from: At, more: &[&str]) -> Result<Running> {
        let to = from.other().name();
        let arguments = [&["migrate", NAME, "--to", to], more].concat();
        begin(self.daemon(from), &arguments)
    }

    /// Moves the guest and checks all that must hold then. The command's answer is returned.
    pub(super) fn moves(&self, from: At, life: &mut Life) -> Result<Answer> {
        self.moves_by(from, &[], life)
    }

    /// The same with more arguments.
    pub(super) fn moves_by(&self, from: At, more: &[&str], life: &mut Life) -> Result<Answer> {
        let answer = self.migrate(from, more)?;
        let answer = answer.expect(0).map_err(|error| self.with_logs(error))?;
        check(answer.word("/state")? == "completed", || {
            format!("Not completed: {answer}")
        })?;
        self.arrived(from.other(), life)
            .map_err(|error| self.with_logs(error))?;
        self.daemons_are_small()?;
        let shown = |path: &str| answer.number(&format!("/summary/traffic/{path}"));
        println!(
            "  {} to {}: {:.1} s, downtime {:.0} ms; pages: zero {}, disk {}, data {}, again {}, unchanged {}, mismatched {}, late {}",
            from.name(),
            from.other().name(),
            answer.value["summary"]["total-ms"]
                .as_f64()
                .unwrap_or_default()
                / 1000.0,
            answer.value["summary"]["downtime"]["total-ms"]
                .as_f64()
                .unwrap_or_default(),
            shown("zero-pages")?,
            shown("disk-pages")?,
            shown("data-pages")?,
            shown("resent-pages")?,
            shown("unchanged-pages")?,
            shown("mismatched-pages")?,
            shown("late-pages")?,
        );
        Ok(answer)
    }

    /// The most memory that a daemon may ever have, whatever the guest does.
    pub(super) fn daemons_are_small(&self) -> Result<()> {
        let peaks = [&self.a, &self.b].map(|daemon| daemon.peak_memory().unwrap_or(0) >> 20);
        println!("  peak memory of the daemons: {peaks:?} MiB");
        for at in [At::A, At::B] {
            let peak = self.daemon(at).peak_memory().unwrap_or(u64::MAX);
            check(peak < MOST_MEMORY, || {
                format!("transhumed on {} had {} MiB", at.name(), peak >> 20)
            })?;
        }
        Ok(())
    }

    /// The guest runs there, exactly once, with its memory right.
    pub(super) fn arrived(&self, at: At, life: &mut Life) -> Result<()> {
        life.moved(&self.folder(at))?;
        self.runs_once(at)?;
        life.check()?;
        life.goes_on()
    }

    /// The guest still runs there, exactly once, with its memory right, and nothing is left at the other
    /// host.
    pub(super) fn stayed(&self, at: At, life: &mut Life) -> Result<()> {
        let mut stayed = || -> Result<()> {
            life.goes_on()?;
            self.runs_once(at)?;
            life.check()?;
            life.goes_on()?;
            self.nothing_left(at.other())
        };
        stayed().map_err(|error| self.with_logs(error))
    }

    /// One host lists the guest as running, the other does not list it and has no process of it. Their QEMUs say the same,
    /// and that no two ran it at any time.
    fn runs_once(&self, at: At) -> Result<()> {
        self.copies.one_runs(at)?;
        let here = ask(self.daemon(at), &["vm", "show", NAME])?.expect(0)?;
        check(here.word("/state")? == "running", || {
            format!("The guest does not run at {}: {here}", at.name())
        })?;
        let pid = here.number("/machine/pid")?;
        let qemus = self.qemus(at);
        check(
            qemus
                .iter()
                .map(|one| u64::from(one.unsigned_abs()))
                .eq([pid]),
            || format!("{} runs {qemus:?} instead of {pid} alone", at.name()),
        )?;
        let other = at.other();
        self.wait("the guest to be off the other host's list", || {
            let list = ask(self.daemon(other), &["vm", "list"])?.expect(0)?;
            Ok(list.value.as_array().is_some_and(Vec::is_empty))
        })?;
        self.wait("the other host's QEMU to be gone", || {
            Ok(self.qemus(other).is_empty())
        })
    }

    /// The QEMU that a host has.
    pub(super) fn qemu(&self, at: At) -> &Path {
        match at {
            At::A => &self.qemus.0,
            At::B => &self.qemus.1,
        }
    }

    /// The QEMUs of guests on a host.
    pub(super) fn qemus(&self, at: At) -> Vec<i32> {
        let is_qemu = |process: &i32| {
            let line = fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
            line.split(|byte| *byte == 0).any(|word| word == b"-name")
        };
        let mut all = self.host(at).processes();
        all.retain(is_qemu);
        all
    }

    /// A host has no process but its daemon, and no file of the guest's run.
    pub(super) fn nothing_left(&self, at: At) -> Result<()> {
        let daemon = self.daemon(at).id();
        self.wait("all processes but the daemon to be gone", || {
            Ok(self.host(at).processes() == [daemon])
        })?;
        let folder = self.folder(at);
        self.wait("the folder of the guest's run to be gone", || {
            Ok(!folder.exists())
        })
    }

    /// Waits until something holds.
    pub(super) fn wait(&self, what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
        let start = Instant::now();
        while !holds()? {
            still_time()?;
            if start.elapsed() > PATIENCE {
                return Err(Error::Late {
                    what: what.into(),
                    seconds: PATIENCE.as_secs(),
                    hint: self.logs(),
                });
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Waits until a migration copies memory, and returns its job's number.
    pub(super) fn in_pre_copy(&self, from: At) -> Result<String> {
        self.job_when(from, "the migration to copy memory", |job| {
            job["progress"]["phase"] == "pre-copy"
                && job["progress"]["traffic"]["wire-bytes"].as_u64() > Some(256 << 10)
        })
    }

    /// Waits until the last job, which must not end before, is as it should be; returns its number.
    pub(super) fn job_when(
        &self,
        from: At,
        what: &str,
        is_so: impl Fn(&Value) -> bool,
    ) -> Result<String> {
        let mut id = None;
        self.wait(what, || {
            let jobs = ask(self.daemon(from), &["job", "list"])?.expect(0)?;
            let last = jobs.value.as_array().and_then(|jobs| jobs.last());
            let Some(job) = last else { return Ok(false) };
            check(job["state"] == "running", || {
                format!("The migration ended early: {job}")
            })?;
            id = job["id"].as_u64();
            Ok(is_so(job))
        })?;
        id.map(|id| id.to_string())
            .ok_or_else(|| Error::Check("The job has no number".into()))
    }

    fn logs(&self) -> String {
        format!(
            "transhumed on {HOST_A}:\n{}\ntranshumed on {HOST_B}:\n{}",
            self.a.words(),
            self.b.words()
        )
    }

    /// What went wrong, and what the daemons say of it.
    pub(super) fn with_logs(&self, error: Error) -> Error {
        match error {
            Error::Interrupted => error,
            error => Error::Check(format!("{error}\n{}", self.logs())),
        }
    }
}
