//! A Linux guest moves by post-copy again and again, while its processes do what is hard on memory management.

use super::moves::{GATE_IS_GONE, POST};
use crate::error::check;
use crate::hosts::daemon::Daemon;
use crate::hosts::{HOST_A, HOST_B, Host, Hosts};
use crate::packages::{Kernel, Qemu};
use crate::qemu::Machine;
use crate::qemu::serial::{Console, Side};
use crate::scenario::fixture::transhume::{Answer, ask};
use crate::scenario::guest::linux;
use crate::scenario::{Bed, Scenario};
use crate::{Error, Result};
use std::path::PathBuf;
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(600);
/// Bounds an answer of the guest.
const ANSWER: Duration = Duration::from_secs(120);
/// Migrations on each kernel; and with `--all`.
const MIGRATIONS: [u64; 2] = [5, 10];
/// In Mbit/s: slow enough that the guest goes over.
const RATE: u32 = 60;

pub(crate) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario {
            name: "post-copy-stress-6.1",
            about: "fork, mmap, mlock, O_DIRECT, huge pages, futexes and signals on Linux 6.1, which moves again and again",
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

/// How long two hosts that reach each other may take to settle who has it.
const SETTLED: Duration = Duration::from_secs(60);

/// A Linux guest, and the daemon that has it.
pub(crate) struct Scene<'a> {
    name: &'a str,
    pub(crate) console: &'a Console,
    daemons: [Daemon; 2],
    at: usize,
}

impl<'a> Scene<'a> {
    const SIDES: [Side; 2] = [Side::Source, Side::Destination];

    /// Starts two daemons, and the guest at the first one.
    pub(crate) fn start(
        bed: &Bed,
        hosts: &Hosts,
        machine: &'a Machine,
        console: &'a Console,
    ) -> Result<Self> {
        let (programs, qemu) = (bed.programs()?, bed.packages.qemu(Qemu::V10_0)?);
        let scene = Self {
            name: &machine.name,
            console,
            daemons: [
                Daemon::start(hosts, &hosts.a, programs, &qemu)?,
                Daemon::start(hosts, &hosts.b, programs, &qemu)?,
            ],
            at: 0,
        };
        scene.here().boot(&hosts.a, machine, console)?;
        Ok(scene)
    }

    /// The guest's data is right, its gate is gone, and its kernel has nothing to complain of.
    pub(crate) fn is_well(&self) -> Result<()> {
        let here = self.here();
        self.console
            .check(Self::SIDES[self.at], ANSWER, || here.alive())?;
        self.run(GATE_IS_GONE).map(drop)
    }

    pub(crate) fn stop(self) -> Result<()> {
        let stopped = ask(self.here(), &["vm", "stop", self.name, "--force"])?;
        stopped.expect(0).map(drop)
    }

    /// The host's end of the agent's channel.
    pub(crate) fn agent_socket(&self) -> PathBuf {
        self.here().vm_folder(self.name).join("agent.sock")
    }

    pub(crate) fn here(&self) -> &Daemon {
        &self.daemons[self.at]
    }

    /// Kills the daemon that has it.
    pub(crate) fn kill_here(&mut self) {
        self.daemons[self.at].kill();
    }

    /// Starts a daemon where it is.
    pub(crate) fn restart_here(&mut self, bed: &Bed, hosts: &Hosts) -> Result<()> {
        let (programs, qemu) = (bed.programs()?, bed.packages.qemu(Qemu::V10_0)?);
        let host = [&hosts.a, &hosts.b][self.at];
        self.daemons[self.at] = Daemon::start(hosts, host, programs, &qemu)?;
        Ok(())
    }

    /// Waits until one of the daemons runs it, after a migration that was cut off.
    pub(crate) fn find(&mut self) -> Result<()> {
        let begun = Instant::now();
        loop {
            for at in [self.at, 1 - self.at] {
                let shown = ask(&self.daemons[at], &["vm", "show", self.name])?;
                if shown.value["state"] == "running" {
                    if at != self.at {
                        self.attach(at)?;
                        self.at = at;
                    }
                    return Ok(());
                }
            }
            check(begun.elapsed() < SETTLED, || {
                let [a, b] = &self.daemons;
                format!("No host runs it:\n{}\n{}", a.words(), b.words())
            })?;
            crate::cleanup::still_time()?;
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn attach(&self, at: usize) -> Result<()> {
        let daemon = &self.daemons[at];
        let serial = daemon.vm_folder(self.name).join("serial.sock");
        self.console
            .attach(Self::SIDES[at], &serial, || daemon.alive())
    }

    pub(crate) fn run(&self, command: &str) -> Result<String> {
        let here = self.here();
        self.console
            .run(Self::SIDES[self.at], command, ANSWER, || here.alive())
    }

    /// Tells the guest's workload something.
    pub(crate) fn tell(&self, line: &str) -> Result<()> {
        self.console.tell(Self::SIDES[self.at], line)
    }

    /// Moves by post-copy.
    pub(crate) fn moves(&mut self) -> Result<Answer> {
        let answer = self.may_move_by_post_copy()?;
        let post = &answer.value["summary"]["post-copy"];
        println!(
            "  {} pages followed, {} asked for; {}",
            post["pages"], post["requested-pages"], post["stalls"]
        );
        check(post.is_object(), || {
            format!("It was no post-copy: {answer}")
        })?;
        Ok(answer)
    }

    /// Moves as post-copy if there is need of it when that was asked for.
    pub(crate) fn may_move_by_post_copy(&mut self) -> Result<Answer> {
        self.moves_by(&POST)
    }

    /// The host that has it.
    pub(crate) fn host<'h>(&self, hosts: &'h Hosts) -> &'h Host {
        [&hosts.a, &hosts.b][self.at]
    }

    /// The arguments of a migration to the other host.
    pub(crate) fn migration<'b>(&'b self, options: &[&'b str]) -> Vec<&'b str> {
        let to = [HOST_B, HOST_A][self.at];
        [&["migrate", self.name, "--to", to], options].concat()
    }

    /// The daemon that will have the guest next.
    pub(crate) fn there(&self) -> &Daemon {
        &self.daemons[1 - self.at]
    }

    /// Moves with these options.
    pub(crate) fn moves_by(&mut self, options: &[&str]) -> Result<Answer> {
        let to = [HOST_B, HOST_A][self.at];
        let arguments = self.migration(options);
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
        println!("  moved to {to}");
        Ok(answer)
    }
}

fn stress(bed: &Bed, kernel: Kernel) -> Result<()> {
    let mut machine = linux::machine(bed, kernel)?;
    machine.disks.truncate(1);
    // What the load writes is soon there: most of it is nothing. This is not.
    machine.settings = vec![
        ("cache-mib", "10".into()),
        ("memory-mib", "48".into()),
        ("dirty-mib", "20".into()),
    ];
    let hosts = Hosts::new(Some(RATE))?;
    let console = Console::new(&machine.name);
    let mut scene = Scene::start(bed, &hosts, &machine, &console)?;
    scene.run("/bin/gate-test load /disk/ext4 > /tmp/load.log 2>&1 & echo $! > /tmp/load.pid")?;

    let mut waits = 0;
    for _ in 0..bed.draw.count(MIGRATIONS[0], MIGRATIONS[1]) {
        // A guest that is slow to say how often they did is not waited for.
        let answer = scene.moves()?;
        waits += answer
            .number("/summary/post-copy/stalls/waits")
            .unwrap_or_default();
        // Its agent was asked though this host may still have spoken with it about the move before.
        check(answer.number("/summary/hinted-pages")? > 0, || {
            format!("Its agent was not heard: {answer}")
        })?;
        scene.run("kill -0 $(cat /tmp/load.pid)")?;
    }
    println!("  processes slept {waits} times");
    let end = "pid=$(cat /tmp/load.pid); kill -TERM $pid; while kill -0 $pid 2>/dev/null; do sleep 1; done; \
               cat /tmp/load.log; grep -q ', 0 errors' /tmp/load.log && ! grep -q '^load: 0 steps' /tmp/load.log";
    println!("  {}", scene.run(end)?.trim());
    scene.is_well()?;
    scene.stop()
}
