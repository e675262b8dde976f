//! A disk that can be made slow: an image behind a loop device, held back by the kernel's blkio controller,
//! so that QEMU and the daemons are held back alike.

use crate::cleanup::{Guard, Leftover};
use crate::command::Run;
use crate::{Error, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// Of the controller's root, so that it counts for every process. The device is nobody else's.
const LIMITS: &str = "/sys/fs/cgroup/blkio/blkio.throttle.read_bps_device";

/// The device, until it is dropped.
#[derive(Debug)]
pub(super) struct SlowDisk {
    /// Where it is.
    pub(super) path: PathBuf,
    _guard: Guard,
}

impl SlowDisk {
    /// Puts an image behind a device, as fast as it is. What a killed run left of it is removed.
    pub(super) fn attach(image: &Path) -> Result<Self> {
        if !Path::new(LIMITS).exists() {
            return Err(Error::machine(
                format!("{LIMITS} is not there, so no disk can be slowed"),
                "Mount the blkio controller of cgroup v1 there, or measure the other cases (--cases)",
            ));
        }
        let losetup =
            || Run::new("losetup").cure("The bench needs root and the loop driver (modprobe loop)");
        let left = losetup()
            .args(["--noheadings", "--output", "NAME", "--associated"])
            .arg(image)
            .text()?;
        for device in left.split_whitespace() {
            detach(Path::new(device));
        }
        let path = losetup()
            .args(["--find", "--show", "--direct-io=on"])
            .arg(image)
            .text()?;
        let path = PathBuf::from(path.trim());
        Ok(Self {
            _guard: Guard::new(Leftover::LoopDevice(path.clone())),
            path,
        })
    }

    /// Lets it be read at so many bytes a second; 0 for as fast as it is.
    pub(super) fn limit(&self, bytes_per_second: u64) -> Result<()> {
        set_limit(&self.path, bytes_per_second)
    }
}

fn set_limit(device: &Path, bytes_per_second: u64) -> Result<()> {
    let name = device.file_name().unwrap_or_default();
    let number = Path::new("/sys/block").join(name).join("dev");
    let number = fs::read_to_string(&number).map_err(Error::file("read", &number))?;
    fs::write(LIMITS, format!("{} {bytes_per_second}", number.trim()))
        .map_err(Error::file("write", Path::new(LIMITS)))
}

/// Takes a device away; from whoever still has it open, once that has closed it.
pub(crate) fn detach(device: &Path) {
    // Of the next image behind the device nobody asked for a limit.
    let _ = set_limit(device, 0);
    let _ = std::process::Command::new("losetup")
        .arg("--detach")
        .arg(device)
        .output();
}
