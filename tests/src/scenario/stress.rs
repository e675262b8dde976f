//! A Linux guest moves by post-copy again and again, while its processes do what is hard on memory management.

use super::guest;
use super::postcopy::{GATE_IS_GONE, POST};
use super::transhume::ask;
use super::{Bed, Scenario};
use crate::error::check;
use crate::hosts::daemon::Daemon;
use crate::hosts::{HOST_A, HOST_B, Hosts};
use crate::packages::{Kernel, Qemu};
use crate::qemu::serial::{Console, Side};
use crate::{Error, Result};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(600);
/// Bounds an answer of the guest.
const ANSWER: Duration = Duration::from_secs(120);
/// Migrations on each kernel: 20 in all.
const MIGRATIONS: u64 = 10;
/// In Mbit/s: slow enough that the guest goes over.
const RATE: u32 = 60;

pub(super) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario {
            name: "post-copy-stress-6.1",
            about: "fork, mmap, mlock, O_DIRECT, huge pages, futexes and signals on Linux 6.1, which moves ten times",
            limit: LIMIT,
            run: |bed| stress(bed, Kernel::V6_1),
        },
        Scenario {
            name: "post-copy-stress-6.12",
            about: "the same on Linux 6.12",
            limit: LIMIT,
            run: |bed| stress(bed, Kernel::V6_12),
        },
    ]
}

/// A guest, and the daemon that has it.
struct Scene<'a> {
    name: &'a str,
    console: &'a Console,
    daemons: [Daemon; 2],
    at: usize,
}

impl Scene<'_> {
    const SIDES: [Side; 2] = [Side::Source, Side::Destination];

    fn here(&self) -> &Daemon {
        &self.daemons[self.at]
    }

    fn attach(&self, at: usize) -> Result<()> {
        let daemon = &self.daemons[at];
        let serial = daemon.vm_folder(self.name).join("serial.sock");
        self.console
            .attach(Self::SIDES[at], &serial, || daemon.alive())
    }

    fn run(&self, command: &str) -> Result<String> {
        let here = self.here();
        self.console
            .run(Self::SIDES[self.at], command, ANSWER, || here.alive())
    }

    /// Moves by post-copy; returns how often processes slept, as far as that is told: a guest that is slow to say so
    /// is not waited for.
    fn moves(&mut self) -> Result<u64> {
        let to = [HOST_B, HOST_A][self.at];
        let arguments = [&["migrate", self.name, "--to", to], &POST[..]].concat();
        let answer = std::thread::scope(|scope| {
            // The socket is there once the destination's QEMU is.
            let attached = scope.spawn(|| self.attach(1 - self.at));
            let answer = ask(self.here(), &arguments);
            let attached = attached.join().unwrap_or(Ok(()));
            answer.and_then(|answer| attached.map(|()| answer))
        })?;
        let answer = answer.expect(0).map_err(|error| {
            let [a, b] = &self.daemons;
            let logs = format!("{HOST_A}:\n{}\n{HOST_B}:\n{}", a.words(), b.words());
            Error::Check(format!("{error}\n{logs}"))
        })?;
        self.at = 1 - self.at;
        let post = &answer.value["summary"]["post-copy"];
        let stalls = &post["stalls"];
        println!(
            "  to {to}: {} pages followed, {} asked for; {stalls}",
            post["pages"], post["requested-pages"]
        );
        check(post.is_object(), || {
            format!("It was no post-copy: {answer}")
        })?;
        Ok(stalls["waits"].as_u64().unwrap_or_default())
    }
}

fn stress(bed: &Bed, kernel: Kernel) -> Result<()> {
    let mut machine = guest::machine(bed, kernel)?;
    machine.disks.truncate(1);
    // What the load writes is soon there: most of it is nothing. This is not.
    machine.settings = vec![
        ("cache-mib", "10".into()),
        ("memory-mib", "48".into()),
        ("dirty-mib", "20".into()),
    ];
    let hosts = Hosts::new(Some(RATE))?;
    let (programs, qemu) = (bed.programs()?, bed.packages.qemu(Qemu::V10_0)?);
    let console = Console::new(&machine.name);
    let mut scene = Scene {
        name: &machine.name,
        console: &console,
        daemons: [
            Daemon::start(&hosts, &hosts.a, programs, &qemu)?,
            Daemon::start(&hosts, &hosts.b, programs, &qemu)?,
        ],
        at: 0,
    };
    let path = hosts.a.folder.join("definition.toml");
    std::fs::write(&path, machine.definition()).map_err(Error::file("write", &path))?;
    ask(scene.here(), &["vm", "start", &path.display().to_string()])?.expect(0)?;
    scene.attach(0)?;
    console.wait_for("ready", 0, crate::qemu::BOOT, || scene.here().alive())?;
    scene.run("/bin/gate-test load /disk/ext4 > /tmp/load.log 2>&1 & echo $! > /tmp/load.pid")?;

    let mut waits = 0;
    for _ in 0..MIGRATIONS {
        waits += scene.moves()?;
        scene.run("kill -0 $(cat /tmp/load.pid)")?;
    }
    println!("  processes slept {waits} times");
    let end = "pid=$(cat /tmp/load.pid); kill -TERM $pid; while kill -0 $pid 2>/dev/null; do sleep 1; done; \
               cat /tmp/load.log; grep -q ', 0 errors' /tmp/load.log && ! grep -q '^load: 0 steps' /tmp/load.log";
    println!("  {}", scene.run(end)?.trim());
    let here = scene.here();
    console.check(Scene::SIDES[scene.at], ANSWER, || here.alive())?;
    scene.run(GATE_IS_GONE)?;
    ask(scene.here(), &["vm", "stop", &machine.name, "--force"])?
        .expect(0)
        .map(drop)
}
