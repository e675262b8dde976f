//! Runs other programs to their end, or in the background, and never leaves one behind.

use crate::cleanup::{self, Guard, Leftover};
use crate::{Error, Result};
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};

/// How much of a program's output an error shows, in lines.
const SHOWN: usize = 25;

/// A program to run.
#[derive(Debug)]
pub struct Run {
    command: Command,
    cure: String,
    /// It cleans up itself when it is told to end.
    gently: bool,
}

impl Run {
    /// A program by name or path.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        let mut command = Command::new(program);
        command.stdin(Stdio::null());
        Self {
            command,
            cure: String::new(),
            gently: false,
        }
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.args(args);
        self
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    /// Runs it in a folder.
    #[must_use]
    pub fn folder(mut self, path: impl AsRef<Path>) -> Self {
        self.command.current_dir(path);
        self
    }

    /// Runs it in a network namespace.
    pub(crate) fn in_namespace(mut self, path: &Path) -> Result<Self> {
        let namespace = File::open(path).map_err(Error::file("open", path))?;
        // SAFETY: between fork and exec only setns is called, which is async-signal-safe.
        unsafe {
            self.command
                .pre_exec(move || Ok(setns(&namespace, CloneFlags::CLONE_NEWNET)?));
        }
        Ok(self)
    }

    /// What a person can do when it fails; part of the error.
    #[must_use]
    pub fn cure(mut self, cure: impl Into<String>) -> Self {
        self.cure = cure.into();
        self
    }

    /// When we end it is told to end, and cleans up itself: a test bed.
    #[must_use]
    pub(crate) fn gently(mut self) -> Self {
        self.gently = true;
        self
    }

    /// The command, for what this type does not offer.
    pub fn command(&mut self) -> &mut Command {
        &mut self.command
    }

    /// The command line, for messages.
    fn line(&self) -> String {
        std::iter::once(self.command.get_program())
            .chain(self.command.get_args())
            .map(OsStr::to_string_lossy)
            .collect::<Vec<_>>()
            .join(" ")
    }

    /// Starts it as the leader of a process group that dies with us.
    pub fn spawn(mut self) -> Result<Process> {
        let line = self.line();
        let parent = nix::unistd::getpid();
        let signal = if self.gently {
            Signal::SIGTERM
        } else {
            Signal::SIGKILL
        };
        // SAFETY: between fork and exec only async-signal-safe calls are made: sigprocmask, prctl and
        // getppid.
        unsafe {
            self.command.process_group(0).pre_exec(move || {
                // What `cleanup::watch_signals` blocks for us is not blocked for others.
                SigSet::empty().thread_set_mask()?;
                prctl::set_pdeathsig(signal)?;
                if nix::unistd::getppid() == parent {
                    Ok(())
                } else {
                    Err(std::io::Error::other("the test bed has ended"))
                }
            });
        }
        let child = self.command.spawn().map_err(|source| Error::Start {
            program: self.command.get_program().to_string_lossy().into_owned(),
            source,
            cure: self.cure.clone(),
        })?;
        let id = child.id().cast_signed();
        let guard = Guard::new(if self.gently {
            Leftover::Testbed(id)
        } else {
            Leftover::Process(id)
        });
        Ok(Process {
            child,
            guard: Some(guard),
            line,
        })
    }

    /// Runs it to its end; anything but success is an error.
    pub fn output(self) -> Result<Vec<u8>> {
        let cure = self.cure.clone();
        let (line, output) = self.finish()?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.push_str(&String::from_utf8_lossy(&output.stderr));
        Err(Error::Command {
            program: line,
            status: output.status.to_string(),
            cure,
            output: tail(&text),
        })
    }

    /// Runs it to its end; its output is text.
    pub fn text(self) -> Result<String> {
        Ok(String::from_utf8_lossy(&self.output()?).into_owned())
    }

    /// Runs it to its end, whatever that is.
    pub fn finish(mut self) -> Result<(String, Output)> {
        self.command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let process = self.spawn()?;
        Ok((process.line.clone(), process.finish()?))
    }

    /// Runs it to its end with our own standard output and error; says whether it succeeded.
    pub fn show(self) -> Result<bool> {
        let mut process = self.spawn()?;
        let status = process.wait()?;
        cleanup::still_time()?;
        Ok(status.success())
    }
}

fn read_all(stream: Option<&mut impl Read>) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(stream) = stream {
        // What was read before an error is what there is to show.
        let _ = stream.read_to_end(&mut bytes);
    }
    bytes
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(SHOWN)..].join("\n")
}

/// A running program. Dropping it kills it and its group.
#[derive(Debug)]
pub struct Process {
    child: Child,
    guard: Option<Guard>,
    line: String,
}

impl Process {
    /// Reads what it says, where that is piped, until it ends.
    pub(crate) fn finish(mut self) -> Result<Output> {
        let mut out = self.child.stdout.take();
        let mut err = self.child.stderr.take();
        // At the same time: it waits when either is full.
        let (stdout, stderr) = std::thread::scope(|scope| {
            let errors = scope.spawn(|| read_all(err.as_mut()));
            (read_all(out.as_mut()), errors.join().unwrap_or_default())
        });
        let status = self.wait()?;
        cleanup::still_time()?;
        Ok(Output {
            status,
            stdout,
            stderr,
        })
    }

    /// Its process id.
    pub fn id(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        // Not reaped yet, so that the id is still ours when its group is killed.
        while self.look(WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) == Err(Errno::EINTR) {}
        drop(self.guard.take());
        self.child
            .wait()
            .map_err(Error::system("wait for a program"))
    }

    /// Whether it has ended. It is not reaped by this.
    pub fn ended(&self) -> bool {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT | WaitPidFlag::WNOHANG;
        !matches!(self.look(flags), Ok(WaitStatus::StillAlive))
    }

    fn look(&self, flags: WaitPidFlag) -> nix::Result<WaitStatus> {
        waitid(Id::Pid(Pid::from_raw(self.id())), flags)
    }

    /// Sends a signal to it alone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        nix::sys::signal::kill(Pid::from_raw(self.id()), signal)
            .map_err(Error::system(format!("signal {}", self.line)))
    }

    /// Kills it and waits.
    pub fn kill(&mut self) {
        drop(self.guard.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Takes the child's pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Whether a program is on the path.
pub fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_else(|| OsString::from("/usr/sbin:/usr/bin"));
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(Into::into))
        .any(|folder| folder.join(program).exists())
}
