//! A running VM: started here, or found running.

use super::command_line::{self, Start};
use super::files::{LaunchSettings, RunFiles};
use super::handed::{Handed, OpenedFiles, Sets};
use super::process::Child;
use super::qmp::Status;
use super::{Error, Qmp, Result, inspect};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use transhume_base::confine::Confinement;
use transhume_base::process_identity::{Identity, Outlives, Process};
use transhume_machine::Definition;

/// How long a QEMU may take to answer QMP after its start: less than a source waits for it
/// (60 s), so that it hears why it got none.
const START_TIMEOUT: Duration = Duration::from_secs(45);
/// How long a found QEMU may take to greet.
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a QEMU that closed its connection may take to end, and to say why.
const END_TIMEOUT: Duration = Duration::from_secs(2);
/// How long QEMU may take to end when told so.
const QUIT_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a migration that ends is looked at.
/// How long the destination's QEMU may hold the disks of a VM that did not move, and how often that is
/// tried.
const LOCK_TIMEOUT: Duration = Duration::from_secs(15);
const LOCK_POLL_INTERVAL: Duration = Duration::from_millis(100);
const MIGRATION_POLL_INTERVAL: Duration = Duration::from_millis(20);

/// A VM whose QEMU runs on this host. It goes on when this is dropped.
#[derive(Debug)]
pub struct Vm {
    definition: Definition,
    machine: String,
    qmp: Qmp,
    qmp_path: PathBuf,
    files: RunFiles,
    agent: Option<PathBuf>,
    process: Option<Process>,
}

impl Vm {
    /// Starts a VM as a process that outlives ours, and waits until its QEMU answers. With
    /// [`Start::Incoming`] it then waits for `migrate-incoming`, and stands still after its state has
    /// come until it is told to `cont`. It gets the files as they were opened.
    ///
    /// # Errors
    /// [`Error::Exited`] with QEMU's own words if it ends at once. Whatever the error, its process has ended.
    pub async fn launch(
        definition: &Definition,
        settings: &LaunchSettings,
        start: Start,
        opened: &OpenedFiles,
    ) -> Result<Self> {
        Self::launch_within(START_TIMEOUT, definition, settings, start, opened).await
    }

    async fn launch_within(
        patience: Duration,
        definition: &Definition,
        settings: &LaunchSettings,
        start: Start,
        opened: &OpenedFiles,
    ) -> Result<Self> {
        definition.validate()?;
        definition.check_host(&settings.host)?;
        let files = settings.files(&definition.name);
        refuse_running(&files, &definition.name).await?;
        let user = settings.user.as_ref();
        files.prepare(user)?;
        let logs = files.logs();
        logs.note(&format!("QEMU is started at {}", settings.host))?;
        let handed = Handed::make(definition, &files, opened).inspect_err(|_| {
            if let Err(error) = files.remove() {
                tracing::warn!(vm = definition.name, %error, "its run directory stays");
            }
        })?;
        let arguments = command_line::arguments(definition, &files, start, &handed.names);
        let binary = settings.binary(definition);
        tracing::debug!(vm = definition.name, qemu = %binary.display(), ?arguments, "starting QEMU");
        let confinement = Confinement::of(user, handed.descriptors());
        let started = Child::spawn(binary, &arguments, logs.open_qemu()?, confinement);
        let sets = handed.sets();
        // What is left of them is QEMU's: a lock ends with it, and its sockets are closed with it.
        drop(handed);
        let mut child = match started {
            Ok(child) => child,
            Err(error) => {
                if let Err(error) = files.remove() {
                    tracing::warn!(vm = definition.name, %error, "its run directory stays");
                }
                return Err(error);
            }
        };
        let qmp_path = files.qmp();
        let began = tokio::select! {
            began = tokio::time::timeout(patience, begin(&qmp_path, start)) => began.unwrap_or_else(|_| {
                Err(Error::Timeout { command: "qmp_capabilities".to_owned(), waited: patience })
            }),
            status = child.exited() => Err(Error::Exited { status, log: logs.tail() }),
        };
        let (qmp, machine) = match began {
            Ok(began) => began,
            Err(error) => {
                // What it said is worth more than that it went.
                let error = match error {
                    Error::Lost(_) => {
                        match tokio::time::timeout(END_TIMEOUT, child.exited()).await {
                            Ok(status) => Error::Exited {
                                status,
                                log: logs.tail(),
                            },
                            Err(_) => error,
                        }
                    }
                    error => error,
                };
                let error = with_words(error, &files, &sets);
                child.end(QUIT_TIMEOUT).await;
                if let Err(error) = files.remove() {
                    tracing::warn!(vm = definition.name, %error, "its run directory stays");
                }
                return Err(error);
            }
        };
        let process = child.detach();
        if let Err(error) = std::fs::write(files.pid(), format!("{}\n", process.id())) {
            tracing::warn!(vm = definition.name, %error, "its process id is not noted");
        }
        tracing::info!(
            vm = definition.name,
            pid = process.id(),
            machine,
            ?start,
            "QEMU started"
        );
        let port = definition.agent.port;
        Ok(Self {
            definition: definition.clone(),
            machine,
            qmp,
            qmp_path,
            agent: (port != transhume_machine::definition::AgentPort::None).then(|| files.agent()),
            files,
            process: Some(process),
        })
    }

    /// Takes over a QEMU that runs already, after checking that it is what the definition says.
    ///
    /// # Errors
    /// [`Error::Differs`] with what differs; the QEMU is left as it was.
    pub async fn adopt(
        definition: &Definition,
        qmp_path: &Path,
        settings: &LaunchSettings,
    ) -> Result<Self> {
        definition.validate()?;
        definition.check_host(&settings.host)?;
        let qmp = Qmp::connect(qmp_path, GREETING_TIMEOUT).await?;
        let machine = inspect::check(&qmp, definition, &settings.host).await?;
        let agent = inspect::agent_socket(&qmp, definition.agent.port).await?;
        let process = qmp.pid().and_then(Process::find);
        Ok(Self {
            definition: definition.clone(),
            machine,
            qmp,
            qmp_path: qmp_path.to_owned(),
            files: settings.files(&definition.name),
            agent,
            process,
        })
    }

    /// What it is made of, as its operator wrote it.
    pub fn definition(&self) -> &Definition {
        &self.definition
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.definition.name
    }

    /// The machine type in full: `pc-q35-7.2` where the definition says `q35`.
    pub fn machine_type(&self) -> &str {
        &self.machine
    }

    /// The connection to its QEMU.
    pub fn qmp(&self) -> &Qmp {
        &self.qmp
    }

    /// The socket that [`Vm::qmp`] is connected to.
    pub fn qmp_path(&self) -> &Path {
        &self.qmp_path
    }

    /// The socket of the channel to the guest's agent, which QEMU serves to one client at a time.
    pub fn agent_socket(&self) -> Option<&Path> {
        self.agent.as_deref()
    }

    /// The folder with its sockets and logs. A VM that was adopted may not have one.
    pub fn files(&self) -> &RunFiles {
        &self.files
    }

    /// QEMU's process, if it is known.
    pub fn pid(&self) -> Option<u32> {
        self.process.as_ref().map(Process::id)
    }

    /// QEMU's process, told apart from every other one, if it is known.
    pub fn identity(&self) -> Option<Identity> {
        self.process.as_ref().map(Identity::of)
    }

    /// Ends the VM: asks the guest to shut down and waits so long for it, or, by `force`, ends QEMU as if
    /// power were cut.
    ///
    /// # Errors
    /// [`Error::Unfit`] if the guest does not shut down: it then runs on.
    pub async fn stop(&self, force: bool, patience: Duration) -> Result<()> {
        if force {
            return self.kill().await;
        }
        let force = format!(
            "`transhume vm stop {} --force` ends it as if power were cut",
            self.name()
        );
        let status = self.qmp.status().await?;
        if !status.running {
            return Err(Error::Unfit {
                cause: format!(
                    "the VM does not run (QEMU says \"{}\"), so it cannot shut down",
                    status.status
                ),
                cure: force,
            });
        }
        self.qmp.system_powerdown().await?;
        match tokio::time::timeout(patience, self.gone()).await {
            Ok(()) => Ok(()),
            Err(_) => Err(Error::Unfit {
                cause: format!(
                    "the guest did not shut down within {} s of its power button being pressed (an ACPI-aware \
                     guest would); it runs on",
                    patience.as_secs()
                ),
                cure: force,
            }),
        }
    }

    /// Ends QEMU without asking the guest: by `quit`, and if it does not listen by a signal.
    ///
    /// # Errors
    /// If its process is not known, or outlives SIGKILL.
    pub async fn kill(&self) -> Result<()> {
        let asked = tokio::time::timeout(QUIT_TIMEOUT, async {
            self.qmp.quit().await?;
            self.gone().await;
            Ok::<(), Error>(())
        });
        if let Ok(Ok(())) = asked.await {
            return Ok(());
        }
        let Some(process) = &self.process else {
            return Err(Error::Unfit {
                cause: "QEMU does not listen to `quit`, and its process is not known".to_owned(),
                cure: "find it (ps ax | grep qemu) and end it by hand".to_owned(),
            });
        };
        tracing::warn!(
            vm = self.name(),
            pid = process.id(),
            "QEMU does not listen to `quit`: SIGKILL"
        );
        process.kill();
        match tokio::time::timeout(QUIT_TIMEOUT, process.gone()).await {
            Ok(()) => Ok(()),
            Err(_) => Err(Outlives { pid: process.id() }.into()),
        }
    }

    /// Waits until QEMU has done with its last migration, whatever became of it, and returns the VM's state.
    ///
    /// # Errors
    /// [`Error::Unfit`] if it takes longer than `patience`.
    pub async fn migration_over(&self, patience: Duration) -> Result<Status> {
        let deadline = tokio::time::Instant::now() + patience;
        loop {
            let migration = self.qmp.query_migrate().await?;
            let over = matches!(
                migration.status.as_deref(),
                None | Some("none" | "failed" | "cancelled" | "completed")
            );
            if migration.status.as_deref() == Some("pre-switchover") {
                // It waits for leave from whoever drove it, and notices nothing else.
                self.qmp.migrate_cancel().await?;
            }
            let status = self.qmp.status().await?;
            if over && status.status != "finish-migrate" {
                return Ok(status);
            }
            if tokio::time::Instant::now() > deadline {
                return Err(Error::Unfit {
                    cause: format!(
                        "QEMU does not come to an end of its migration (it says \"{}\")",
                        status.status
                    ),
                    cure: format!(
                        "look at qemu.log; `transhume vm stop {} --force` ends it",
                        self.name()
                    ),
                });
            }
            tokio::time::sleep(MIGRATION_POLL_INTERVAL).await;
        }
    }

    /// Runs the VM again after a migration that failed, also when QEMU says that it runs already.
    ///
    /// A QEMU before 8.1 can run it with its disks still given up to the destination
    /// (`BDRV_O_INACTIVE`), and aborts at the next write or migration then; `cont` takes them back. It is
    /// refused as long as the destination's QEMU holds their locks: that one is about to end.
    pub async fn run_on(&self) -> Result<()> {
        let deadline = tokio::time::Instant::now() + LOCK_TIMEOUT;
        loop {
            match self.qmp.cont().await {
                Err(Error::Refused { .. }) if tokio::time::Instant::now() < deadline => {
                    tokio::time::sleep(LOCK_POLL_INTERVAL).await;
                }
                result => return result,
            }
        }
    }

    /// Ends the QEMU of a VM that belongs to another host, and removes its run directory.
    ///
    /// # Errors
    /// [`Error::Unfit`] if it is in post-copy, or cannot be asked: memory may be in it that is nowhere else.
    pub async fn discard(&self) -> Result<()> {
        self.refuse_with_memory().await?;
        self.discard_whole().await
    }

    /// [`Vm::discard`] for a VM of which it is known that all of its memory is at the other host.
    ///
    /// # Errors
    /// If QEMU does not end.
    pub async fn discard_whole(&self) -> Result<()> {
        self.kill().await?;
        self.files().remove()
    }

    async fn refuse_with_memory(&self) -> Result<()> {
        let cure = format!(
            "see `transhume vm show {0}`; `transhume vm stop {0} --force` gives up what is in it",
            self.name()
        );
        if self.qmp.is_closed() {
            return match tokio::time::timeout(QUIT_TIMEOUT, self.gone()).await {
                Ok(()) => Ok(()),
                Err(_) => Err(Error::Unfit {
                    cause: "QEMU lives, and cannot be asked whether it is in post-copy".to_owned(),
                    cure,
                }),
            };
        }
        match self.qmp.query_migrate().await {
            Ok(said) if said.is_in_post_copy() => Err(Error::Unfit {
                cause: format!(
                    "{} was handed over in post-copy, and part of its memory may be in its QEMU here alone",
                    self.name()
                ),
                cure,
            }),
            // It has ended.
            Ok(_) | Err(Error::Lost(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Waits until its QEMU has ended, and all that it said was read: [`Qmp::shutdown`] tells why, unless it crashed or was
    /// killed.
    pub async fn ended(&self) {
        self.gone().await;
        self.qmp.closed().await;
    }

    /// Whether [`Self::ended`] comes within `patience`.
    pub async fn ends_within(&self, patience: Duration) -> bool {
        tokio::time::timeout(patience, self.ended()).await.is_ok()
    }

    /// Waits until its QEMU has ended. A lost QMP connection is not enough.
    pub async fn gone(&self) {
        match &self.process {
            Some(process) => process.gone().await,
            None => drop(self.qmp.closed().await),
        }
    }
}

#[cfg(any(test, feature = "fake"))]
impl Vm {
    /// One of a QEMU that was not looked at.
    pub(super) fn of_parts(
        definition: &Definition,
        qmp: Qmp,
        qmp_path: &Path,
        settings: &LaunchSettings,
        process: Option<Process>,
    ) -> Self {
        Self {
            definition: definition.clone(),
            machine: definition.machine.clone(),
            qmp,
            qmp_path: qmp_path.to_owned(),
            files: settings.files(&definition.name),
            agent: None,
            process,
        }
    }
}

/// An error of a QEMU that was started, with what it said.
fn with_words(error: Error, files: &RunFiles, sets: &Sets) -> Error {
    match (error, files.logs().last_words()) {
        (Error::Exited { status, log }, _) => Error::Exited {
            status,
            log: sets.named(&log),
        },
        (error, None) => error,
        (error, Some(words)) => Error::Unfit {
            cause: error.to_string(),
            cure: format!("QEMU said:\n{}", sets.named(&words)),
        },
    }
}

/// Two QEMUs in one run directory would take each other's sockets.
async fn refuse_running(files: &RunFiles, name: &str) -> Result<()> {
    if tokio::net::UnixStream::connect(files.qmp()).await.is_err() {
        return Ok(());
    }
    Err(Error::Unfit {
        cause: format!(
            "a QEMU for \"{name}\" runs already: it listens at {}",
            files.qmp().display()
        ),
        cure: format!(
            "see `transhume vm show {name}`; `transhume vm adopt` takes over one that is not listed"
        ),
    })
}

/// Talks to a QEMU that has just been started, and tells its machine type.
async fn begin(path: &Path, start: Start) -> Result<(Qmp, String)> {
    let qmp = loop {
        match Qmp::connect(path, START_TIMEOUT).await {
            // QEMU has not made its socket yet.
            Err(Error::Connect { .. }) => tokio::time::sleep(Duration::from_millis(10)).await,
            result => break result?,
        }
    };
    let machine = qmp.machine_type().await?;
    if start == Start::Running {
        qmp.cont().await?;
    }
    Ok((qmp, machine))
}

/// Whether a path of this host is a block device.
pub fn is_block_device(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device())
}

#[cfg(test)]
mod tests {
    use super::super::fake;
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[tokio::test]
    async fn memory_that_is_nowhere_else_is_not_thrown_away() {
        let run = tempfile::tempdir().unwrap();
        let (settings, definition) = (fake::settings(run.path()), fake::definition("web1"));
        let qemu = fake::FakeQemu::start(run.path(), "web1");
        let vm = qemu.vm(&definition, &settings).await;
        for status in [
            "postcopy-active",
            "postcopy-paused",
            "postcopy-recover",
            "postcopy-device",
        ] {
            qemu.set_migration(status);
            let error = vm.discard().await.expect_err(status);
            assert!(error.to_string().contains("post-copy"), "{error}");
            assert!(qemu.is_alive());
        }
        qemu.set_migration("completed");
        vm.discard().await.unwrap();
        assert!(!qemu.is_alive() && !vm.files().folder().exists());

        let qemu = fake::FakeQemu::start(run.path(), "web1");
        let vm = qemu.vm(&definition, &settings).await;
        qemu.set_migration("postcopy-paused");
        vm.discard_whole().await.unwrap();
        assert!(!qemu.is_alive());
    }

    #[tokio::test]
    async fn a_qemu_that_does_not_answer_is_ended() {
        let folder = tempfile::tempdir().unwrap();
        let qemu = folder.path().join("qemu");
        let noted = folder.path().join("pid");
        let script = format!("#!/bin/sh\necho $$ > {}\nexec sleep 600\n", noted.display());
        std::fs::write(&qemu, script).unwrap();
        std::fs::set_permissions(&qemu, PermissionsExt::from_mode(0o755)).unwrap();
        let settings = LaunchSettings {
            host: "hosta".to_owned(),
            run_directory: folder.path().to_owned(),
            log_directory: folder.path().join("log"),
            qemu,
            user: None,
        };
        let text = "name = \"web1\"\nmachine = \"q35\"\nmemory = \"64MiB\"\nvcpus = 1\n";
        let definition = Definition::parse(text).unwrap();
        let patience = Duration::from_secs(2);
        let opened = OpenedFiles::open(&definition, &settings, None).unwrap();
        let error = Vm::launch_within(patience, &definition, &settings, Start::Incoming, &opened)
            .await
            .expect_err("nobody answers");
        assert!(matches!(error, Error::Timeout { .. }), "{error}");
        let pid = std::fs::read_to_string(noted).unwrap();
        assert!(Process::find(pid.trim().parse().unwrap()).is_none());
    }
}
