//! Gets the guest's reports while a migration runs.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use transhume_protocol::agent::ReportSource;

use super::hints::Hints;
use crate::guest::{self, DiskName};
use crate::relay::progress::{Counter, Progress};

/// How long an agent may take to answer.
const HELLO_PATIENCE: Duration = Duration::from_secs(2);
/// Pause between two reports, and the share of one CPU of the guest that they may take.
const INTERVAL: Duration = Duration::from_secs(10);
const CPU_PERMILLE: u16 = 500;
/// Reports that come faster than this are dropped: sorting one costs the host more than the guest.
const LEAST_INTERVAL: Duration = Duration::from_millis(250);

/// The thread that listens to the agent.
pub(super) struct Reports {
    stop: Arc<AtomicBool>,
    remarks: Arc<Mutex<Vec<String>>>,
    first: watch::Receiver<bool>,
}

impl Reports {
    /// Starts to listen.
    pub(super) fn start(
        socket: Option<PathBuf>,
        disks: Vec<DiskName>,
        session: u64,
        hints: Arc<Hints>,
        progress: Arc<Progress>,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let remarks = Arc::new(Mutex::new(Vec::new()));
        let (ready, first) = watch::channel(false);
        let reports = Self {
            stop: Arc::clone(&stop),
            remarks: Arc::clone(&remarks),
            first,
        };
        let span = tracing::Span::current();
        let listener = Listener {
            stop,
            remarks,
            ready,
            hints,
            progress,
        };
        let thread = std::thread::Builder::new().name("relay-agent".to_owned());
        let spawned = thread.spawn(move || {
            let _entered = span.entered();
            listener.run(socket, disks, session);
        });
        if let Err(error) = spawned {
            reports.remark(format!("the agent cannot be listened to: {error}"));
        }
        reports
    }

    fn remark(&self, text: String) {
        remark(&self.remarks, text);
    }

    /// Waits for the first report, or until it is clear that none will come.
    pub(super) async fn first(&mut self, patience: Duration) {
        let came = self.first.wait_for(|ready| *ready);
        if let Ok(Err(_)) | Err(_) = tokio::time::timeout(patience, came).await {
            tracing::debug!("no report of the page cache before the start");
        }
    }

    /// Ends the listening; what people should know of it.
    pub(super) fn finish(&self) -> Vec<String> {
        self.stop.store(true, Ordering::Relaxed);
        self.remarks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Drop for Reports {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Most remarks that an agent can cause.
const MOST_REMARKS: usize = 8;

fn remark(remarks: &Mutex<Vec<String>>, text: String) {
    let mut remarks = remarks.lock().unwrap_or_else(PoisonError::into_inner);
    if remarks.len() < MOST_REMARKS && !remarks.contains(&text) {
        tracing::info!("{text}");
        remarks.push(text);
    }
}

struct Listener {
    stop: Arc<AtomicBool>,
    remarks: Arc<Mutex<Vec<String>>>,
    ready: watch::Sender<bool>,
    hints: Arc<Hints>,
    progress: Arc<Progress>,
}

impl Listener {
    fn run(self, socket: Option<PathBuf>, disks: Vec<DiskName>, session: u64) {
        let Some(socket) = socket else {
            remark(
                &self.remarks,
                "the VM has no agent channel: all memory crosses the link".into(),
            );
            return;
        };
        let (mut agent, greeting) = match guest::connect(&socket, disks, session, HELLO_PATIENCE) {
            Ok(connected) => connected,
            Err(reason) => {
                remark(
                    &self.remarks,
                    format!("{reason} (all memory crosses the link)"),
                );
                return;
            }
        };
        if greeting.source == ReportSource::UserSpace {
            remark(
                &self.remarks,
                "the guest has no transhume.ko: its agent reports from user space, slower and \
                 without files that are open but unlinked"
                    .into(),
            );
        }
        tracing::debug!(agent = greeting.agent, source = ?greeting.source, "agent answers");
        let mut last: Option<Instant> = None;
        let listened = agent.start_reports(INTERVAL, CPU_PERMILLE).and_then(|()| {
            agent.listen(
                || !self.stop.load(Ordering::Relaxed),
                |report| {
                    if last.is_some_and(|last| last.elapsed() < LEAST_INTERVAL) {
                        return;
                    }
                    last = Some(Instant::now());
                    if report.left_out > 0 {
                        tracing::debug!(ranges = report.left_out, "left out of the report");
                    }
                    self.hints.report(report.ranges);
                    self.progress.set(Counter::HintedPages, self.hints.pages());
                    let _ = self.ready.send(true);
                },
                |text| remark(&self.remarks, format!("the guest's agent says: {text}")),
            )
        });
        // The agent stops by itself when its channel closes.
        let stopped = listened.and_then(|()| agent.stop_reports());
        if let Err(error) = stopped {
            tracing::debug!(%error, "agent's channel");
        }
    }
}
