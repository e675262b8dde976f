//! A Linux guest is started by a host's daemon.

use super::Host;
use super::daemon::Daemon;
use crate::qemu::serial::{Console, Side};
use crate::qemu::{BOOT, Machine, boots};
use crate::{Error, Result};
use std::fs;
use std::time::Duration;

impl Daemon {
    /// Starts a guest at that host, which is this daemon's, listens to it, and waits until it works.
    pub(crate) fn boot(&self, host: &Host, machine: &Machine, console: &Console) -> Result<()> {
        self.boot_within(host, machine, console, BOOT)
    }

    /// The same, with another limit.
    pub(crate) fn boot_within(
        &self,
        host: &Host,
        machine: &Machine,
        console: &Console,
        limit: Duration,
    ) -> Result<()> {
        let path = host.folder.join("definition.toml");
        fs::write(&path, machine.definition()).map_err(Error::file("write", &path))?;
        let serial = self.vm_folder(&machine.name).join("serial.sock");
        let begin = || {
            self.run(&["vm", "start", &path.display().to_string()])?;
            console.attach(Side::Source, &serial, || self.alive())?;
            console.wait_for("ready", 0, limit, || self.alive())
        };
        boots(console, begin, || {
            self.run(&["vm", "stop", &machine.name, "--force"])
                .map(drop)
        })
        .map(drop)
    }
}
