//! A QEMU for tests: its monitor is served here, and its process is another one, so that it can be ended.

#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::missing_panics_doc,
    reason = "only tests use it"
)]

use super::{LaunchSettings, Qmp, Vm};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use transhume_base::process_identity::{Identity, Process};
use transhume_machine::Definition;

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}, "capabilities": []}}"#;

#[derive(Debug)]
struct State {
    process: Child,
    /// What `query-status` says.
    status: String,
    /// What `query-migrate` says.
    migration: String,
    /// How many times yet `cont` is refused.
    refusals: u32,
    commands: Vec<String>,
    /// Its monitor closes at the next command.
    hangs_up: bool,
}

/// See the module. Its process ends when this is dropped.
#[derive(Debug, Clone)]
pub struct FakeQemu {
    qmp: PathBuf,
    state: Arc<Mutex<State>>,
}

/// Settings whose run directory is that folder.
pub fn settings(folder: &Path) -> LaunchSettings {
    LaunchSettings {
        host: "hosta".to_owned(),
        run_directory: folder.to_owned(),
        log_directory: folder.join("log"),
        qemu: "/none".into(),
        user: None,
    }
}

/// The definition of a small VM.
pub fn definition(name: &str) -> Definition {
    let text = format!("name = \"{name}\"\nmachine = \"pc\"\nmemory = \"64MiB\"\nvcpus = 1\n");
    Definition::parse(&text).expect("a definition")
}

impl Drop for State {
    fn drop(&mut self) {
        self.end();
    }
}

impl State {
    fn end(&mut self) {
        // It may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    /// What it returns, null if it refuses; `None` if it ends instead.
    fn answer(&mut self, command: &str) -> Option<Value> {
        self.commands.push(command.to_owned());
        Some(match command {
            "quit" => {
                self.end();
                return None;
            }
            _ if self.hangs_up => return None,
            "cont" if self.refusals > 0 => {
                self.refusals -= 1;
                Value::Null
            }
            "cont" => {
                "running".clone_into(&mut self.status);
                json!({})
            }
            "query-status" => {
                json!({ "status": self.status, "running": self.status == "running" })
            }
            "query-migrate" if self.migration.is_empty() => json!({}),
            "query-migrate" => json!({ "status": self.migration }),
            _ => json!({}),
        })
    }
}

impl FakeQemu {
    /// The QEMU of the VM `name` in that run directory.
    pub fn start(run_directory: &Path, name: &str) -> Self {
        let files = settings(run_directory).files(name);
        std::fs::create_dir_all(files.folder()).expect("a folder");
        let process = Command::new("sleep").arg("600").spawn().expect("a process");
        let fake = Self {
            qmp: files.qmp(),
            state: Arc::new(Mutex::new(State {
                process,
                status: "paused".to_owned(),
                migration: String::new(),
                refusals: 0,
                commands: Vec::new(),
                hangs_up: false,
            })),
        };
        let listener = UnixListener::bind(&fake.qmp).expect("a socket");
        let state = Arc::downgrade(&fake.state);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let Some(state) = state.upgrade() else { return };
                tokio::spawn(serve(
                    stream,
                    Self {
                        qmp: PathBuf::new(),
                        state,
                    },
                ));
            }
        });
        fake
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What `query-migrate` says from now on.
    pub fn set_migration(&self, status: &str) {
        status.clone_into(&mut self.lock().migration);
    }

    /// Its monitor closes at the next command, and its process is there.
    pub fn hang_up(&self) {
        self.lock().hangs_up = true;
    }

    /// `cont` is refused so many times.
    pub fn refuse(&self, times: u32) {
        self.lock().refusals = times;
    }

    /// The commands that it was given.
    pub fn commands(&self) -> Vec<String> {
        self.lock().commands.clone()
    }

    /// Ends its process, and removes its socket if it is to leave none.
    pub fn end(&self, leaves_socket: bool) {
        self.lock().end();
        if !leaves_socket {
            std::fs::remove_file(&self.qmp).expect("a socket");
        }
    }

    /// Its process.
    pub fn identity(&self) -> Identity {
        Identity::find(self.lock().process.id()).expect("it runs")
    }

    /// Whether its process still runs.
    pub fn is_alive(&self) -> bool {
        Process::find(self.lock().process.id()).is_some()
    }

    /// The VM that it runs.
    pub async fn vm(&self, definition: &Definition, settings: &LaunchSettings) -> Vm {
        let qmp = Qmp::connect(&self.qmp, Duration::from_secs(20))
            .await
            .expect("a connection");
        let process = Process::find(self.lock().process.id());
        Vm::of_parts(definition, qmp, &self.qmp, settings, process)
    }
}

async fn serve(stream: UnixStream, qemu: FakeQemu) {
    let (reader, mut writer) = stream.into_split();
    let mut text = format!("{GREETING}\r\n");
    let mut lines = BufReader::new(reader).lines();
    loop {
        if writer.write_all(text.as_bytes()).await.is_err() {
            return;
        }
        let Ok(Some(line)) = lines.next_line().await else {
            return;
        };
        let request: Value = serde_json::from_str(&line).expect("a request");
        let command = request["execute"].as_str().unwrap_or_default().to_owned();
        let Some(answer) = qemu.lock().answer(&command) else {
            return;
        };
        let id = &request["id"];
        let answer = if answer.is_null() {
            let error = json!({ "class": "GenericError", "desc": "Failed to get \"write\" lock" });
            json!({ "id": id, "error": error })
        } else {
            json!({ "id": id, "return": answer })
        };
        text = format!("{answer}\r\n");
    }
}
