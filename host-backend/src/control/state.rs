//! What survives a restart of the service: which VMs it had, and how its jobs ended. A file is either
//! the old one or the new one, never a part.

use super::api::JobInfo;
use super::{Error, Result};
use crate::bounded::read_text;
use crate::durable;
use crate::hypervisor::Definition;
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

const MAX_FILE: u64 = 2 << 20;

/// A VM that this host has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct Record {
    /// QEMU's QMP socket.
    pub(super) qmp: PathBuf,
    /// What the VM is made of.
    pub(super) definition: Definition,
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

    fn job(&self, id: u64) -> PathBuf {
        self.jobs.join(format!("{id}.json"))
    }

    pub(super) fn save_vm(&self, record: &Record) -> Result<()> {
        let path = self.vm(&record.definition.name);
        let text = toml::to_string(record)
            .map_err(|error| Error::file("write", &path, io::Error::other(error)))?;
        durable::replace(&path, text.as_bytes()).map_err(|error| Error::file("write", &path, error))
    }

    pub(super) fn forget_vm(&self, name: &str) -> Result<()> {
        remove(&self.vm(name))
    }

    /// All VMs; what cannot be read is told in the log and left alone.
    pub(super) fn vms(&self) -> Result<Vec<Record>> {
        let parse = |text: &str| -> std::result::Result<Record, String> {
            let record: Record = toml::from_str(text).map_err(|error| error.to_string())?;
            record
                .definition
                .validate()
                .map_err(|error| error.to_string())?;
            Ok(record)
        };
        read_all(&self.vms, "toml", parse)
    }

    pub(super) fn save_job(&self, job: &JobInfo) -> Result<()> {
        let path = self.job(job.id);
        let text =
            serde_json::to_vec(job).map_err(|error| Error::file("write", &path, error.into()))?;
        durable::replace(&path, &text).map_err(|error| Error::file("write", &path, error))
    }

    pub(super) fn forget_job(&self, id: u64) -> Result<()> {
        remove(&self.job(id))
    }

    /// All jobs, the oldest first.
    pub(super) fn jobs(&self) -> Result<Vec<JobInfo>> {
        let parse = |text: &str| serde_json::from_str(text).map_err(|error| error.to_string());
        let mut jobs: Vec<JobInfo> = read_all(&self.jobs, "json", parse)?;
        jobs.sort_by_key(|job| job.id);
        Ok(jobs)
    }
}

fn remove(path: &Path) -> Result<()> {
    durable::remove(path).map_err(|error| Error::file("remove", path, error))
}

fn read_all<T>(
    folder: &Path,
    extension: &str,
    parse: impl Fn(&str) -> std::result::Result<T, String>,
) -> Result<Vec<T>> {
    let list = |error| Error::file("list", folder, error);
    let mut all = Vec::new();
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
            }
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(name: &str) -> Record {
        let text = format!(
            "name = \"{name}\"\nmachine = \"pc\"\nmemory = \"64MiB\"\nvcpus = 1\n\
             disk = [{{ id = \"root\", format = \"raw\", path = \"/a\" }}]\n"
        );
        Record {
            qmp: "/run/a.sock".into(),
            definition: Definition::parse(&text).expect("a definition"),
        }
    }

    #[test]
    fn keeps_vms() {
        let folder = tempfile::tempdir().expect("a folder");
        let state = State::open(folder.path()).expect("a state");
        state.save_vm(&record("a")).expect("saved");
        state.save_vm(&record("b")).expect("saved");
        state.save_vm(&record("a")).expect("saved again");
        let again = State::open(folder.path()).expect("a state");
        let mut found = again.vms().expect("VMs");
        found.sort_by(|one, other| one.definition.name.cmp(&other.definition.name));
        assert_eq!(found, [record("a"), record("b")]);
        again.forget_vm("a").expect("forgotten");
        again.forget_vm("a").expect("forgotten twice");
        assert_eq!(again.vms().expect("VMs"), [record("b")]);
    }

    #[test]
    fn passes_over_what_it_cannot_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let state = State::open(folder.path()).expect("a state");
        state.save_vm(&record("a")).expect("saved");
        let bad = folder.path().join("vms/bad.toml");
        fs::write(&bad, "qmp = 1").expect("written");
        fs::write(folder.path().join("vms/c.new"), "half").expect("written");
        assert_eq!(state.vms().expect("VMs"), [record("a")]);
        assert!(bad.exists());
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
