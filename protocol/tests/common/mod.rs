//! QEMU processes for the tests of its stream.

pub(crate) mod relay;

use serde_json::{Value, json};
use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Lines, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

/// The guest's memory, in bytes.
pub(crate) const MEMORY: u64 = 48 << 20;
/// Pages that [`Vm::fill_memory`] fills.
pub(crate) const FILLED_PAGES: usize = 2000;
const FILLED_FROM: u64 = 8 << 20;
const PAGE: usize = 4096;

/// The QEMUs to test with.
pub(crate) fn qemus() -> Vec<String> {
    const INSTALLED: &str = "/usr/bin/qemu-system-x86_64";
    match std::env::var("TRANSHUME_TEST_QEMU") {
        Ok(list) => list.split(':').map(str::to_owned).collect(),
        Err(_) if Path::new(INSTALLED).exists() => vec![INSTALLED.to_owned()],
        Err(_) => {
            eprintln!("skipped: there is no {INSTALLED}; name one in TRANSHUME_TEST_QEMU");
            Vec::new()
        }
    }
}

/// A QEMU that runs its firmware, with its memory in a file.
pub(crate) struct Vm {
    process: Child,
    qmp: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
    memory: PathBuf,
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Vm {
    /// Starts the newest machine type of a family.
    pub(crate) fn start(qemu: &str, family: &str, memory: &Path, arguments: &[&str]) -> Self {
        let backend = format!(
            "memory-backend-file,id=memory,size={MEMORY},share=on,mem-path={}",
            memory.display()
        );
        let machine = match family {
            "pc-i440fx" => "pc",
            _ => "q35",
        };
        let mut process = Command::new(qemu)
            .args(["-machine", &format!("{machine},memory-backend=memory")])
            .args(["-object", &backend, "-m", &format!("{}M", MEMORY >> 20)])
            .args(["-accel", "tcg", "-nodefaults", "-display", "none"])
            .args(["-qmp", "stdio"])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut vm = Self {
            qmp: process.stdin.take().unwrap(),
            answers: BufReader::new(process.stdout.take().unwrap()).lines(),
            process,
            memory: memory.to_owned(),
        };
        vm.execute("qmp_capabilities", &json!({}));
        vm
    }

    pub(crate) fn execute(&mut self, command: &str, arguments: &Value) -> Value {
        let request = json!({"execute": command, "arguments": arguments});
        writeln!(self.qmp, "{request}").unwrap();
        loop {
            let line = self.answers.next().expect("QEMU has ended").unwrap();
            let mut answer: Value = serde_json::from_str(&line).unwrap();
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            if let Some(value) = answer.get_mut("return") {
                return value.take();
            }
        }
    }

    pub(crate) fn set_capabilities(&mut self, names: &[&str]) {
        let on = |name: &&str| json!({"capability": name, "state": true});
        let list: Vec<Value> = names.iter().map(on).collect();
        self.execute("migrate-set-capabilities", &json!({"capabilities": list}));
    }

    pub(crate) fn has_capability(&mut self, name: &str) -> bool {
        let answer = self.execute("query-migrate-capabilities", &json!({}));
        let mut list = answer.as_array().unwrap().iter();
        list.any(|one| one["capability"] == name)
    }

    pub(crate) fn listen(&mut self, socket: &Path) {
        let uri = format!("unix:{}", socket.display());
        self.execute("migrate-incoming", &json!({"uri": uri}));
    }

    pub(crate) fn migrate(&mut self, socket: &Path) {
        let uri = format!("unix:{}", socket.display());
        self.execute("migrate", &json!({"uri": uri}));
    }

    pub(crate) fn status(&mut self) -> String {
        let answer = self.execute("query-status", &json!({}));
        answer["status"].as_str().unwrap().to_owned()
    }

    /// Waits until the migration has ended, which has to be in this state.
    pub(crate) fn await_migration(&mut self, state: &str) {
        loop {
            let answer = self.execute("query-migrate", &json!({}));
            let now = answer["status"].as_str().unwrap().to_owned();
            if now == state {
                return;
            }
            assert!(
                !["completed", "failed", "cancelled"].contains(&&*now),
                "{answer}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Writes pages that all differ behind the guest's back, to where its firmware does not look.
    pub(crate) fn fill_memory(&self) {
        let file = OpenOptions::new().write(true).open(&self.memory).unwrap();
        for page in 0..FILLED_PAGES {
            let content: Vec<u8> = (0..PAGE)
                .flat_map(|at| {
                    u16::try_from((page * 31 + at * 7) % 65521)
                        .unwrap()
                        .to_le_bytes()
                })
                .take(PAGE)
                .collect();
            let offset = FILLED_FROM + (page * PAGE) as u64;
            file.write_all_at(&content, offset).unwrap();
        }
    }

    /// What the memory holds.
    pub(crate) fn memory(&self) -> Vec<u8> {
        fs::read(&self.memory).unwrap()
    }
}
