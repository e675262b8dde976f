//! Waits for a cancel.

use tokio::sync::watch;

/// Returns when the migration is cancelled.
pub(crate) async fn cancelled(cancel: &mut watch::Receiver<bool>) {
    if cancel.wait_for(|cancel| *cancel).await.is_err() {
        // Nobody can cancel any more.
        std::future::pending::<()>().await;
    }
}
