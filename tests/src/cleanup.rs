//! Leaves nothing behind: what a run starts or makes outside `target/` is written down here, and undone
//! when its guard is dropped or when the run is interrupted.
//!
//! Processes also carry a death signal, and what a killed run left is swept by the next
//! ([`crate::hosts`]).

use crate::{Error, Result};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{SigSet, Signal, kill, killpg};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Something to undo.
#[derive(Debug, Clone)]
pub enum Leftover {
    /// A process, leader of its own group.
    Process(i32),
    /// Another test bed, which cleans up itself.
    Testbed(i32),
    /// A network namespace by name.
    Namespace(String),
    /// A loop device, with its limits.
    LoopDevice(std::path::PathBuf),
    /// A folder outside `target/`.
    Folder(std::path::PathBuf),
    /// A file system mounted there.
    Mount(std::path::PathBuf),
    /// A setting of this machine's kernel, and what it was.
    Setting(&'static str, String),
}

impl Leftover {
    fn undo(&self) {
        match self {
            Self::Process(pid) => drop(killpg(Pid::from_raw(*pid), Signal::SIGKILL)),
            Self::Testbed(pid) => end_gently(Pid::from_raw(*pid)),
            Self::Namespace(name) => crate::hosts::delete_namespace(name),
            Self::LoopDevice(path) => crate::bench::detach(path),
            Self::Folder(path) => drop(std::fs::remove_dir_all(path)),
            // Also while somebody uses it.
            Self::Mount(path) => drop(umount2(path, MntFlags::MNT_DETACH)),
            Self::Setting(path, value) => drop(std::fs::write(path, value)),
        }
    }
}

/// How long another test bed may take to clean up.
const FAREWELL: Duration = Duration::from_secs(10);

/// Tells a child to end, and waits for that; it is not reaped by this.
fn end_gently(child: Pid) {
    let ended = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT | WaitPidFlag::WNOHANG;
    let begun = Instant::now();
    let _ = kill(child, Signal::SIGTERM);
    while matches!(waitid(Id::Pid(child), ended), Ok(WaitStatus::StillAlive)) {
        if begun.elapsed() > FAREWELL {
            let _ = killpg(child, Signal::SIGKILL);
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

struct Register {
    next: u64,
    entries: BTreeMap<u64, Leftover>,
}

static REGISTER: Mutex<Register> = Mutex::new(Register {
    next: 0,
    entries: BTreeMap::new(),
});
static EXPIRED: AtomicBool = AtomicBool::new(false);

fn register() -> MutexGuard<'static, Register> {
    REGISTER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Undoes its entry when dropped.
#[derive(Debug)]
pub struct Guard {
    key: u64,
}

impl Guard {
    /// Writes something down.
    pub fn new(leftover: Leftover) -> Self {
        let mut register = register();
        let key = register.next;
        register.next += 1;
        register.entries.insert(key, leftover);
        Self { key }
    }

    /// Forgets the entry: it has been undone already.
    pub fn forget(self) {
        register().entries.remove(&self.key);
        std::mem::forget(self);
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let entry = register().entries.remove(&self.key);
        if let Some(leftover) = entry {
            leftover.undo();
        }
    }
}

/// Kills every process written down, so that whatever waits for one fails: a scenario's time is up.
pub fn expire() {
    EXPIRED.store(true, Ordering::SeqCst);
    for leftover in register().entries.values() {
        if matches!(leftover, Leftover::Process(_)) {
            leftover.undo();
        }
    }
}

/// Takes back [`expire`].
pub fn renew() {
    EXPIRED.store(false, Ordering::SeqCst);
}

/// Fails once the time is up; loops that wait call it.
pub fn still_time() -> Result<()> {
    if EXPIRED.load(Ordering::SeqCst) {
        Err(Error::Interrupted)
    } else {
        Ok(())
    }
}

/// Undoes everything on Ctrl-C, SIGTERM and SIGHUP, then exits with 130. To be called before any thread
/// is started.
pub fn watch_signals() -> Result<()> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        set.add(signal);
    }
    set.thread_block().map_err(Error::system("block signals"))?;
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            if set.wait().is_ok() {
                crate::progress::say("interrupted, cleaning up");
                let register = register();
                // Processes first: a namespace goes when its last process has gone.
                for leftover in register.entries.values().rev() {
                    leftover.undo();
                }
                std::process::exit(130);
            }
        })
        .map_err(Error::system("start a thread"))?;
    Ok(())
}
