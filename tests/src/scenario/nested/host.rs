//! A Debian host with KVM: a guest of QEMU's translator, which emulates AMD's virtualisation.

use crate::cleanup::still_time;
use crate::command::{Process, Run};
use crate::guest::NestedHost;
use crate::packages::{Packages, Qemu};
use crate::{Error, Result};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// Begins the last line that the host says.
const VERDICT: &str = "verdict ";
/// How often it is looked whether all is over.
const GLANCE: Duration = Duration::from_millis(200);
/// How much of each log an error shows, in lines.
const SHOWN: usize = 30;
/// Of one run, which is ended then: it takes a minute or two.
const LIMIT: Duration = Duration::from_secs(300);
const MIB: u32 = 4096;
const CPUS: u32 = 1;

/// How a run in the host ended.
#[derive(Debug)]
pub(super) enum End {
    /// All held.
    Passed,
    /// Something did not hold.
    Failed(String),
    /// There is nothing to judge: it did not come to an end in time.
    Unfinished(String),
}

/// Says inside the host how the run ended.
pub(super) fn tell(result: &Result<()>) {
    let verdict = match result {
        Ok(()) => json!({"passed": true}),
        Err(error) => json!({
            "passed": false,
            "late": matches!(error, Error::Late { .. }),
            "error": error.to_string(),
        }),
    };
    println!("{VERDICT}{verdict}");
}

fn read(verdict: &str) -> Option<End> {
    let verdict: Value = serde_json::from_str(verdict).ok()?;
    if verdict["passed"].as_bool()? {
        return Some(End::Passed);
    }
    let error = verdict["error"].as_str()?.to_owned();
    Some(if verdict["late"].as_bool()? {
        End::Unfinished(error)
    } else {
        End::Failed(error)
    })
}

/// Boots the host for a case, shows what it says, and ends it: at its verdict, or when the time is up. The logs of each
/// attempt are kept.
pub(super) fn run(packages: &Packages, host: &NestedHost, case: &str, attempt: u32) -> Result<End> {
    let begun = Instant::now();
    let logs = Logs::beside(&host.disk, case, attempt);
    let mut process = start(&packages.qemu(Qemu::V11_1)?, host, case, &logs)?;
    let lines = lines(&mut process)?;
    loop {
        still_time()?;
        if begun.elapsed() > LIMIT {
            let limit = LIMIT.as_secs();
            return Ok(End::Unfinished(format!("no verdict within {limit} s")));
        }
        match lines.recv_timeout(GLANCE) {
            Ok(line) => match line.strip_prefix(VERDICT).and_then(read) {
                Some(end) => return Ok(end),
                None => println!("  {line}"),
            },
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                let ended = process.wait()?;
                return Ok(End::Unfinished(format!(
                    "it ended without a verdict ({ended})\n{}",
                    logs.words()
                )));
            }
        }
    }
}

struct Logs {
    /// The host's kernel.
    console: PathBuf,
    /// Its QEMU.
    qemu: PathBuf,
}

impl Logs {
    fn beside(disk: &Path, case: &str, attempt: u32) -> Self {
        Self {
            console: disk.with_file_name(format!("{case}-{attempt}-console.log")),
            qemu: disk.with_file_name(format!("{case}-{attempt}-qemu.log")),
        }
    }

    /// The ends of both.
    fn words(&self) -> String {
        let end = |path: &Path| {
            let text = fs::read(path).unwrap_or_default();
            let text = String::from_utf8_lossy(&text).into_owned();
            let lines: Vec<&str> = text.lines().collect();
            let end = lines[lines.len().saturating_sub(SHOWN)..].join("\n");
            format!("{}:\n{end}", path.display())
        };
        format!("{}\n{}", end(&self.console), end(&self.qemu))
    }
}

fn start(qemu: &Path, host: &NestedHost, case: &str, logs: &Logs) -> Result<Process> {
    let words = File::create(&logs.qemu).map_err(Error::file("create", &logs.qemu))?;
    let mut run = Run::new(qemu).cure("See its words");
    run = run.args(["-name", "nested-host", "-nodefaults", "-no-user-config"]);
    run = run.args(["-display", "none", "-no-reboot", "-machine", "q35"]);
    // Of the processors with virtualisation that the translator has, one that KVM runs on with nested paging.
    run = run.args(["-accel", "tcg,thread=multi,tb-size=1024"]);
    run = run.args(["-cpu", "EPYC-Rome", "-smp", &CPUS.to_string()]);
    run = run.args(["-m", &format!("{MIB}M")]);
    run = run.arg("-kernel").arg(&host.kernel);
    run = run.arg("-initrd").arg(&host.initrd);
    run = run.arg("-append").arg(format!(
        "console=ttyS0 quiet panic=-1 mitigations=off testbed.case={case}"
    ));
    // What the host writes is thrown away with it: QEMU keeps it in a file without a name.
    let disk = host.disk.display();
    if let Some(folder) = host.disk.parent() {
        run = run.env("TMPDIR", folder);
    }
    run = run.arg("-drive").arg(format!(
        "if=none,id=root,format=raw,cache=unsafe,snapshot=on,file={disk}"
    ));
    run = run.args(["-device", "virtio-blk-pci,drive=root"]);
    run = run
        .arg("-serial")
        .arg(format!("file:{}", logs.console.display()))
        .args(["-serial", "stdio"]);
    run.command()
        .stdout(Stdio::piped())
        .stderr(Stdio::from(words));
    run.spawn()
}

/// What the host says, a line at a time, until it ends.
fn lines(process: &mut Process) -> Result<Receiver<String>> {
    let (sender, lines) = channel();
    let out = process.child().stdout.take();
    std::thread::Builder::new()
        .name("nested-host".into())
        .spawn(move || {
            for line in out
                .into_iter()
                .flat_map(|out| BufReader::new(out).split(b'\n'))
            {
                let Ok(line) = line else { return };
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                if !line.is_empty() && sender.send(line).is_err() {
                    return;
                }
            }
        })
        .map_err(Error::system("start a thread"))?;
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_did_not_end_may_be_tried_again() {
        let end = |text| read(text);
        assert!(matches!(end(r#"{"passed": true}"#), Some(End::Passed)));
        let late = r#"{"passed": false, "late": true, "error": "slow"}"#;
        assert!(matches!(end(late), Some(End::Unfinished(_))));
        let wrong = r#"{"passed": false, "late": false, "error": "a byte"}"#;
        assert!(matches!(end(wrong), Some(End::Failed(_))));
        assert!(end("{}").is_none() && end("no").is_none());
    }
}
