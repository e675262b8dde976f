//! Gets the guest's reports while a migration runs.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use transhume_protocol::agent::ReportSource;

use crate::progress::{Counter, Progress};
use crate::send::clocks::Clocks;
use crate::send::hints::Hints;
use crate::send::prefetch::{Prefetch, Question};
use transhume_guest::{self as guest, Agent, DiskName, Greeting, GuestRange, Questions, Reported};

/// How long an agent may take to answer, until it is asked anew; the migration begins without it when it was silent once.
const HELLO_TIMEOUT: Duration = Duration::from_secs(2);
/// Between two tries to reach an agent that is silent: its guest may have other work.
const RETRY_INTERVAL: Duration = Duration::from_secs(3);
/// How often it is looked whether the migration is over meanwhile.
const STOP_POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Pause between two reports, and the share of one CPU of the guest that they may take.
const INTERVAL: Duration = Duration::from_secs(10);
const CPU_PERMILLE: u16 = 500;
/// Reports that come faster than this are dropped, or so soon that they would take more of a CPU than one part in so many:
/// sorting one costs the host more than the guest.
const MIN_INTERVAL: Duration = Duration::from_millis(250);
const CPU_SHARE: u32 = 10;

/// The first report is used in parts of so many pages, so that memory moves while the guest still looks
/// through its page cache; and in so many parts at most.
const PART_PAGES: u64 = 8192;
const MAX_PARTS: u32 = 256;

/// The thread that listens to the agent.
pub(crate) struct AgentListener {
    stop: Arc<AtomicBool>,
    remarks: Arc<Mutex<Vec<String>>>,
    /// Why the agent has not been reached yet.
    unreached: Arc<Mutex<Option<String>>>,
    first: watch::Receiver<First>,
    gate: Arc<AtomicBool>,
}

/// Whether there is a first part of a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum First {
    Expected,
    /// The agent was silent when it was asked.
    NotSoon,
    There,
}

impl AgentListener {
    /// Starts to listen to an agent by its socket, or tells why there is none. If the VM may move by post-copy the
    /// guest is asked in which order its memory is wanted, when that is near.
    pub(crate) fn start(
        agent: Result<PathBuf, &'static str>,
        disks: Vec<DiskName>,
        session: u64,
        hints: Arc<Hints>,
        progress: Arc<Progress>,
        order: Arc<Prefetch>,
        clocks: Arc<Clocks>,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let remarks = Arc::new(Mutex::new(Vec::new()));
        let (ready, first) = watch::channel(First::Expected);
        let reports = Self {
            stop: Arc::clone(&stop),
            remarks: Arc::clone(&remarks),
            unreached: Arc::default(),
            first,
            gate: Arc::default(),
        };
        let listener = Listener {
            stop,
            remarks,
            unreached: Arc::clone(&reports.unreached),
            ready,
            hints,
            progress,
            order,
            clocks,
            gate: Arc::clone(&reports.gate),
        };
        let listen = move || listener.run(agent, &disks, session);
        if let Err(error) = transhume_base::task::thread("relay-agent", listen) {
            reports.remark(format!("the agent cannot be listened to: {error}"));
        }
        reports
    }

    fn remark(&self, text: String) {
        remark(&self.remarks, text);
    }

    /// Has the guest get ready for a move by post-copy, when its first report is there.
    pub(crate) fn prepare_gate(&self) {
        self.gate.store(true, Ordering::Relaxed);
    }

    /// Waits for the first part of a report, or until it is clear that none will come soon.
    pub(crate) async fn first(&mut self, patience: Duration) {
        let came = self.first.wait_for(|first| *first != First::Expected);
        if let Ok(Err(_)) | Err(_) = tokio::time::timeout(patience, came).await {
            tracing::debug!("no report of the page cache before the start");
        }
    }

    /// Ends the listening; what people should know of it.
    pub(crate) fn finish(&self) -> Vec<String> {
        self.stop.store(true, Ordering::Relaxed);
        let remarks = || lock(&self.remarks).clone();
        let unreached = lock(&self.unreached).take();
        if let Some(reason) = unreached {
            self.remark(format!("{reason} (all memory crossed the link)"));
        } else if *self.first.borrow() != First::There && remarks().is_empty() {
            self.remark(
                "the guest's agent sent no report of its page cache: all memory crossed the link"
                    .to_owned(),
            );
        }
        remarks()
    }
}

impl Drop for AgentListener {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Most remarks that an agent can cause.
const MAX_REMARKS: usize = 8;

fn remark(remarks: &Mutex<Vec<String>>, text: String) {
    let mut remarks = lock(remarks);
    if remarks.len() < MAX_REMARKS && !remarks.contains(&text) {
        tracing::info!("{text}");
        remarks.push(text);
    }
}

struct Listener {
    stop: Arc<AtomicBool>,
    remarks: Arc<Mutex<Vec<String>>>,
    unreached: Arc<Mutex<Option<String>>>,
    ready: watch::Sender<First>,
    hints: Arc<Hints>,
    progress: Arc<Progress>,
    order: Arc<Prefetch>,
    clocks: Arc<Clocks>,
    gate: Arc<AtomicBool>,
}

impl Listener {
    fn run(self, agent: Result<PathBuf, &'static str>, disks: &[DiskName], session: u64) {
        let socket = match agent {
            Ok(socket) => socket,
            Err(reason) => {
                remark(
                    &self.remarks,
                    format!("{reason}: all memory crosses the link"),
                );
                return;
            }
        };
        let Some((mut agent, greeting)) = self.connect(&socket, disks, session) else {
            return;
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
        let mut first = FirstReport::default();
        // When the last report was taken, and how long the next one must not come.
        let mut last: Option<(Instant, Duration)> = None;
        let post_copy = self.order.end();
        let mut prepared = post_copy.and_then(|frames| agent.prepare_gate(frames).ok());
        let questions = post_copy.and_then(|frames| Some((agent.questions().ok()?, frames)));
        self.order.attend(questions.is_some());
        let listened = agent.start_reports(INTERVAL, CPU_PERMILLE).and_then(|()| {
            agent.listen(
                || {
                    // Not before there is a report: that comes first.
                    let due =
                        self.gate.load(Ordering::Relaxed) && *self.ready.borrow() == First::There;
                    if let Some(prepared) = prepared.as_mut().filter(|_| due) {
                        prepared.go_on();
                    }
                    self.ask(questions.as_ref());
                    !self.stop.load(Ordering::Relaxed)
                },
                |reported| {
                    let report = match reported {
                        Reported::Part(ranges) if last.is_none() => {
                            if let Some(ranges) = first.part(ranges) {
                                self.hints.extend(ranges, false);
                                self.tell();
                            }
                            return;
                        }
                        Reported::Part(_) => return,
                        Reported::Whole(report) => report,
                        Reported::Order(order) => {
                            self.progress.set_classes(self.order.answer(order));
                            return;
                        }
                        Reported::Clock(known) => return self.clocks.set_guest(known),
                    };
                    if last.is_some_and(|(last, pause)| last.elapsed() < pause) {
                        return;
                    }
                    let (is_first, began) = (last.is_none(), Instant::now());
                    if report.left_out > 0 {
                        tracing::debug!(ranges = report.left_out, "left out of the report");
                    }
                    if is_first {
                        self.hints.extend(first.rest(&report.ranges), true);
                    } else {
                        self.hints.replace(report.ranges);
                    }
                    let pause = MIN_INTERVAL.max(began.elapsed() * CPU_SHARE);
                    last = Some((Instant::now(), pause));
                    self.tell();
                },
                |text| remark(&self.remarks, format!("the guest's agent says: {text}")),
            )
        });
        self.order.attend(false);
        // The agent stops by itself when its channel closes.
        let stopped = listened.and_then(|()| agent.stop_reports());
        if let Err(error) = stopped {
            tracing::debug!(%error, "agent's channel");
        }
    }

    /// Passes on what the guest is to be asked. What cannot be asked is not answered.
    fn ask(&self, questions: Option<&(Questions, u64)>) {
        let Some((questions, frames)) = questions else {
            return;
        };
        let asked = match self.order.take_question() {
            Some(Question::Watch) => questions.watch(),
            Some(Question::Order) => questions.order(*frames),
            None => return,
        };
        if let Err(error) = asked {
            tracing::debug!(%error, "agent's channel");
        }
    }

    fn tell(&self) {
        self.progress.set(Counter::HintedPages, self.hints.pages());
        let _ = self.ready.send(First::There);
    }

    /// Reaches the agent, now or while memory moves: a guest that has just arrived may be slow to answer.
    fn connect(
        &self,
        socket: &Path,
        disks: &[DiskName],
        session: u64,
    ) -> Option<(Agent, Greeting)> {
        loop {
            let reason = match guest::connect(socket, disks.to_vec(), session, HELLO_TIMEOUT) {
                Ok(connected) => {
                    *lock(&self.unreached) = None;
                    return Some(connected);
                }
                Err(reason) => reason,
            };
            if lock(&self.unreached).replace(reason.clone()).as_ref() != Some(&reason) {
                tracing::info!(reason, "the agent is tried again while memory moves");
            }
            let _ = self.ready.send(First::NotSoon);
            let silent = Instant::now();
            while silent.elapsed() < RETRY_INTERVAL {
                if self.stop.load(Ordering::Relaxed) {
                    return None;
                }
                std::thread::sleep(STOP_POLL_INTERVAL);
            }
        }
    }
}

/// Cuts the first report into parts.
#[derive(Default)]
struct FirstReport {
    /// Ranges that were taken.
    taken: usize,
    parts: u32,
}

impl FirstReport {
    /// What is new in a report, when it is enough.
    fn part<'a>(&mut self, ranges: &'a [GuestRange]) -> Option<&'a [GuestRange]> {
        if self.parts >= MAX_PARTS {
            return None;
        }
        let new = self.rest(ranges);
        let pages: u64 = new.iter().map(|range| u64::from(range.pages)).sum();
        if pages < PART_PAGES {
            return None;
        }
        self.parts += 1;
        self.taken = ranges.len();
        Some(new)
    }

    /// What was not taken yet. A report that is shorter than what was taken is another one.
    fn rest<'a>(&self, ranges: &'a [GuestRange]) -> &'a [GuestRange] {
        ranges.get(self.taken..).unwrap_or(ranges)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_make_up_the_whole() {
        let range = |n: u64| GuestRange {
            pfn: n * 10_000,
            pages: 3000,
            disk: 0,
            sector: 0,
        };
        let all: Vec<_> = (0..10).map(range).collect();
        let mut first = FirstReport::default();
        let mut got = Vec::new();
        for end in 0..all.len() {
            got.extend_from_slice(first.part(&all[..end]).unwrap_or_default());
        }
        assert_eq!(got.len(), 9);
        got.extend_from_slice(first.rest(&all));
        assert_eq!(got, all);
        // The agent began anew.
        assert_eq!(first.part(&all[..4]), Some(&all[..4]));
        first.parts = MAX_PARTS;
        assert_eq!(first.part(&all), None);
    }
}
