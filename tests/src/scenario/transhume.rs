//! The command `transhume` in scenarios: run to its end, or left running.

use crate::command::Process;
use crate::error::check;
use crate::hosts::daemon::Daemon;
use crate::{Error, Result};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::process::{Output, Stdio};

/// How a command ended.
#[derive(Debug)]
pub(super) struct Answer {
    /// What was asked, for messages.
    asked: String,
    /// Its exit code; -1 when a signal ended it.
    pub(super) code: i32,
    /// Its one JSON object, or null.
    pub(super) value: Value,
    /// What it said to people.
    pub(super) said: String,
}

/// A command that runs.
#[derive(Debug)]
pub(super) struct Running {
    asked: String,
    process: Process,
}

/// Starts a command with `--json`.
pub(super) fn begin(daemon: &Daemon, arguments: &[&str]) -> Result<Running> {
    let mut run = daemon.transhume(arguments).arg("--json");
    run.command().stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(Running {
        asked: arguments.join(" "),
        process: run.spawn()?,
    })
}

/// Runs a command with `--json` to its end, whatever that is.
pub(super) fn ask(daemon: &Daemon, arguments: &[&str]) -> Result<Answer> {
    begin(daemon, arguments)?.end()
}

impl Running {
    /// Waits for its end.
    pub(super) fn end(self) -> Result<Answer> {
        let Output {
            status,
            stdout,
            stderr,
        } = self.process.finish()?;
        let out = String::from_utf8_lossy(&stdout);
        let said = String::from_utf8_lossy(&stderr).into_owned();
        let mut lines = out.lines();
        let value = lines
            .next()
            .and_then(|line| serde_json::from_str(line).ok())
            .unwrap_or_default();
        let answer = Answer {
            asked: self.asked,
            code: status.code().unwrap_or(-1),
            value,
            said,
        };
        check(lines.next().is_none(), || {
            format!("{answer} was not the only thing it said: {out}")
        })?;
        Ok(answer)
    }

    /// Whether it has ended.
    pub(super) fn ended(&self) -> bool {
        self.process.ended()
    }

    /// What Ctrl-C does.
    pub(super) fn interrupt(&self) -> Result<()> {
        self.process.signal(Signal::SIGINT)
    }
}

impl std::fmt::Display for Answer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            formatter,
            "`transhume {}` (exit code {}): {} {}",
            self.asked, self.code, self.value, self.said
        )
    }
}

impl Answer {
    /// Itself, if it exited so.
    pub(super) fn expect(self, code: i32) -> Result<Self> {
        check(self.code == code, || format!("Not {code}, but {self}"))?;
        Ok(self)
    }

    /// Why it did not succeed: its own error, or its job's.
    pub(super) fn message(&self) -> &str {
        let own = self.value["error"]["message"].as_str();
        own.or(self.value["error"].as_str()).unwrap_or_default()
    }

    /// Itself, if it exited so and its message has all these words.
    pub(super) fn refused(self, code: i32, words: &[&str]) -> Result<Self> {
        let answer = self.expect(code)?;
        let message = answer.message();
        for word in words {
            check(message.contains(word), || {
                format!("No \"{word}\" in {answer}")
            })?;
        }
        // The cure, in a sentence of its own or behind a semicolon.
        check(message.contains(';') || message.contains('\n'), || {
            format!("No cure in {answer}")
        })?;
        println!("  {}", message.replace('\n', "\n  "));
        Ok(answer)
    }

    /// A number in its object, by a path as in "/summary/total-ms".
    pub(super) fn number(&self, path: &str) -> Result<u64> {
        let found = self.value.pointer(path);
        found
            .and_then(Value::as_u64)
            .ok_or_else(|| Error::Check(format!("No number {path} in {self}")))
    }

    /// A word in its object.
    pub(super) fn word(&self, path: &str) -> Result<&str> {
        let found = self.value.pointer(path);
        found
            .and_then(Value::as_str)
            .ok_or_else(|| Error::Check(format!("No word {path} in {self}")))
    }
}
