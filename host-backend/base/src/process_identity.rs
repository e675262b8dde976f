//! Which process one is, told apart from every other one that this host ever ran.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::time::{Duration, UNIX_EPOCH};

/// Ticks in a second in `/proc/PID/stat`, the same on every Linux (`USER_HZ`).
const TICKS: u64 = 100;
/// How long a process may take to end.
const TIMEOUT: Duration = Duration::from_secs(10);

/// How often a process that is no child of ours is looked at while somebody waits for its end.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// A process, told apart from a later one of the same id by the time of its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    id: u32,
    /// In ticks since the host's boot.
    started: u64,
}

impl Process {
    /// The process that has this id now.
    pub fn find(id: u32) -> Option<Self> {
        let started = start_time(id)?;
        Some(Self { id, started })
    }

    /// One of that id that is gone.
    pub fn ended(id: u32) -> Self {
        Self { id, started: 0 }
    }

    /// Its id.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// When it started, in ticks since the host's boot.
    pub fn started(&self) -> u64 {
        self.started
    }

    /// Whether it still runs.
    pub fn is_alive(&self) -> bool {
        start_time(self.id) == Some(self.started)
    }

    /// Waits for its end.
    pub async fn gone(&self) {
        while self.is_alive() {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// Ends it as if power were cut.
    pub fn kill(&self) {
        if let Ok(id) = i32::try_from(self.id)
            && self.is_alive()
        {
            // A failure shows in the process staying alive, which our caller watches.
            let _ = kill(Pid::from_raw(id), Signal::SIGKILL);
        }
    }
}

/// When a process that is not a zombie started, by field 22 of its `stat`.
fn start_time(id: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    // The name in field 2 may hold spaces and brackets.
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    let state = fields.next()?;
    let started = fields.nth(18)?.parse().ok()?;
    (state != "Z" && state != "X").then_some(started)
}

/// A process that did not end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("process {pid} outlives SIGKILL")]
pub struct Outlives {
    /// Its id.
    pub pid: u32,
}

/// A process of this host. Its id comes again, and so may its time of start after the host was restarted; all
/// three together do not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Identity {
    /// Its process id.
    pub pid: u32,
    /// When it started, in ticks since the host's boot (field 22 of `/proc/PID/stat`).
    pub started: u64,
    /// The host's boot: `/proc/sys/kernel/random/boot_id`.
    pub boot: String,
}

/// The id of this host's boot; it is another one after each restart of the host.
pub fn boot_id() -> String {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    text.trim().to_owned()
}

impl Identity {
    /// Of a process.
    pub fn of(process: &Process) -> Self {
        let (pid, started) = (process.id(), process.started());
        let boot = boot_id();
        Self { pid, started, boot }
    }

    /// The process that has this id now.
    pub fn find(pid: u32) -> Option<Self> {
        Process::find(pid).as_ref().map(Self::of)
    }

    /// Whether it still runs.
    pub fn is_alive(&self) -> bool {
        self.is_of_this_boot() && start_time(self.pid) == Some(self.started)
    }

    /// Whether the host has not been restarted since it was started.
    pub fn is_of_this_boot(&self) -> bool {
        self.boot == boot_id()
    }

    /// Ends it as if power were cut.
    ///
    /// # Errors
    /// If it outlives SIGKILL.
    pub async fn end(&self) -> Result<(), Outlives> {
        let Some(process) = Process::find(self.pid).filter(|_| self.is_alive()) else {
            return Ok(());
        };
        process.kill();
        let gone = tokio::time::timeout(TIMEOUT, process.gone()).await;
        gone.map_err(|_| Outlives { pid: self.pid })
    }

    /// Whether it was started before a moment, in milliseconds since 1970, as far as the host's clock tells.
    pub fn is_older_than(&self, moment_ms: u64) -> bool {
        let Some(boot) = boot_time() else {
            return false;
        };
        let since_boot = Duration::from_millis(self.started.saturating_mul(1000 / TICKS));
        self.is_of_this_boot() && boot + since_boot < Duration::from_millis(moment_ms)
    }
}

/// When the host booted, since 1970.
fn boot_time() -> Option<Duration> {
    let up = std::fs::read_to_string("/proc/uptime").ok()?;
    let seconds: f64 = up.split(' ').next()?.parse().ok()?;
    let up = Duration::try_from_secs_f64(seconds).ok()?;
    let now = std::time::SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()?;
    now.checked_sub(up)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_very_process_is_it() {
        let me = Identity::find(std::process::id()).expect("we run");
        assert!(me.is_alive() && me.is_of_this_boot());
        let later = Identity {
            started: me.started + 1,
            ..me.clone()
        };
        let before_the_boot = Identity {
            boot: "another".to_owned(),
            ..me.clone()
        };
        for other in [later, before_the_boot] {
            assert!(!other.is_alive());
            assert_ne!(other, me);
        }
        let noted = serde_json::to_string(&me).expect("JSON");
        assert_eq!(
            serde_json::from_str::<Identity>(&noted).expect("an identity"),
            me
        );
    }

    #[test]
    fn tells_whether_it_was_there_before() {
        let me = Identity::find(std::process::id()).expect("we run");
        let now = std::time::SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .expect("after 1970");
        let now = u64::try_from(now.as_millis()).expect("soon enough");
        assert!(me.is_older_than(now + 1000));
        assert!(!me.is_older_than(now - 1000 * 3600 * 24 * 365));
    }

    #[tokio::test]
    async fn another_process_of_the_same_id_is_not_it() {
        let me = Process::find(std::process::id()).expect("we run");
        assert!(me.is_alive());
        let before_me = Process {
            started: me.started + 1,
            ..me
        };
        assert!(!before_me.is_alive());
        before_me.kill();
        before_me.gone().await;
    }
}
