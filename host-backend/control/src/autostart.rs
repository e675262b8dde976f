//! VMs that are started by themselves when the host was.

use super::daemon::Daemon;
use super::vm_table::Entry;
use std::sync::Arc;
use std::time::Duration;
use tracing::Instrument as _;
use transhume_base::process_identity::boot_id;

/// Between two tries to start a VM with the host; and as much again at most, so that two hosts that ask each
/// other do not do so for ever.
const RETRY_INTERVAL: Duration = Duration::from_secs(4);

impl Daemon {
    /// Starts the VMs that are to be started with the host, if it has been restarted since they stopped.
    pub(super) fn autostart(self: &Arc<Self>) {
        for (name, _) in self.table.all() {
            if self.is_due(&name) {
                let span = tracing::info_span!("autostart", vm = name);
                let starting = Arc::clone(self).autostart_one(name);
                transhume_base::task::spawn(starting.instrument(span));
            }
        }
    }

    pub(super) fn is_due(&self, name: &str) -> bool {
        let Ok(Entry::Stopped(record)) = self.table.entry(name) else {
            return false;
        };
        let is_new_boot = |boot: &str| boot != boot_id();
        record.autostart
            && record
                .stopped
                .is_some_and(|stopped| is_new_boot(&stopped.boot))
    }

    async fn autostart_one(self: Arc<Self>, name: String) {
        let mut told = String::new();
        // An operator may have done something else with it meanwhile.
        while self.is_due(&name) {
            match self.start_defined(&name, false).await {
                Ok(_) => tracing::info!("started with the host"),
                Err(error) => {
                    let error = error.to_string();
                    if error != told {
                        tracing::warn!("not started with the host, and tried again: {error}");
                        told = error;
                    }
                    let mut random = [0];
                    // Without it the pause is the shortest one.
                    let _ = getrandom::fill(&mut random);
                    tokio::time::sleep(
                        RETRY_INTERVAL + RETRY_INTERVAL * u32::from(random[0]) / 256,
                    )
                    .await;
                }
            }
        }
    }
}
