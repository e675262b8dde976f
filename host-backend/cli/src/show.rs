//! Answers as people read them.

use crate::summary::{kinds, summary};
use crate::units::{PAGE, bytes, date, duration, to_float, to_number};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::fmt::Write;
use std::time::{Duration, Instant};
use transhume_api::migration::{Phase, Snapshot, Traffic};
use transhume_api::{JobInfo, JobState, MachineInfo, Mode, Response, VmInfo};

/// How often a line is written where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// For programs: the answer's content, on one line.
pub(crate) fn json(response: &Response) -> String {
    let whole = serde_json::to_value(response).unwrap_or_default();
    match (response, whole) {
        // What went wrong keeps its name, so that it cannot be taken for an answer.
        (Response::Error(_) | Response::Done(_), whole) => whole.to_string(),
        (_, serde_json::Value::Object(object)) => object
            .into_iter()
            .next()
            .map(|(_, content)| content.to_string())
            .unwrap_or_default(),
        (_, whole) => whole.to_string(),
    }
}

/// For people.
pub(crate) fn people(response: &Response) -> String {
    match response {
        Response::Vm(info) => vm(info),
        Response::Vms(all) => vms(all),
        Response::Arguments(arguments) => shell(arguments),
        Response::Job(info) => job(info),
        Response::Jobs(all) => jobs(all),
        Response::Done(text) => text.clone(),
        Response::Error(failure) => failure.message.clone(),
    }
}

fn rows(head: &[&str], body: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = body.iter().map(|row| row[column].chars().count());
        cells.chain([head[column].len()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let head: Vec<String> = head.iter().map(|&cell| cell.to_owned()).collect();
    let lines = std::iter::once(&head).chain(body).map(|row| {
        let cells = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn vms(all: &[VmInfo]) -> String {
    if all.is_empty() {
        return "No VMs run here. `transhume vm list --all` shows those that are stopped as well; `transhume vm start \
                DEFINITION.toml` starts one."
            .to_owned();
    }
    let body: Vec<Vec<String>> = all
        .iter()
        .map(|info| {
            let machine =
                |show: fn(&MachineInfo) -> String| info.machine.as_ref().map_or("-".into(), show);
            vec![
                info.name.clone(),
                match info.job {
                    Some(job) => format!("{} (job {job})", info.state),
                    None if info.memory_follows => format!("{}, memory follows", info.state),
                    None => info.state.clone(),
                },
                machine(|one| one.machine_type.clone()),
                machine(|one| bytes(one.memory_bytes)),
                machine(|one| one.vcpus.to_string()),
                machine(|one| one.qemu_version.clone()),
                machine(|one| one.pid.map_or("-".into(), |pid| pid.to_string())),
            ]
        })
        .collect();
    rows(
        &["NAME", "STATE", "MACHINE", "MEMORY", "VCPUS", "QEMU", "PID"],
        &body,
    )
}

fn vm(info: &VmInfo) -> String {
    let mut lines = vec![("name", info.name.clone()), ("state", info.state.clone())];
    lines.extend(info.note.clone().map(|note| ("", note)));
    lines.extend(info.stopped_ms.map(|at| ("since", date(at))));
    if info.autostart {
        lines.push(("starts", "with the host".to_owned()));
    }
    lines.extend(info.job.map(|job| {
        (
            "moves",
            format!("job {job}: `transhume job show {job} --follow`"),
        )
    }));
    if let Some(machine) = &info.machine {
        let path = |path: &std::path::Path| path.display().to_string();
        lines.push((
            "machine",
            format!("{} by {}", machine.machine_type, machine.accelerator),
        ));
        lines.push(("memory", bytes(machine.memory_bytes)));
        lines.push(("vcpus", format!("{} of {}", machine.vcpus, machine.cpu)));
        let process = machine
            .pid
            .map_or(String::new(), |pid| format!(", process {pid}"));
        lines.push(("qemu", format!("{}{process}", machine.qemu_version)));
        for disk in &machine.disks {
            let read_only = if disk.read_only { ", read-only" } else { "" };
            let text = format!(
                "{}: {} ({}{read_only})",
                disk.id,
                path(&disk.path),
                disk.format
            );
            lines.push(("disk", text));
        }
        let agent = machine
            .agent
            .as_deref()
            .map_or("no channel".to_owned(), path);
        lines.push(("agent", agent));
        lines.extend(
            machine
                .serial
                .as_deref()
                .map(|socket| ("serial", path(socket))),
        );
        lines.extend(machine.vnc.as_deref().map(|socket| ("vnc", path(socket))));
        lines.push(("qmp", path(&machine.qmp)));
        lines.extend(machine.log.as_deref().map(|log| ("log", path(log))));
    }
    let lines = lines
        .iter()
        .map(|(key, value)| format!("{key:<8} {value}").trim_end().to_owned());
    lines.collect::<Vec<_>>().join("\n")
}

/// A command line that a shell takes back, an option a line.
fn shell(arguments: &[String]) -> String {
    let mut text = String::new();
    for (index, argument) in arguments.iter().enumerate() {
        if index > 0 {
            text.push_str(if argument.starts_with('-') {
                " \\\n  "
            } else {
                " "
            });
        }
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./,:=@+".contains(&byte);
        if !argument.is_empty() && argument.bytes().all(plain) {
            text.push_str(argument);
        } else {
            let _ = write!(text, "'{}'", argument.replace('\'', "'\\''"));
        }
    }
    text
}

fn state_word(job: &JobInfo) -> String {
    let phase = |phase: Phase| match phase {
        Phase::Negotiate => "agreeing with the other host",
        Phase::Prepare => "preparing the other host",
        Phase::PreCopy => "copying memory",
        Phase::Switchover => "switching over",
        Phase::Commit => "handing over",
        Phase::PostCopy => "post-copy: the rest of memory follows",
        Phase::Completed
        | Phase::Failed
        | Phase::Cancelled
        | Phase::Ended
        | Phase::Lost
        | Phase::Unresolved => "ending",
    };
    match job.state {
        JobState::Running => phase(job.progress.phase).to_owned(),
        JobState::Completed => "completed".to_owned(),
        JobState::Planned => "dry run".to_owned(),
        JobState::Refused => "refused".to_owned(),
        JobState::Failed => "failed".to_owned(),
        JobState::Cancelled => "cancelled".to_owned(),
        JobState::Unresolved => "UNRESOLVED".to_owned(),
        JobState::Ended => "guest ended".to_owned(),
        JobState::Lost => "LOST".to_owned(),
    }
}

fn jobs(all: &[JobInfo]) -> String {
    if all.is_empty() {
        return "No migrations yet. `transhume migrate NAME --to HOST` starts one.".to_owned();
    }
    let body: Vec<Vec<String>> = all
        .iter()
        .map(|job| {
            let summary = job.summary.as_ref();
            let elapsed = summary.map_or(to_float(job.progress.elapsed_ms), |one| one.total_ms);
            vec![
                job.id.to_string(),
                job.vm.clone(),
                job.to.clone(),
                state_word(job),
                duration(elapsed),
                summary.map_or("-".to_owned(), |one| duration(one.downtime.total_ms)),
                bytes(job.progress.traffic.wire_bytes),
            ]
        })
        .collect();
    rows(
        &[
            "JOB",
            "VM",
            "TO",
            "STATE",
            "TIME",
            "DOWNTIME",
            "ON THE WIRE",
        ],
        &body,
    )
}

/// A job, and its summary if it is completed.
pub(crate) fn job(job: &JobInfo) -> String {
    let JobInfo { id, vm, to, .. } = job;
    match (job.state, &job.summary, &job.plan_text, &job.error) {
        (JobState::Completed, Some(all), ..) => summary(all),
        (JobState::Planned, _, Some(plan), _) => plan.clone(),
        (JobState::Running, ..) => {
            let end = match job.progress.phase {
                Phase::PostCopy if job.progress.waits_for.is_some() => format!(
                    ". {vm} stands still there where it needs memory that is still here, and goes on by itself when \
                     that can follow.\nIf it never can: `transhume vm stop {vm} --force` gives it up"
                ),
                Phase::PostCopy => String::new(),
                _ => format!(", end it by `transhume job cancel {id}`"),
            };
            format!(
                "job {id} moves {vm} to {to}: {}\nFollow it by `transhume job show {id} --follow`{end}.",
                moment(job, None)
            )
        }
        // They say themselves how it ended. What a refusal says are the other host's words.
        (JobState::Failed | JobState::Cancelled | JobState::Ended, _, _, Some(error))
            if error.starts_with("the migration ") =>
        {
            format!("job {id}, {vm} to {to}: {error}")
        }
        (_, _, _, Some(error)) => format!("job {id}, {vm} to {to}, {}: {error}", state_word(job)),
        _ => format!("job {id}, {vm} to {to}: {}", state_word(job)),
    }
}

/// A running job in one line. `rates`: bytes of stream and of link in a second.
fn moment(job: &JobInfo, rates: Option<(f64, f64)>) -> String {
    let Snapshot {
        traffic,
        elapsed_ms,
        ..
    } = &job.progress;
    let mut text = format!("{}, {}", state_word(job), duration(to_float(*elapsed_ms)));
    if traffic.stream_bytes == 0 {
        return text;
    }
    // What matters most first: a terminal may show no more of it.
    if let Some(what) = &job.progress.waits_for {
        let _ = write!(text, ", waits for {what}");
    } else if job.progress.link_away_ms > 0 {
        let away = duration(to_float(job.progress.link_away_ms));
        let _ = write!(text, ", the link has been away for {away}");
    } else if let Some((stream, wire)) = rates
        && job.progress.phase == Phase::PreCopy
        && stream.max(wire) < STANDSTILL
    {
        // It takes seconds until a link is known to be away.
        text += ", nothing moves at the moment";
    } else if let Some((stream, wire)) = rates {
        if let Some(left) = job.progress.remaining_bytes
            && job.progress.phase == Phase::PreCopy
            && job.progress.elapsed_ms >= GROUND_MS
            && stream >= STANDSTILL
        {
            let left = duration(1000.0 * to_float(left) / stream);
            let _ = write!(text, ", about {left} left");
        }
        let _ = write!(text, ", {}/s", bytes(to_number(wire)));
    }
    if job.progress.phase == Phase::PostCopy {
        let left = job.progress.remaining_bytes.unwrap_or_default();
        let asked = bytes(job.progress.requested_pages * PAGE);
        let _ = write!(text, ", {} left, {asked} asked for", bytes(left));
    }
    let _ = write!(text, ", wire {}", bytes(traffic.wire_bytes));
    for (name, pages) in kinds(traffic) {
        if pages > 0 {
            let _ = write!(text, ", {name} {}", bytes(pages * PAGE));
        }
    }
    text
}

/// For how long a forecast must have been bad before it is told.
const ADVICE_AFTER: Duration = Duration::from_secs(5);

/// In bytes a second: below it no time left is named, which would be days.
const STANDSTILL: f64 = 10_000.0;

/// How long a migration must have gone on before a time left is named: what its first seconds say of its rates is far off.
const GROUND_MS: u64 = 4000;

/// Shows how a job goes: a bar on a terminal, lines elsewhere, nothing for programs. On standard error.
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    silent: bool,
    last: Option<(Instant, Phase)>,
    before: Option<(Instant, Traffic)>,
    rates: Option<(f64, f64)>,
    missed_since: Option<Instant>,
    advised: bool,
    goes_over: bool,
}

impl Progress {
    pub(crate) fn new(terminal: bool, silent: bool) -> Self {
        let bar = terminal.then(|| {
            let bar = ProgressBar::with_draw_target(Some(1), ProgressDrawTarget::stderr());
            // A template without mistakes always parses.
            if let Ok(style) = ProgressStyle::with_template("[{bar:24}] {percent:>3} %  {wide_msg}")
            {
                bar.set_style(style.progress_chars("=> "));
            }
            bar
        });
        Self {
            bar,
            silent,
            last: None,
            before: None,
            rates: None,
            missed_since: None,
            advised: false,
            goes_over: false,
        }
    }

    fn measure(&mut self, traffic: Traffic) {
        let now = Instant::now();
        let Some((then, before)) = self.before else {
            self.before = Some((now, traffic));
            return;
        };
        let seconds = (now - then).as_secs_f64();
        if seconds < 0.2 {
            return;
        }
        let rate = |new: u64, old: u64| to_float(new.saturating_sub(old)) / seconds;
        let fresh = (
            rate(traffic.stream_bytes, before.stream_bytes),
            rate(traffic.wire_bytes, before.wire_bytes),
        );
        // Smoothed, for a number that can be read.
        let mix = |old: f64, new: f64| 0.7 * old + 0.3 * new;
        self.rates = Some(
            self.rates
                .map_or(fresh, |old| (mix(old.0, fresh.0), mix(old.1, fresh.1))),
        );
        self.before = Some((now, traffic));
    }

    pub(crate) fn show(&mut self, job: &JobInfo) {
        if self.silent {
            return;
        }
        self.advise(job);
        self.explain(job);
        self.measure(job.progress.traffic);
        let text = moment(job, self.rates);
        if let Some(bar) = &self.bar {
            let total = job.progress.total_bytes.max(1);
            bar.set_length(total);
            bar.set_position(
                job.progress
                    .remaining_bytes
                    .map_or(0, |left| total.saturating_sub(left)),
            );
            bar.set_message(text);
            return;
        }
        let phase = job.progress.phase;
        let due = self
            .last
            .is_none_or(|(at, before)| before != phase || at.elapsed() >= LINE_EVERY);
        if due {
            eprintln!("{}: {text}", job.vm);
            self.last = Some((Instant::now(), phase));
        }
    }

    /// Tells once why the goal will not be met, when that has been so for a while: a guest that starts a program, or boots,
    /// writes much for some seconds.
    fn advise(&mut self, job: &JobInfo) {
        let advice = job
            .progress
            .forecast
            .as_ref()
            .and_then(|forecast| forecast.advice.as_ref());
        let Some(advice) = advice else {
            self.missed_since = None;
            return;
        };
        let since = *self.missed_since.get_or_insert_with(Instant::now);
        if since.elapsed() < ADVICE_AFTER || std::mem::replace(&mut self.advised, true) {
            return;
        }
        self.say(&format!("{}: {advice}", job.vm));
    }

    /// Tells once why the VM goes over to post-copy.
    fn explain(&mut self, job: &JobInfo) {
        let choice = job.progress.choice.as_ref();
        let Some(choice) = choice.filter(|choice| choice.mode == Mode::Post) else {
            return;
        };
        if !std::mem::replace(&mut self.goes_over, true) {
            self.say(&format!("{}: post-copy, because {}", job.vm, choice.why));
        }
    }

    fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            None => eprintln!("{text}"),
        }
    }

    pub(crate) fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
#[path = "show_tests.rs"]
mod tests;
