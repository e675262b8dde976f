//! Which of a guest's QEMUs run it, and since when until when: each is asked by a monitor of its own, and not the daemons.

use super::pair::At;
use crate::cleanup::still_time;
use crate::hosts::Host;
use crate::{Error, Result};
use serde_json::Value;
use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::io::{BufRead, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// How often it is looked for QEMUs that are new: none runs a guest that soon.
const GLANCE: Duration = Duration::from_millis(20);
/// How long a QEMU may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// A time in which a QEMU ran the guest, in microseconds since 1970: by QEMU's clock, which is this machine's.
#[derive(Debug, Clone, Copy)]
struct Stint {
    at: At,
    pid: u32,
    from_us: u64,
    /// None while it runs.
    until_us: Option<u64>,
}

impl fmt::Display for Stint {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pid, from_us, .. } = self;
        write!(
            out,
            "{} (process {pid}) ran it from {from_us}",
            self.at.name()
        )?;
        match self.until_us {
            Some(until) => write!(out, " to {until}"),
            None => write!(out, " on"),
        }
    }
}

type Stints = Mutex<Vec<Stint>>;

/// Watches the QEMUs of a guest on both hosts.
pub(super) struct Copies {
    stints: Arc<Stints>,
    stop: Arc<AtomicBool>,
}

impl Copies {
    /// Begins, before the daemons start.
    pub(super) fn watch(hosts: [&mut Host; 2]) -> Result<Self> {
        let stints = Arc::<Stints>::default();
        let stop = Arc::<AtomicBool>::default();
        for (at, host) in [At::A, At::B].into_iter().zip(hosts) {
            let folder = host.watch_qemus()?;
            let (stints, stop) = (Arc::clone(&stints), Arc::clone(&stop));
            std::thread::spawn(move || {
                let mut known = HashSet::new();
                while !stop.load(Ordering::Relaxed) {
                    for (pid, socket) in sockets(&folder) {
                        if known.insert(pid) {
                            let stints = Arc::clone(&stints);
                            std::thread::spawn(move || follow(at, pid, &socket, &stints));
                        }
                    }
                    std::thread::sleep(GLANCE);
                }
            });
        }
        Ok(Self { stints, stop })
    }

    /// Who ran it before ran another guest of that name.
    pub(super) fn forget_ended(&self) {
        lock(&self.stints).retain(|one| one.until_us.is_none());
    }

    /// Those who run the guest now.
    fn now(&self) -> Vec<Stint> {
        let mut stints = lock(&self.stints).clone();
        stints.retain(|one| one.until_us.is_none());
        stints
    }

    /// Whether a QEMU runs the guest there.
    pub(super) fn runs_at(&self, at: At) -> bool {
        self.now().iter().any(|one| one.at == at)
    }

    /// One QEMU runs the guest now, at that host, and at no time two did.
    pub(super) fn one_runs(&self, at: At) -> Result<()> {
        let begun = Instant::now();
        loop {
            self.never_two()?;
            if matches!(self.now()[..], [one] if one.at == at) {
                return Ok(());
            }
            // What was killed just now has not been missed yet.
            if begun.elapsed() > PATIENCE {
                let all = list(&lock(&self.stints));
                let at = at.name();
                return Err(Error::Check(format!("Not one copy runs, at {at}: {all}")));
            }
            still_time()?;
            std::thread::sleep(GLANCE);
        }
    }

    /// At no time two QEMUs ran the guest.
    pub(super) fn never_two(&self) -> Result<()> {
        let mut stints = lock(&self.stints).clone();
        stints.sort_by_key(|one| one.from_us);
        let overlaps =
            |pair: &&[Stint]| pair[0].until_us.is_none_or(|until| until > pair[1].from_us);
        match stints.windows(2).find(overlaps) {
            None => Ok(()),
            Some(pair) => Err(Error::Check(format!(
                "Two copies ran at once: {}",
                list(pair)
            ))),
        }
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn lock(stints: &Stints) -> MutexGuard<'_, Vec<Stint>> {
    stints.lock().unwrap_or_else(PoisonError::into_inner)
}

fn list(stints: &[Stint]) -> String {
    let all: Vec<String> = stints.iter().map(Stint::to_string).collect();
    all.join("; ")
}

/// The monitors in a folder, by the processes that have them.
fn sockets(folder: &Path) -> Vec<(u32, PathBuf)> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let pid = |path: PathBuf| Some((path.file_stem()?.to_str()?.parse().ok()?, path));
    entries.filter_map(|entry| pid(entry.path())).collect()
}

/// Follows one QEMU to its end.
fn follow(at: At, pid: u32, socket: &Path, stints: &Stints) {
    let begun = Instant::now();
    // It listens soon after the socket is there.
    let stream = loop {
        match UnixStream::connect(socket) {
            Ok(stream) => break stream,
            Err(_) if begun.elapsed() > PATIENCE => return,
            Err(_) => std::thread::sleep(GLANCE),
        }
    };
    let said = (&stream).write_all(
        b"{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"query-status\",\"id\":\"status\"}\n",
    );
    let lines = BufReader::new(&stream)
        .lines()
        .map_while(std::result::Result::ok);
    let mut is_known = said.is_err();
    for line in lines {
        let value: Value = serde_json::from_str(&line).unwrap_or_default();
        if value["id"] == "status" && !is_known {
            is_known = true;
            if value["return"]["running"] == true {
                begins(stints, at, pid, now_us());
            }
        }
        match value["event"].as_str() {
            Some("RESUME") => {
                is_known = true;
                begins(stints, at, pid, time_us(&value));
            }
            Some("STOP") => {
                is_known = true;
                ends(stints, pid, time_us(&value));
            }
            _ => {}
        }
    }
    ends(stints, pid, now_us());
    // One that was killed leaves it.
    let _ = fs::remove_file(socket);
}

fn begins(stints: &Stints, at: At, pid: u32, from_us: u64) {
    let mut stints = lock(stints);
    let is_there = |one: &Stint| one.pid == pid && one.until_us.is_none();
    if !stints.iter().any(is_there) {
        stints.push(Stint {
            at,
            pid,
            from_us,
            until_us: None,
        });
    }
}

fn ends(stints: &Stints, pid: u32, until_us: u64) {
    for one in lock(stints).iter_mut() {
        if one.pid == pid && one.until_us.is_none() {
            one.until_us = Some(until_us);
        }
    }
}

fn time_us(event: &Value) -> u64 {
    let part = |name: &str| event["timestamp"][name].as_u64().unwrap_or(0);
    part("seconds") * 1_000_000 + part("microseconds")
}

fn now_us() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
    })
}
