//! Which process a QEMU is, told apart from every other one that this host ever ran.

use super::process::{Process, start_time};
use super::{Error, Result};
use serde::{Deserialize, Serialize};
use std::time::{Duration, UNIX_EPOCH};

/// Ticks in a second in `/proc/PID/stat`, the same on every Linux (`USER_HZ`).
const TICKS: u64 = 100;
/// How long a process may take to end.
const PATIENCE: Duration = Duration::from_secs(10);

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
    pub(super) fn of(process: &Process) -> Self {
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
    /// [`Error::Unfit`] if it outlives SIGKILL.
    pub async fn end(&self) -> Result<()> {
        let Some(process) = Process::find(self.pid).filter(|_| self.is_alive()) else {
            return Ok(());
        };
        process.kill();
        let gone = tokio::time::timeout(PATIENCE, process.gone()).await;
        gone.map_err(|_| Error::Unfit {
            cause: format!("QEMU (process {}) outlives SIGKILL", self.pid),
            cure: "it hangs in the kernel, most likely on storage: see `dmesg`".to_owned(),
        })
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
}
