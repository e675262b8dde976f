//! The VMs of this host.

use super::api::JobInfo;
use super::state::{Record, State};
use super::{Error, Result};
use crate::hypervisor::Vm;
use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// VMs that left, of which it is still known how.
const REMEMBERED: usize = 64;

/// A VM, or the place of one.
#[derive(Debug, Clone)]
pub(super) enum Entry {
    /// It is being started, or comes from another host.
    Coming,
    /// It is here.
    Here(Arc<Vm>),
    /// It should be here, and its QEMU cannot be spoken to.
    Lost {
        /// How it was noted.
        record: Box<Record>,
        /// Why.
        reason: String,
    },
}

impl Entry {
    /// Whether it is that very VM.
    pub(super) fn is(&self, vm: &Arc<Vm>) -> bool {
        matches!(self, Self::Here(here) if Arc::ptr_eq(here, vm))
    }
}

/// All VMs of this host, by name.
#[derive(Debug)]
pub(super) struct Table {
    host: String,
    state: Arc<State>,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    entries: BTreeMap<String, Entry>,
    departures: VecDeque<Departure>,
}

#[derive(Debug)]
struct Departure {
    name: String,
    how: String,
    at: Instant,
}

/// A name that is kept for a VM until it is here; given back when dropped.
#[derive(Debug)]
pub(super) struct Reservation<'a> {
    table: &'a Table,
    name: String,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        self.table.release(&self.name);
    }
}

impl Table {
    pub(super) fn new(host: &str, state: Arc<State>) -> Self {
        Self {
            host: host.to_owned(),
            state,
            inner: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a name, until it is released or a VM put in its place.
    pub(super) fn reserve(&self, name: &str) -> Result<()> {
        let mut inner = self.lock();
        let there = match inner.entries.get(name) {
            None => {
                inner.entries.insert(name.to_owned(), Entry::Coming);
                return Ok(());
            }
            Some(Entry::Coming) => "is just being started, or coming from another host",
            Some(Entry::Here(_)) => "is here already",
            Some(Entry::Lost { .. }) => "is here already, and its QEMU cannot be spoken to",
        };
        Err(Error::refused(
            format!("a VM named {name} {there} on {}", self.host),
            format!("see `transhume vm show {name}` there; end it or rename one of the two"),
        ))
    }

    /// [`Table::reserve`] for as long as the guard lives.
    pub(super) fn reserve_while(&self, name: &str) -> Result<Reservation<'_>> {
        self.reserve(name)?;
        Ok(Reservation {
            table: self,
            name: name.to_owned(),
        })
    }

    /// Whether a name is kept for a VM that is not here yet.
    pub(super) fn is_coming(&self, name: &str) -> bool {
        matches!(self.lock().entries.get(name), Some(Entry::Coming))
    }

    /// Gives a kept name back.
    pub(super) fn release(&self, name: &str) {
        let mut inner = self.lock();
        if let Some(Entry::Coming) = inner.entries.get(name) {
            inner.entries.remove(name);
        }
    }

    /// Notes a VM on disk, so that a restarted service finds it.
    pub(super) fn note(&self, record: &Record) -> Result<()> {
        self.state.save_vm(record)
    }

    /// Takes the note of a VM that did not come away.
    pub(super) fn forget(&self, name: &str) {
        if let Err(error) = self.state.forget_vm(name) {
            tracing::error!(vm = name, %error, "its file stays in the state directory: remove it");
        }
    }

    /// Puts a VM in its place.
    pub(super) fn put(&self, vm: Arc<Vm>) {
        self.lock()
            .entries
            .insert(vm.name().to_owned(), Entry::Here(vm));
    }

    /// Notes that a VM cannot be spoken to.
    pub(super) fn lose(&self, record: Record, reason: String) {
        let name = record.definition.name.clone();
        tracing::error!(vm = name, reason, "its QEMU cannot be spoken to");
        let entry = Entry::Lost {
            record: Box::new(record),
            reason,
        };
        self.lock().entries.insert(name, entry);
    }

    pub(super) fn entry(&self, name: &str) -> Result<Entry> {
        let inner = self.lock();
        if let Some(entry) = inner.entries.get(name) {
            return Ok(entry.clone());
        }
        let last = inner
            .departures
            .iter()
            .rev()
            .find(|departure| departure.name == name);
        Err(match last {
            Some(Departure { how, at, .. }) => Error::refused(
                format!(
                    "{name} is no more on {}: {} s ago {how}",
                    self.host,
                    at.elapsed().as_secs()
                ),
                "`transhume vm list` shows what is here",
            ),
            None => Error::refused(
                format!("{} has no VM named {name}", self.host),
                "`transhume vm list` shows what is here; `transhume vm start` or `vm adopt` adds one",
            ),
        })
    }

    /// A VM that can be spoken to.
    pub(super) fn here(&self, name: &str) -> Result<Arc<Vm>> {
        match self.entry(name)? {
            Entry::Here(vm) => Ok(vm),
            Entry::Coming => Err(Error::refused(
                format!("{name} is just being started, or coming from another host"),
                "try again when `transhume vm list` shows it",
            )),
            Entry::Lost { reason, .. } => Err(Error::refused(
                format!("{name}'s QEMU cannot be spoken to: {reason}"),
                format!("`transhume vm show {name}` tries again"),
            )),
        }
    }

    /// Whether that very VM is in the table.
    pub(super) fn has(&self, vm: &Arc<Vm>) -> bool {
        self.lock()
            .entries
            .get(vm.name())
            .is_some_and(|entry| entry.is(vm))
    }

    /// Takes the VM that a job moved out, if that very one is here; see [`Table::leave`].
    pub(super) fn depart(&self, name: &str, job: &JobInfo, how: impl Into<String>) {
        let is_it = |entry: &Entry| match entry {
            Entry::Here(vm) => job.moves(vm.identity().as_ref()),
            Entry::Coming | Entry::Lost { .. } => false,
        };
        self.leave(name, is_it, how);
    }

    /// Takes a VM out if it `is_it`, and remembers how it left, as in "it was stopped".
    pub(super) fn leave(&self, name: &str, is_it: impl Fn(&Entry) -> bool, how: impl Into<String>) {
        let how = how.into();
        {
            let mut inner = self.lock();
            match inner.entries.get(name) {
                Some(entry) if !is_it(entry) => return,
                _ => inner.entries.remove(name),
            };
            tracing::info!(vm = name, how, "the VM has left");
            if inner.departures.len() == REMEMBERED {
                inner.departures.pop_front();
            }
            inner.departures.push_back(Departure {
                name: name.to_owned(),
                how,
                at: Instant::now(),
            });
        }
        self.forget(name);
    }

    pub(super) fn all(&self) -> Vec<(String, Entry)> {
        let inner = self.lock();
        inner
            .entries
            .iter()
            .map(|(name, entry)| (name.clone(), entry.clone()))
            .collect()
    }

    /// The record of a VM for [`Table::note`].
    pub(super) fn record(vm: &Vm) -> Record {
        Record {
            qmp: PathBuf::from(vm.qmp_path()),
            definition: vm.definition().clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::Definition;

    fn table(folder: &std::path::Path) -> Table {
        Table::new("hosta", Arc::new(State::open(folder).expect("a state")))
    }

    fn record() -> Record {
        let text = "name = \"web1\"\nmachine = \"pc\"\nmemory = \"64MiB\"\nvcpus = 1\n";
        Record {
            qmp: "/run/a.sock".into(),
            definition: Definition::parse(text).expect("a definition"),
        }
    }

    #[test]
    fn a_name_is_kept_once() {
        let folder = tempfile::tempdir().expect("a folder");
        let table = table(folder.path());
        {
            let _kept = table.reserve_while("web1").expect("free");
            let error = table.reserve("web1").expect_err("kept");
            assert!(error.to_string().contains("just being started"), "{error}");
            assert!(table.here("web1").is_err());
        }
        table.reserve("web1").expect("free again");
        table.release("web1");
        table.release("web1");
        assert!(table.all().is_empty());
    }

    #[test]
    fn a_lost_vm_keeps_its_name_and_its_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let table = table(folder.path());
        table.note(&record()).expect("noted");
        table.lose(record(), "it hangs".to_owned());
        table.release("web1");
        let error = table.reserve("web1").expect_err("still there");
        assert!(error.to_string().contains("cannot be spoken to"), "{error}");
        let error = table.here("web1").expect_err("lost");
        assert!(error.to_string().contains("it hangs"), "{error}");
        assert_eq!(table.state.vms().expect("VMs"), [record()]);
    }

    #[test]
    fn remembers_how_a_vm_left() {
        let folder = tempfile::tempdir().expect("a folder");
        let table = table(folder.path());
        let error = table.entry("web1").expect_err("never here");
        assert!(
            error.to_string().contains("hosta has no VM named web1"),
            "{error}"
        );
        table.note(&record()).expect("noted");
        table.leave("web1", |_| true, "it moved to hostb");
        let error = table.entry("web1").expect_err("gone");
        assert!(
            error.to_string().contains("ago it moved to hostb"),
            "{error}"
        );
        assert!(table.state.vms().expect("VMs").is_empty());
        for index in 0..2 * REMEMBERED {
            table.leave(&format!("vm{index}"), |_| true, "it was stopped");
        }
        assert_eq!(table.lock().departures.len(), REMEMBERED);
    }
}
