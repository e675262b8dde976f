//! A daemon dies at the hand-over of a post-copy, where disks have no locks that both hosts see: whatever the QEMUs do then
//! by themselves, no two of them ever run the guest.

use super::moves::{POST, SLOW, writes};
use crate::cleanup::still_time;
use crate::command::Run;
use crate::error::check;
use crate::packages::Qemu;
use crate::scenario::failures::any_moment::{is_lost, state};
use crate::scenario::failures::die::sigkill;
use crate::scenario::fixture::micro::{Life, Micro, Qemus, raw_disk};
use crate::scenario::fixture::pair::{At, KEEPS, NEWEST, Pair};
use crate::scenario::fixture::transhume::ask;
use crate::scenario::{Bed, Scenario};
use crate::{Error, Result};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(400);
/// How long the hand-over is waited for.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long QEMUs are left alone when a daemon is gone.
const ALONE: Duration = Duration::from_millis(500);

pub(crate) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario {
            name: "die-at-hand-over-10.0",
            about: "SIGKILL of either daemon when the guest is handed over, on disks without locks: it never runs twice",
            limit: LIMIT,
            run: |bed| all(bed, NEWEST),
        },
        Scenario {
            name: "die-at-hand-over-11.1",
            about: "the same with QEMU 11.1, which goes on by itself when it is left alone too early",
            limit: LIMIT,
            run: |bed| all(bed, KEEPS),
        },
    ]
}

/// When a daemon dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    /// The destination has noted that its QEMU has loaded the devices.
    Loaded,
    /// The destination has noted that the guest is its own.
    Committed,
    /// The destination's QEMU runs the guest.
    Runs,
}

fn all(bed: &Bed, qemus: Qemus) -> Result<()> {
    let moments = [Moment::Loaded, Moment::Committed, Moment::Runs];
    // Older ones are handed over before that.
    let moments = &moments[usize::from(qemus.0 != Qemu::V11_1)..];
    let all = [At::A, At::B]
        .into_iter()
        .flat_map(|at| moments.iter().map(move |moment| (at, moment)));
    for (victim, &moment) in bed.draw.half(all) {
        let mut pair = Pair::new(bed, qemus, Some(SLOW))?;
        let outcome = one(&mut pair, victim, moment).map_err(|error| {
            let name = victim.name();
            pair.with_logs(Error::Check(format!(
                "The daemon of {name} at {moment:?}: {error}"
            )))
        })?;
        println!(
            "  the daemon of {} died at {moment:?}: {outcome}",
            victim.name()
        );
    }
    Ok(())
}

/// A file as a device of its own on each host: locks of one are unknown to the other.
struct TwoDevices {
    paths: [PathBuf; 2],
    /// The devices are given back when the last one closes them.
    _open: [File; 2],
}

/// A loop device over a file, which is given back when the last one closes it.
pub(crate) fn loop_device(image: &Path) -> Result<(PathBuf, File)> {
    let losetup = || Run::new("losetup").cure("It needs loop devices, and mount's losetup");
    let said = losetup().args(["--find", "--show"]).args([image]).text()?;
    let device = PathBuf::from(said.trim());
    let open = File::open(&device).map_err(Error::file("open", &device))?;
    losetup().args(["--detach"]).args([&device]).output()?;
    Ok((device, open))
}

impl TwoDevices {
    fn over(image: &Path) -> Result<Self> {
        let ((a, open_a), (b, open_b)) = (loop_device(image)?, loop_device(image)?);
        Ok(Self {
            paths: [a, b],
            _open: [open_a, open_b],
        })
    }
}

fn one(pair: &mut Pair<'_>, victim: At, moment: Moment) -> Result<String> {
    let image = pair.hosts.a.folder.join("disk.raw");
    let whole = raw_disk(pair.bed)?;
    fs::copy(&whole, &image).map_err(Error::file("copy", &whole))?;
    let devices = TwoDevices::over(&image)?;
    let mut micro = Micro {
        // Nothing of a loop device tells what it stands for.
        more: format!(
            "shared = \"trust\"\n[disk.on]\nhostb = \"{}\"\n",
            devices.paths[1].display()
        ),
        ..writes(pair.bed)?
    };
    for disk in &mut micro.disks {
        disk.path.clone_from(&devices.paths[0]);
    }
    let mut life = pair.boot(&micro)?;
    let begin = [POST[0], POST[1], "--link-timeout", "3"];
    let command = pair.begin_migration(At::A, &begin)?;
    await_moment(pair, moment)?;
    match victim {
        At::A => pair.a.kill(),
        At::B => pair.b.kill(),
    }
    std::thread::sleep(ALONE);
    pair.copies.never_two()?;
    pair.restart(victim)?;
    let answer = command.end()?;
    let place = settled(pair)?;
    pair.copies.never_two()?;
    let code = answer.code;
    let Some(at) = place else {
        // A QEMU before 10.2 gives the guest up before the other one has loaded its devices.
        let may = moment == Moment::Committed && pair.first_qemu() != Qemu::V11_1;
        check(may && code != 0, || format!("The guest was lost: {answer}"))?;
        for process in [At::A, At::B].map(|at| pair.qemus(at)).concat() {
            sigkill(process)?;
        }
        return Ok(format!(
            "exit code {code}; its rest is lost, and nothing runs it"
        ));
    };
    runs_on(pair, at, &mut life)
        .map_err(|error| Error::Check(format!("{error}\nafter {answer}")))?;
    Ok(format!("exit code {code}; it ran on at {}", at.name()))
}

fn runs_on(pair: &Pair<'_>, at: At, life: &mut Life) -> Result<()> {
    match at {
        At::A => pair.stayed(at, life),
        At::B => pair
            .arrived(at, life)
            .and_then(|()| pair.nothing_left(at.other())),
    }
}

fn await_moment(pair: &Pair<'_>, moment: Moment) -> Result<()> {
    let begun = Instant::now();
    let arrivals = pair.host(At::B).state_folder().join("arrivals");
    let noted = |word: &str| {
        let files = fs::read_dir(&arrivals).into_iter().flatten().flatten();
        let mut texts = files.filter_map(|file| fs::read_to_string(file.path()).ok());
        texts.any(|text| {
            text.split_whitespace()
                .nth(1)
                .is_some_and(|stage| stage.starts_with(word))
        })
    };
    loop {
        let come = match moment {
            Moment::Loaded => noted("loaded"),
            Moment::Committed => noted("committed") || noted("post-copy"),
            Moment::Runs => pair.copies.runs_at(At::B),
        };
        if come {
            return Ok(());
        }
        check(begun.elapsed() < PATIENCE, || {
            format!("No moment {moment:?}")
        })?;
        still_time()?;
        std::thread::sleep(Duration::from_micros(300));
    }
}

/// Where the guest runs when both daemons know what became of it; nowhere if it is lost.
fn settled(pair: &Pair<'_>) -> Result<Option<At>> {
    let mut place = None;
    pair.wait("the job to be settled", || {
        let jobs = ask(&pair.a, &["job", "list"])?.expect(0)?;
        let job = jobs.value.as_array().and_then(|jobs| jobs.last());
        let job = job.cloned().unwrap_or_default();
        if job["state"] == "running" || job["in-doubt"] == true {
            return Ok(false);
        }
        let states = [state(pair, At::A)?, state(pair, At::B)?];
        let runs = |at: usize| states[at].as_deref() == Some("running");
        place = match (runs(0), runs(1)) {
            _ if is_lost(&job) => None,
            (true, false) => Some(At::A),
            (false, true) => Some(At::B),
            _ => return Ok(false),
        };
        Ok(true)
    })?;
    Ok(place)
}
