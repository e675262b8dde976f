//! What survives a restart of the service: which VMs it has, running or not, and how its jobs ended. A file is
//! either the old one or the new one, never a part.
//!
//! Each file says of which version it is; one that says nothing is of version 0. A file that cannot be read, or is
//! of a newer version, is left as it is, and what it is about is held back.

use super::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};
use transhume_api::{JobInfo, JobState};
use transhume_base::bounded::read_text;
use transhume_base::durable;
use transhume_base::names::is_name;
use transhume_base::process_identity::{Identity, boot_id};
use transhume_hypervisor as hypervisor;
use transhume_machine::Definition;

const MAX_FILE: u64 = 2 << 20;
/// The version of the files that are written.
const VERSION: u32 = 1;

/// A VM that this host has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Record {
    /// The file's version.
    #[serde(default)]
    pub(super) version: u32,
    /// QEMU's QMP socket.
    pub(super) qmp: PathBuf,
    /// Whether it is started when the host is.
    #[serde(default)]
    pub(super) autostart: bool,
    /// The migration by which it arrives, as long as it has not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) arrival: Option<String>,
    /// That it does not run, and since when.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) stopped: Option<Stopped>,
    /// Its QEMU, or its last one; absent where the process is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) qemu: Option<Identity>,
    /// What the VM is made of.
    pub(super) definition: Definition,
}

/// How a VM stopped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Stopped {
    /// As in "its guest shut down".
    pub(super) reason: String,
    /// When that was noted, in milliseconds since 1970.
    pub(super) at_ms: u64,
    /// During which boot of the host it did.
    pub(super) boot: String,
}

impl Stopped {
    pub(super) fn now(reason: &str) -> Self {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Self {
            // QEMU's last words may be among it.
            reason: reason.chars().take(MAX_WORDS).collect(),
            at_ms: u64::try_from(now.as_millis()).unwrap_or_default(),
            boot: boot_id(),
        }
    }
}

/// Characters of a reason that are kept.
const MAX_WORDS: usize = 4096;

impl Record {
    /// Of a VM that runs, or is about to.
    pub(super) fn new(definition: Definition, qmp: PathBuf, qemu: Option<Identity>) -> Self {
        Self {
            version: VERSION,
            qmp,
            autostart: false,
            arrival: None,
            stopped: None,
            qemu,
            definition,
        }
    }

    /// The same VM when it has stopped.
    pub(super) fn stopped(self, reason: &str) -> Self {
        let mut stopped = Stopped::now(reason);
        if let Some(qemu) = &self.qemu {
            stopped.boot.clone_from(&qemu.boot);
        }
        Self {
            stopped: Some(stopped),
            ..self
        }
    }

    /// Why it does not run.
    pub(super) fn why(&self) -> &str {
        self.stopped
            .as_ref()
            .map_or("it has ended", |stopped| &stopped.reason)
    }

    /// Whether its QEMU has ended, when that cannot be connected to for this reason: nobody listens, and its process
    /// is gone.
    pub(super) fn has_ended(&self, error: &hypervisor::Error) -> bool {
        let hypervisor::Error::Connect { source, .. } = error else {
            return false;
        };
        let nobody = [io::ErrorKind::NotFound, io::ErrorKind::ConnectionRefused];
        nobody.contains(&source.kind()) && !self.qemu.as_ref().is_some_and(Identity::is_alive)
    }

    fn parse(text: &str) -> std::result::Result<Self, String> {
        let version: Version = toml::from_str(text).map_err(|error| error.to_string())?;
        version.check()?;
        let record: Self = toml::from_str(text).map_err(|error| error.to_string())?;
        record
            .definition
            .validate()
            .map_err(|error| error.to_string())?;
        Ok(Self {
            version: VERSION,
            ..record
        })
    }
}

#[derive(Deserialize)]
struct Version {
    #[serde(default)]
    version: u32,
}

impl Version {
    fn check(&self) -> std::result::Result<(), String> {
        if self.version > VERSION {
            return Err(format!(
                "it is of version {}, and this transhumed knows {VERSION} at most: bring it to the release that wrote it",
                self.version
            ));
        }
        Ok(())
    }
}

#[derive(Serialize)]
struct NotedJob<'a> {
    version: u32,
    #[serde(flatten)]
    job: &'a JobInfo,
}

/// A file that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unreadable {
    pub(super) path: PathBuf,
    /// The VM that it is about, as far as that can be seen.
    pub(super) vm: Option<String>,
    /// Why.
    pub(super) error: String,
}

impl Unreadable {
    /// The number of the job that it is about.
    pub(super) fn job(&self) -> Option<u64> {
        self.path.file_stem()?.to_str()?.parse().ok()
    }
}

/// What a folder holds.
#[derive(Debug)]
pub(super) struct Found<T> {
    pub(super) read: Vec<T>,
    pub(super) unreadable: Vec<Unreadable>,
}

/// The state directory.
#[derive(Debug)]
pub(super) struct State {
    vms: PathBuf,
    jobs: PathBuf,
}

impl State {
    /// Makes the directory if it is not there.
    pub(super) fn open(folder: &Path) -> Result<Self> {
        let state = Self {
            vms: folder.join("vms"),
            jobs: folder.join("jobs"),
        };
        for folder in [&state.vms, &state.jobs] {
            DirBuilder::new()
                .recursive(true)
                .mode(0o750)
                .create(folder)
                .map_err(|source| Error::File {
                    action: "create",
                    path: folder.clone(),
                    source,
                    cure: "; transhumed needs to write to its `state-directory`",
                })?;
        }
        Ok(state)
    }

    fn vm(&self, name: &str) -> PathBuf {
        self.vms.join(format!("{name}.toml"))
    }

    /// A VM that arrives has a file of its own beside the one of its name.
    fn arriving(&self, name: &str) -> PathBuf {
        self.vms.join(format!("{name}.arriving"))
    }

    fn job(&self, id: u64) -> PathBuf {
        self.jobs.join(format!("{id}.json"))
    }

    pub(super) fn save_vm(&self, record: &Record) -> Result<()> {
        write_record(&self.vm(&record.definition.name), record)
    }

    /// The note of a VM that was about to arrive becomes that of a VM of this host, which takes no room.
    pub(super) fn arrived(&self, record: &Record) -> Result<()> {
        let name = &record.definition.name;
        let path = self.vm(name);
        durable::rename(&self.arriving(name), &path)
            .map_err(|error| Error::file("write", &path, error))?;
        self.save_vm(record)
    }

    pub(super) fn forget_vm(&self, name: &str) -> Result<()> {
        remove(&self.vm(name))
    }

    pub(super) fn save_arriving(&self, record: &Record) -> Result<()> {
        write_record(&self.arriving(&record.definition.name), record)
    }

    pub(super) fn forget_arriving(&self, name: &str) -> Result<()> {
        remove(&self.arriving(name))
    }

    /// All VMs.
    pub(super) fn vms(&self) -> Result<Found<Record>> {
        let mut found = read_all(&self.vms, "toml", Record::parse)?;
        for record in &mut found.read {
            // It has arrived: this was renamed, and not written anew.
            record.arrival = None;
        }
        for one in &mut found.unreadable {
            let name = one.path.file_stem().and_then(|name| name.to_str());
            one.vm = name.filter(|name| is_name(name)).map(str::to_owned);
        }
        Ok(found)
    }

    /// VMs that were about to arrive.
    pub(super) fn arrivals(&self) -> Result<Vec<Record>> {
        Ok(read_all(&self.vms, "arriving", Record::parse)?.read)
    }

    pub(super) fn save_job(&self, job: &JobInfo) -> Result<()> {
        let path = self.job(job.id);
        let version = VERSION;
        let text = serde_json::to_vec(&NotedJob { version, job })
            .map_err(|error| Error::file("write", &path, error.into()))?;
        let is_over = job.state != JobState::Running && !job.in_doubt;
        let written = if is_over {
            durable::conclude(&path, &text)
        } else {
            durable::replace(&path, &text)
        };
        written.map_err(|error| Error::file("write", &path, error))
    }

    pub(super) fn forget_job(&self, id: u64) -> Result<()> {
        remove(&self.job(id))
    }

    /// All jobs, the oldest first.
    pub(super) fn jobs(&self) -> Result<Found<JobInfo>> {
        let parse = |text: &str| -> std::result::Result<JobInfo, String> {
            let version: Version = serde_json::from_str(text).map_err(|error| error.to_string())?;
            version.check()?;
            serde_json::from_str(text).map_err(|error| error.to_string())
        };
        let mut found = read_all(&self.jobs, "json", parse)?;
        found.read.sort_by_key(|job| job.id);
        for one in &mut found.unreadable {
            one.vm = vm_of_job(&one.path);
        }
        Ok(found)
    }
}

/// The VM of a job whose file cannot be read as a whole: what stands behind `"vm":` near its beginning.
fn vm_of_job(path: &Path) -> Option<String> {
    use io::Read;
    let mut bytes = Vec::new();
    let file = fs::File::open(path).ok()?;
    file.take(4096).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let (_, rest) = text.split_once("\"vm\"")?;
    let name = rest.trim_start().strip_prefix(':')?.trim_start();
    let (name, _) = name.strip_prefix('"')?.split_once('"')?;
    is_name(name).then(|| name.to_owned())
}

fn write_record(path: &Path, record: &Record) -> Result<()> {
    let text = toml::to_string(record)
        .map_err(|error| Error::file("write", path, io::Error::other(error)))?;
    durable::replace(path, text.as_bytes()).map_err(|error| Error::file("write", path, error))
}

fn remove(path: &Path) -> Result<()> {
    durable::remove(path).map_err(|error| Error::file("remove", path, error))
}

fn read_all<T>(
    folder: &Path,
    extension: &str,
    parse: impl Fn(&str) -> std::result::Result<T, String>,
) -> Result<Found<T>> {
    let list = |error| Error::file("list", folder, error);
    let (mut all, mut unreadable) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(folder).map_err(list)? {
        let path = entry.map_err(list)?.path();
        if path.extension().is_none_or(|found| found != extension) {
            continue;
        }
        let read = read_text(&path, MAX_FILE).map_err(|error| error.to_string());
        match read.and_then(|text| parse(&text)) {
            Ok(one) => all.push(one),
            Err(error) => {
                tracing::error!(path = %path.display(), error, "cannot read what was saved; left as it is");
                unreadable.push(Unreadable {
                    path,
                    vm: None,
                    error,
                });
            }
        }
    }
    Ok(Found {
        read: all,
        unreadable,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(name: &str) -> Record {
        let text = format!(
            "name = \"{name}\"\nmachine = \"pc\"\nmemory = \"64MiB\"\nvcpus = 1\n\
             disk = [{{ id = \"root\", format = \"raw\", path = \"/a\" }}]\n"
        );
        let definition = Definition::parse(&text).expect("a definition");
        Record::new(definition, "/run/a.sock".into(), None)
    }

    #[test]
    fn keeps_vms() {
        let folder = tempfile::tempdir().expect("a folder");
        let state = State::open(folder.path()).expect("a state");
        state.save_vm(&record("a")).expect("saved");
        state.save_vm(&record("b")).expect("saved");
        state.save_vm(&record("a")).expect("saved again");
        let again = State::open(folder.path()).expect("a state");
        let mut found = again.vms().expect("VMs").read;
        found.sort_by(|one, other| one.definition.name.cmp(&other.definition.name));
        assert_eq!(found, [record("a"), record("b")]);
        again.forget_vm("a").expect("forgotten");
        again.forget_vm("a").expect("forgotten twice");
        assert_eq!(again.vms().expect("VMs").read, [record("b")]);
    }

    #[test]
    fn what_it_cannot_read_is_left_and_told() {
        let folder = tempfile::tempdir().expect("a folder");
        let state = State::open(folder.path()).expect("a state");
        state.save_vm(&record("a")).expect("saved");
        let bad = folder.path().join("vms/bad.toml");
        fs::write(&bad, "qmp = 1").expect("written");
        fs::write(folder.path().join("vms/c.new"), "half").expect("written");
        let found = state.vms().expect("VMs");
        assert_eq!(found.read, [record("a")]);
        assert_eq!(found.unreadable[0].vm.as_deref(), Some("bad"));
        assert!(bad.exists());
    }

    #[test]
    fn files_of_older_versions_are_read_and_of_newer_ones_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let state = State::open(folder.path()).expect("a state");
        let definition =
            "[definition]\nname = \"a\"\nmachine = \"pc\"\nmemory = \"64MiB\"\nvcpus = 1\n";
        let path = folder.path().join("vms/a.toml");
        fs::write(&path, format!("qmp = \"/q\"\n{definition}")).expect("written");
        let old = state.vms().expect("VMs").read.remove(0);
        assert_eq!((old.qemu, old.stopped, old.autostart), (None, None, false));
        fs::write(&path, format!("version = 9\nnew = 1\n{definition}")).expect("written");
        let found = state.vms().expect("VMs");
        assert!(found.read.is_empty());
        assert!(found.unreadable[0].error.contains("version 9"));

        let path = folder.path().join("jobs/7.json");
        for text in [
            r#"{"version":9,"id":7,"vm":"web1","more":1}"#,
            r#"{"id":7,"vm":"web1","from""#,
        ] {
            fs::write(&path, text).expect("written");
            let found = state.jobs().expect("jobs");
            assert!(found.read.is_empty());
            let one = &found.unreadable[0];
            assert_eq!((one.job(), one.vm.as_deref()), (Some(7), Some("web1")));
        }
    }

    #[test]
    fn how_a_vm_stopped_is_kept() {
        let folder = tempfile::tempdir().expect("a folder");
        let state = State::open(folder.path()).expect("a state");
        let mut before = record("a");
        before.autostart = true;
        before.qemu = Identity::find(std::process::id());
        let before = before.stopped("its guest shut down");
        state.save_vm(&before).expect("saved");
        state.save_arriving(&record("a")).expect("saved");
        assert_eq!(state.vms().expect("VMs").read, [before]);
        assert_eq!(state.arrivals().expect("VMs"), [record("a")]);
        state.forget_arriving("a").expect("forgotten");
        assert!(state.arrivals().expect("VMs").is_empty());
    }

    #[test]
    fn bounds_what_it_reads() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("file");
        fs::write(&path, "12345").expect("written");
        assert_eq!(read_text(&path, 5).expect("a text"), "12345");
        assert!(read_text(&path, 4).is_err());
    }
}
