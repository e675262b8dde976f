//! QEMU as a process: started so that it outlives us, watched and ended without mistaking another.

use super::{Error, Result};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::fs::File;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use tokio::process::Command;
use tokio::sync::{oneshot, watch};
use transhume_base::confine::Confinement;
use transhume_base::process_identity::Process;

/// The service's own limit of memory is none for a guest.
fn lift_memory_limit() -> std::io::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_DATA)?;
    setrlimit(Resource::RLIMIT_DATA, hard, hard)?;
    Ok(())
}

/// A process that we started; dropped before [`Child::detach`], it is killed.
pub(super) struct Child {
    id: u32,
    kill: Option<oneshot::Sender<()>>,
    status: watch::Receiver<Option<String>>,
}

impl Child {
    /// Starts `binary`, confined, away from our terminal and our process group, its output going to `log`.
    pub(super) fn spawn(
        binary: &Path,
        arguments: &[String],
        log: File,
        confinement: Confinement,
    ) -> Result<Self> {
        let twin = log
            .try_clone()
            .map_err(|error| Error::file("open", "qemu.log", error))?;
        let mut command = Command::new(binary);
        // SAFETY: between fork and exec it makes system calls alone, which take no lock and allocate nothing.
        unsafe {
            command.pre_exec(move || {
                lift_memory_limit()?;
                confinement.apply()
            })
        };
        let mut child = command
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(twin)
            .process_group(0)
            .kill_on_drop(false)
            .spawn()
            .map_err(|source| Error::Binary {
                path: binary.to_owned(),
                source,
            })?;
        let id = child.id().unwrap_or_default();
        let (kill, killed) = oneshot::channel();
        let (exit, status) = watch::channel(None);
        transhume_base::task::spawn(async move {
            let waited = tokio::select! {
                waited = child.wait() => waited,
                Ok(()) = killed => {
                    // It may just have ended by itself.
                    let _ = child.start_kill();
                    child.wait().await
                }
            };
            let words = match waited {
                Ok(status) => status.to_string(),
                Err(error) => format!("its exit status is lost: {error}"),
            };
            tracing::debug!(pid = id, status = words, "QEMU ended");
            exit.send_replace(Some(words));
        });
        Ok(Self {
            id,
            kill: Some(kill),
            status,
        })
    }

    /// Waits for its end; its exit status in words.
    pub(super) async fn exited(&mut self) -> String {
        let status = self.status.wait_for(Option::is_some).await;
        status
            .ok()
            .and_then(|status| status.clone())
            .unwrap_or_default()
    }

    /// Kills it, and waits for its end; no longer than so, should it hang in the kernel.
    pub(super) async fn end(mut self, patience: Duration) {
        if let Some(kill) = self.kill.take() {
            // Nobody listens if it has ended.
            let _ = kill.send(());
        }
        if tokio::time::timeout(patience, self.exited()).await.is_err() {
            tracing::error!(pid = self.id, "a QEMU that did not start outlives SIGKILL");
        }
    }

    /// Lets it live on without us.
    pub(super) fn detach(mut self) -> Process {
        self.kill = None;
        let id = self.id;
        // One that has ended meanwhile is "gone" at the first look.
        Process::find(id).unwrap_or(Process::ended(id))
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if let Some(kill) = self.kill.take() {
            // Nobody listens if it has ended.
            let _ = kill.send(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spawn(folder: &Path, script: &str) -> Child {
        let arguments = ["-c".to_owned(), script.to_owned()];
        let log = File::create(folder.join("log")).expect("a log");
        let confinement = Confinement::of(None, Vec::new());
        Child::spawn(Path::new("/bin/sh"), &arguments, log, confinement).expect("a shell")
    }

    #[tokio::test]
    async fn tells_how_it_ended_and_keeps_its_words() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut child = spawn(folder.path(), "echo no such disk >&2; exit 3");
        assert_eq!(child.exited().await, "exit status: 3");
        let log = std::fs::read_to_string(folder.path().join("log")).expect("the log");
        assert_eq!(log, "no such disk\n");
        let process = child.detach();
        assert!(!process.is_alive());
        process.gone().await;
    }

    #[tokio::test]
    async fn a_dropped_child_is_killed_and_a_detached_one_lives() {
        let folder = tempfile::tempdir().expect("a folder");
        let child = spawn(folder.path(), "exec sleep 600");
        let dropped = Process::find(child.id).expect("it runs");
        drop(child);
        dropped.gone().await;

        let kept = spawn(folder.path(), "exec sleep 600").detach();
        assert!(kept.is_alive());
        kept.kill();
        kept.gone().await;
    }

    #[tokio::test]
    async fn the_limit_of_our_memory_is_none_of_its() {
        let (_, hard) = getrlimit(Resource::RLIMIT_DATA).expect("a limit");
        // More than any test needs.
        setrlimit(Resource::RLIMIT_DATA, 1 << 40, hard).expect("a soft limit");
        let folder = tempfile::tempdir().expect("a folder");
        let mut child = spawn(folder.path(), "ulimit -S -d; ulimit -H -d");
        child.exited().await;
        let log = std::fs::read_to_string(folder.path().join("log")).expect("the log");
        let limits: Vec<&str> = log.lines().collect();
        assert!(limits.len() == 2 && limits[0] == limits[1], "{log}");
    }

    #[tokio::test]
    async fn a_binary_that_is_not_there_has_a_cure() {
        let folder = tempfile::tempdir().expect("a folder");
        let error = Child::spawn(
            &folder.path().join("qemu"),
            &[],
            File::create(folder.path().join("log")).expect("a log"),
            Confinement::of(None, Vec::new()),
        );
        let error = error.err().expect("no such binary").to_string();
        assert!(error.contains("apt install qemu-system-x86"), "{error}");
    }
}
