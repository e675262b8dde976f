//! The micro-guest: what it is made of, and its life on whichever host.

use super::Bed;
use crate::cleanup::still_time;
use crate::command::Run;
use crate::error::check;
use crate::packages::Qemu;
use crate::qemu::DiskImage;
use crate::suite::lanes;
use crate::{Error, Result};
use micro_guest::control::{Checked, Control, ControlError};
use micro_guest::image::write_image;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The name of every micro-guest.
pub(super) const NAME: &str = "micro";
/// Bounds an answer: far beyond what a loaded machine needs.
const LONG: Duration = Duration::from_secs(60);
/// How often its serial socket is looked for.
const GLANCE: Duration = Duration::from_millis(20);
/// How long a guest that stands still is listened to.
const STILL: Duration = Duration::from_millis(600);
/// Size and seed of its disk.
const DISK_MIB: u64 = 64;
const DISK_SEED: u64 = 1;

/// What its memory is longer than so many MiB: no whole word of a dirty bitmap, or QEMU before 9.0 misses pages that a
/// guest writes under its translator, and Transhume refuses to move it.
pub(super) const UNALIGNED_KIB: u64 = 8;

/// What a micro-guest is made of.
#[derive(Debug, Clone)]
pub(super) struct Micro {
    pub(super) machine: String,
    /// In MiB.
    pub(super) memory: u64,
    pub(super) vcpus: u32,
    /// Its parameters.
    pub(super) parameters: String,
    pub(super) disks: Vec<DiskImage>,
    /// Lines of TOML that follow its last disk.
    pub(super) more: String,
}

impl Micro {
    /// A q35 of 128 MiB whose memory is half page cache of its one raw disk, and that writes.
    pub(super) fn new(bed: &Bed) -> Result<Self> {
        Ok(Self {
            machine: "q35".into(),
            memory: 128,
            vcpus: 1,
            parameters: "cache=48M data=24M zero=16M rate=4M".into(),
            disks: vec![DiskImage {
                id: "root".into(),
                path: raw_disk(bed)?,
                format: "raw",
            }],
            more: String::new(),
        })
    }

    /// Its definition.
    pub(super) fn definition(&self, bed: &Bed) -> Result<String> {
        self.definition_for(bed, Qemu::V10_0)
    }

    /// The same for that QEMU. With one whose translator misses writes, the guest has each noted anew.
    pub(super) fn definition_for(&self, bed: &Bed, qemu: Qemu) -> Result<String> {
        let (accept, flush) = match qemu {
            Qemu::V11_1 => ("missed-writes = \"accept\"\n", " flush=yes"),
            Qemu::V7_2 | Qemu::V10_0 | Qemu::V10_0_13 => ("", ""),
        };
        let mut text = format!(
            "name = \"{NAME}\"\nmachine = \"{}\"\naccelerator = \"tcg\"\n{accept}memory = \"{}KiB\"\nvcpus = {}\n\n\
             [boot]\nkernel = \"{}\"\nappend = \"{}{flush}\"\n\n[agent]\nport = \"console\"\n\n[console]\nserial = true\n",
            self.machine,
            (self.memory << 10) + UNALIGNED_KIB,
            self.vcpus,
            bed.micro_guest()?.display(),
            self.parameters,
        );
        for DiskImage { id, path, format } in &self.disks {
            let _ = write!(
                text,
                "\n[[disk]]\nid = \"{id}\"\nformat = \"{format}\"\npath = \"{}\"\n",
                path.display()
            );
        }
        text.push_str(&self.more);
        Ok(text)
    }
}

/// The disk that scenarios share, those of a lane: nobody writes to it, and QEMU locks it all the same.
pub(super) fn raw_disk(bed: &Bed) -> Result<PathBuf> {
    let name = format!("micro-{}.raw", lanes::own());
    let path = bed.layout.folder("disks")?.join(name);
    if fs::metadata(&path).is_ok_and(|found| found.len() == DISK_MIB << 20) {
        return Ok(path);
    }
    let draft = path.with_extension("draft");
    write_image(&draft, DISK_SEED, DISK_MIB << 20).map_err(Error::file("write", &draft))?;
    fs::rename(&draft, &path).map_err(Error::file("rename", &draft))?;
    Ok(path)
}

/// The same as qcow2.
pub(super) fn qcow2_disk(bed: &Bed) -> Result<PathBuf> {
    let raw = raw_disk(bed)?;
    let path = raw.with_extension("qcow2");
    if path.exists() {
        return Ok(path);
    }
    let draft = path.with_extension("qcow2-draft");
    Run::new(bed.packages.qemu_tool("qemu-img")?)
        .args(["convert", "-f", "raw", "-O", "qcow2"])
        .args([&raw, &draft])
        .cure("See qemu-img's words")
        .output()?;
    fs::rename(&draft, &path).map_err(Error::file("rename", &draft))?;
    Ok(path)
}

/// Both QEMUs, at the source and at the destination.
pub(super) type Qemus = (Qemu, Qemu);

/// A guest that runs, wherever.
pub(super) struct Life {
    control: Control,
    /// The last number that it answered a ping with.
    last: u64,
}

/// What the guest's control channel says, as an error of the guest.
pub(crate) fn wrong(error: &ControlError) -> Error {
    Error::Guest {
        name: NAME.into(),
        what: error.to_string(),
    }
}

/// Opens the serial socket, which may be made only now; looks for it after each pause.
pub(crate) fn connect(folder: &Path, patience: Duration, pause: Duration) -> Result<Control> {
    let path = folder.join("serial.sock");
    let start = Instant::now();
    loop {
        match Control::connect(&path) {
            Err(_) if start.elapsed() < patience => {
                still_time()?;
                std::thread::sleep(pause);
            }
            result => return result.map_err(|error| wrong(&error)),
        }
    }
}

impl Life {
    /// Of a guest that boots, by its run folder.
    pub(super) fn begin(folder: &Path) -> Result<Self> {
        let mut control = connect(folder, LONG, GLANCE)?;
        let last = control.wait_ready(LONG).map_err(|error| wrong(&error))?;
        Ok(Self { control, last })
    }

    /// It answers with the next number: it is the same guest, and no other copy of it answered a ping.
    pub(super) fn goes_on(&mut self) -> Result<()> {
        let number = self.control.ping(LONG).map_err(|error| wrong(&error))?;
        let expected = self.last + 1;
        self.last = number;
        check(number == expected, || {
            format!("The guest answered with {number} instead of {expected}: another copy ran")
        })
    }

    /// It runs on at another place. Its old channel, if still there, says nothing any more.
    pub(super) fn moved(&mut self, folder: &Path) -> Result<()> {
        let control = connect(folder, LONG, GLANCE)?;
        let mut old = std::mem::replace(&mut self.control, control);
        check(old.ping(STILL).is_err(), || {
            "The guest answers where it left".into()
        })?;
        self.goes_on()
    }

    /// From now on it writes only so many bytes of its data.
    pub(super) fn write_only(&mut self, bytes: u64) -> Result<()> {
        self.control.hot(bytes, LONG).map_err(|error| wrong(&error))
    }

    /// From now on it writes so many bytes of its data a second.
    pub(super) fn write_at(&mut self, rate: u64) -> Result<()> {
        self.control
            .dirty(rate, LONG)
            .map_err(|error| wrong(&error))
    }

    /// It ends by itself after so many milliseconds: by `poweroff`, `reset` or `panic`.
    pub(super) fn end(&mut self, how: &str, after_ms: u64) -> Result<()> {
        let told = self.control.end(how, after_ms, LONG);
        told.map_err(|error| wrong(&error))
    }

    /// Every page holds what it must.
    pub(super) fn check(&mut self) -> Result<()> {
        match self.control.check(LONG).map_err(|error| wrong(&error))? {
            Checked::Right { pages } => {
                check(pages > 1000, || format!("Only {pages} pages were checked"))
            }
            wrong @ Checked::Wrong { .. } => Err(Error::Check(format!(
                "The guest's memory is wrong: {wrong:?}"
            ))),
        }
    }
}
