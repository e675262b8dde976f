//! The VMs of this host.

use super::state_directory::{Record, State};
use super::{Error, Result};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use transhume_api::JobInfo;
use transhume_hypervisor::Vm;
use transhume_machine::Definition;

/// VMs that left, of which it is still known how.
const REMEMBERED: usize = 64;

/// A VM, or the place of one.
#[derive(Debug, Clone)]
pub(super) enum Entry {
    /// It is being started, or comes from another host; what was defined of it before.
    Coming(Option<Box<Record>>),
    /// It is here.
    Here(Arc<Vm>),
    /// It should be here, and its QEMU cannot be spoken to.
    Lost {
        /// How it was noted.
        record: Box<Record>,
        /// Why.
        reason: String,
    },
    /// It is defined here, and does not run.
    Stopped(Box<Record>),
    /// Its file cannot be read, for this reason.
    Unreadable(String),
}

impl Entry {
    /// Whether it is that very VM.
    pub(super) fn is(&self, vm: &Arc<Vm>) -> bool {
        matches!(self, Self::Here(here) if Arc::ptr_eq(here, vm))
    }

    /// Whether it is what is left here of the VM that a job moved.
    pub(super) fn was_moved_by(&self, job: &JobInfo) -> bool {
        match self {
            Self::Here(vm) => job.moves(vm.identity().as_ref()),
            Self::Stopped(record) => job.qemu.is_some() && job.qemu == record.qemu,
            Self::Coming(_) | Self::Lost { .. } | Self::Unreadable(_) => false,
        }
    }
}

/// All VMs of this host, by name.
#[derive(Debug)]
pub(super) struct VmTable {
    host: String,
    state: Arc<State>,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    entries: BTreeMap<String, Entry>,
    /// Those that are started when the host is.
    autostart: BTreeSet<String>,
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
    table: &'a VmTable,
    name: String,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        self.table.release(&self.name);
    }
}

impl VmTable {
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

    /// Keeps a name that is free, or of a VM that does not run, until it is released or a VM put in its place.
    pub(super) fn reserve(&self, name: &str) -> Result<()> {
        let mut inner = self.lock();
        let there = match inner.entries.get(name) {
            None => {
                inner.entries.insert(name.to_owned(), Entry::Coming(None));
                return Ok(());
            }
            Some(Entry::Stopped(record)) => {
                let coming = Entry::Coming(Some(record.clone()));
                inner.entries.insert(name.to_owned(), coming);
                return Ok(());
            }
            Some(Entry::Coming(_)) => "is just being started, or coming from another host",
            Some(Entry::Here(_)) => "is here already",
            Some(Entry::Lost { .. }) => "is here already, and its QEMU cannot be spoken to",
            Some(Entry::Unreadable(_)) => "is here already, and its file cannot be read",
        };
        Err(Error::refused(
            format!("a VM named {name} {there} on {}", self.host),
            format!("see `transhume vm show {name}` there; end it or rename one of the two"),
        ))
    }

    /// [`VmTable::reserve`] for a VM that arrives. One of another machine that is defined by that name, and does
    /// not run, is not replaced.
    pub(super) fn reserve_for(&self, arriving: &Definition) -> Result<()> {
        let name = &arriving.name;
        if let Some(Entry::Stopped(record)) = self.lock().entries.get(name) {
            let disks = |definition: &Definition| -> Vec<PathBuf> {
                let disks = definition.disks.iter();
                disks
                    .map(|disk| definition.disk_path(disk, &self.host).to_owned())
                    .collect()
            };
            if disks(&record.definition) != disks(arriving) {
                return Err(Error::refused(
                    format!(
                        "another VM named {name}, with other disks, is defined on {}",
                        self.host
                    ),
                    format!("rename one of the two, or `transhume vm undefine {name}` there"),
                ));
            }
        }
        self.reserve(name)
    }

    /// [`VmTable::reserve`] for as long as the guard lives.
    pub(super) fn reserve_while(&self, name: &str) -> Result<Reservation<'_>> {
        self.reserve(name)?;
        Ok(Reservation {
            table: self,
            name: name.to_owned(),
        })
    }

    /// Whether a name is kept for a VM that is not here yet.
    pub(super) fn is_coming(&self, name: &str) -> bool {
        matches!(self.lock().entries.get(name), Some(Entry::Coming(_)))
    }

    /// Gives a kept name back, to what was defined by it if anything was. Nothing of the VM that did not come stays
    /// on disk.
    pub(super) fn release(&self, name: &str) {
        let before = {
            let mut inner = self.lock();
            let Some(Entry::Coming(before)) = inner.entries.get(name).cloned() else {
                return;
            };
            match &before {
                Some(record) => {
                    let stopped = Entry::Stopped(record.clone());
                    inner.entries.insert(name.to_owned(), stopped)
                }
                None => inner.entries.remove(name),
            };
            before
        };
        let undone = match before {
            Some(record) => self.state.save_vm(&record),
            None => self.state.forget_vm(name),
        };
        if let Err(error) = undone.and(self.state.forget_arriving(name)) {
            tracing::error!(vm = name, %error, "its file in the state directory is not as it was");
        }
    }

    /// Notes a VM on disk, so that a restarted service finds it.
    pub(super) fn note(&self, record: &Record) -> Result<()> {
        self.state.save_vm(record)
    }

    /// Notes a VM that arrives by that migration. The note counts when the migration is committed.
    pub(super) fn note_arriving(&self, vm: &Vm, job: u64, autostart: bool) -> Result<()> {
        let record = Record {
            arrival: Some(format!("{job:016x}")),
            autostart,
            ..self.record(vm)
        };
        self.state.save_arriving(&record)
    }

    /// Notes a VM that has arrived, and that it is started with the host if that was said where it came from.
    pub(super) fn note_arrived(&self, vm: &Vm, autostart: bool) -> Result<()> {
        if autostart {
            self.lock().autostart.insert(vm.name().to_owned());
        }
        self.state.arrived(&self.record(vm))
    }

    /// The notes of VMs that were about to arrive when an earlier process ended: those that `owns` says belong to
    /// this host become VMs of it, which are returned, the others are forgotten.
    pub(super) fn settle_arriving(&self, owns: impl Fn(&str, u64) -> bool) -> Result<Vec<Record>> {
        let mut owned = Vec::new();
        for mut record in self.state.arrivals()? {
            let name = record.definition.name.clone();
            let job = record.arrival.take();
            let job = job.and_then(|job| u64::from_str_radix(&job, 16).ok());
            if job.is_some_and(|job| owns(&name, job)) {
                self.know(&record);
                if let Err(error) = self.state.arrived(&record) {
                    tracing::error!(vm = name, %error, "what is noted of it is still that it arrives");
                }
                owned.push(record);
            } else if let Err(error) = self.state.forget_arriving(&name) {
                tracing::error!(vm = name, %error, "it did not arrive, and its note stays");
            }
        }
        Ok(owned)
    }

    /// Takes the file of a VM away.
    fn forget(&self, name: &str) {
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

    /// Takes in what is noted of a VM before it was looked for.
    pub(super) fn know(&self, record: &Record) {
        if record.autostart {
            self.lock().autostart.insert(record.definition.name.clone());
        }
    }

    /// Takes in a VM that is noted as one that does not run.
    pub(super) fn keep(&self, record: Record) {
        let name = record.definition.name.clone();
        let mut inner = self.lock();
        let kept = inner.entries.entry(name);
        kept.or_insert_with(|| Entry::Stopped(Box::new(record)));
    }

    /// Notes that a VM cannot be spoken to.
    pub(super) fn lose(&self, record: Record, reason: String) {
        let name = record.definition.name.clone();
        let mut inner = self.lock();
        let is_known = matches!(inner.entries.get(&name), Some(Entry::Lost { reason: known, .. }) if *known == reason);
        if !is_known {
            tracing::error!(
                vm = name,
                reason,
                "its QEMU cannot be spoken to; it is tried again"
            );
        }
        let entry = Entry::Lost {
            record: Box::new(record),
            reason,
        };
        inner.entries.insert(name, entry);
    }

    /// Holds the name of a VM back whose file cannot be read.
    pub(super) fn hold(&self, name: &str, reason: String) {
        let entry = Entry::Unreadable(reason);
        self.lock().entries.insert(name.to_owned(), entry);
    }

    /// A VM that is defined here and does not run, whether it did before or not.
    ///
    /// # Errors
    /// If it cannot be noted: then nothing has changed.
    pub(super) fn define(&self, record: Record) -> Result<()> {
        self.state.save_vm(&record)?;
        let name = record.definition.name.clone();
        let entry = Entry::Stopped(Box::new(record));
        self.lock().entries.insert(name, entry);
        Ok(())
    }

    /// A VM has stopped, if it `is_it` that is here: it stays defined.
    pub(super) fn stop(&self, record: Record, is_it: impl Fn(&Entry) -> bool, reason: &str) {
        let name = record.definition.name.clone();
        let record = record.stopped(reason);
        {
            let mut inner = self.lock();
            if inner.entries.get(&name).is_some_and(|entry| !is_it(entry)) {
                return;
            }
            let entry = Entry::Stopped(Box::new(record.clone()));
            inner.entries.insert(name.clone(), entry);
        }
        tracing::info!(vm = name, "it has stopped: {reason}");
        // Whoever reads the old note finds that its QEMU has ended.
        if let Err(error) = self.state.save_vm(&record) {
            tracing::error!(vm = name, %error, "that it has stopped is not noted on disk");
        }
    }

    /// Has a VM started when the host is, or not.
    pub(super) fn set_autostart(&self, name: &str, on: bool) -> Result<()> {
        let record = match self.entry(name)? {
            Entry::Here(vm) => Record {
                autostart: on,
                ..self.record(&vm)
            },
            Entry::Lost { record, .. } | Entry::Stopped(record) => Record {
                autostart: on,
                ..*record
            },
            Entry::Coming(_) | Entry::Unreadable(_) => return self.here(name).map(drop),
        };
        self.state.save_vm(&record)?;
        let mut inner = self.lock();
        if on {
            inner.autostart.insert(name.to_owned());
        } else {
            inner.autostart.remove(name);
        }
        if let Some(Entry::Stopped(kept) | Entry::Lost { record: kept, .. }) =
            inner.entries.get_mut(name)
        {
            kept.autostart = on;
        }
        Ok(())
    }

    pub(super) fn is_autostarted(&self, name: &str) -> bool {
        self.lock().autostart.contains(name)
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
            Entry::Coming(_) => Err(Error::refused(
                format!("{name} is just being started, or coming from another host"),
                "try again when `transhume vm list` shows it",
            )),
            Entry::Lost { reason, .. } => Err(Error::refused(
                format!("{name}'s QEMU cannot be spoken to: {reason}"),
                format!("`transhume vm show {name}` tries again"),
            )),
            Entry::Stopped(record) => Err(Error::refused(
                format!("{name} does not run: {}", record.why()),
                format!("`transhume vm start {name}` starts it"),
            )),
            Entry::Unreadable(reason) => Err(Error::refused(
                format!("{name}'s file cannot be read: {reason}"),
                "mend or remove it, and restart transhumed",
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

    /// Takes out what is left here of the VM that a job moved, if that very one is here; see [`VmTable::leave`].
    pub(super) fn depart(&self, name: &str, job: &JobInfo, how: impl Into<String>) {
        self.leave(name, |entry| entry.was_moved_by(job), how);
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
            inner.autostart.remove(name);
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

    /// The record of a VM for [`VmTable::note`].
    pub(super) fn record(&self, vm: &Vm) -> Record {
        Record {
            autostart: self.is_autostarted(vm.name()),
            ..Record::new(
                vm.definition().clone(),
                PathBuf::from(vm.qmp_path()),
                vm.identity(),
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(folder: &std::path::Path) -> VmTable {
        VmTable::new("hosta", Arc::new(State::open(folder).expect("a state")))
    }

    fn record() -> Record {
        let text = "name = \"web1\"\nmachine = \"pc\"\nmemory = \"64MiB\"\nvcpus = 1\n";
        let definition = Definition::parse(text).expect("a definition");
        Record::new(definition, "/run/a.sock".into(), None)
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
        assert_eq!(table.state.vms().expect("VMs").read, [record()]);
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
        assert!(table.state.vms().expect("VMs").read.is_empty());
        for index in 0..2 * REMEMBERED {
            table.leave(&format!("vm{index}"), |_| true, "it was stopped");
        }
        assert_eq!(table.lock().departures.len(), REMEMBERED);
    }

    #[test]
    fn a_vm_that_stopped_stays_defined() {
        let folder = tempfile::tempdir().expect("a folder");
        let table = table(folder.path());
        table.lose(record(), "it hangs".to_owned());
        table.set_autostart("web1", true).expect("set");
        let Ok(Entry::Lost { record, .. }) = table.entry("web1") else {
            panic!("it is lost");
        };
        table.stop((*record).clone(), |_| false, "not this one");
        assert!(matches!(table.entry("web1"), Ok(Entry::Lost { .. })));
        table.stop(*record, |_| true, "its guest shut down");
        let error = table.here("web1").expect_err("stopped");
        assert!(error.to_string().contains("its guest shut down"), "{error}");
        let noted = table.state.vms().expect("VMs").read.remove(0);
        assert!(noted.stopped.is_some() && noted.autostart);
    }

    #[test]
    fn a_vm_that_does_not_come_leaves_what_was_defined() {
        let folder = tempfile::tempdir().expect("a folder");
        let table = table(folder.path());
        let defined = record().stopped("it was defined");
        table.define(defined.clone()).expect("defined");
        {
            let _kept = table.reserve_while("web1").expect("it does not run");
            table.note(&record()).expect("noted");
            assert!(table.is_coming("web1"));
        }
        assert!(matches!(table.entry("web1"), Ok(Entry::Stopped(record)) if *record == defined));
        assert_eq!(table.state.vms().expect("VMs").read, [defined]);
        let text = "name = \"web1\"\nmachine = \"pc\"\nmemory = \"64MiB\"\nvcpus = 1\n\
                    disk = [{ id = \"root\", format = \"raw\", path = \"/a\" }]\n";
        let other = Definition::parse(text).expect("a definition");
        let error = table.reserve_for(&other).expect_err("another VM");
        assert!(error.to_string().contains("other disks"), "{error}");
        table.reserve_for(&record().definition).expect("the same");
        table.release("web1");
        table.leave("web1", |_| true, "it was undefined");
        assert!(table.state.vms().expect("VMs").read.is_empty());
    }

    #[test]
    fn an_arrival_counts_when_it_is_committed() {
        let folder = tempfile::tempdir().expect("a folder");
        let table = table(folder.path());
        for owns in [false, true] {
            let arriving = Record {
                arrival: Some(format!("{:016x}", 7)),
                ..record()
            };
            table.state.save_arriving(&arriving).expect("saved");
            table
                .settle_arriving(|name, job| owns && (name, job) == ("web1", 7))
                .expect("settled");
            assert!(table.state.arrivals().expect("VMs").is_empty());
            let vms = table.state.vms().expect("VMs").read;
            assert_eq!(vms, if owns { vec![record()] } else { Vec::new() });
        }
    }
}
