//! Warns of this host's own certificates before other hosts believe them no more.

use super::daemon::Daemon;
use std::path::Path;
use std::sync::Weak;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use transhume_link::Security;
use transhume_pki::Concern;

/// How often they are looked at.
const DAY: Duration = Duration::from_secs(86_400);

/// Looks at them at once, and every day until the service ends.
pub(super) async fn watch(daemon: Weak<Daemon>) {
    loop {
        let Some(daemon) = daemon.upgrade() else {
            return;
        };
        let config = daemon.config();
        if let Security::Tls { files, host } = config.security() {
            let cure = format!("`transhume pki issue {host} --renew` makes a new one");
            look(&files.certificate, "this host's certificate", &cure);
            let cure = "make another by `transhume pki init`, and certificates of it for all hosts";
            look(&files.authority, "the authority's certificate", cure);
        }
        drop(daemon);
        tokio::time::sleep(DAY).await;
    }
}

/// Whether it can be used at all is said where it is used.
fn look(path: &Path, what: &str, cure: &str) {
    let Ok(shown) = transhume_pki::show(path) else {
        return;
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = now.map_or(0, |now| i64::try_from(now.as_secs()).unwrap_or(i64::MAX));
    let path = path.display();
    match shown.concern(now) {
        Some(Concern::Invalid(why)) => {
            tracing::error!(%path, valid = shown.validity, "{what} {why}: no host can be reached; {cure}");
        }
        Some(Concern::Expires(days)) => {
            tracing::warn!(%path, valid = shown.validity, "{what} expires in {days} days; {cure}");
        }
        None => {}
    }
}
