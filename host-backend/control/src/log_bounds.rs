//! Keeps the logs of VMs within their size, whatever their guests write.

use super::daemon::Daemon;
use std::collections::HashSet;
use std::sync::Weak;
use std::time::Duration;

/// How often they are looked at: a guest writes some megabytes at most meanwhile.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// Looks at them until the service ends.
pub(super) async fn keep(daemon: Weak<Daemon>) {
    // Said once of each VM.
    let mut said = HashSet::new();
    loop {
        let Some(daemon) = daemon.upgrade() else {
            return;
        };
        let names: Vec<String> = daemon
            .table
            .all()
            .into_iter()
            .map(|(name, _)| name)
            .collect();
        said.retain(|name| names.contains(name));
        let settings = daemon.launch_settings();
        let most = daemon.config().log_size.bytes();
        drop(daemon);
        let look = move || {
            let failed = names.into_iter().filter_map(|name| {
                let bounded = settings.files(&name).logs().bound(most);
                bounded.err().map(|error| (name, error))
            });
            failed.collect::<Vec<_>>()
        };
        for (vm, error) in transhume_base::task::blocking(look)
            .await
            .unwrap_or_default()
        {
            if said.insert(vm.clone()) {
                tracing::warn!(vm, %error, "its log is not kept within `log-size`");
            }
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}
