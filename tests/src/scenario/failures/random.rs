//! Failures drawn from a seed, one a migration, while guests go to and fro: afterwards the guest runs
//! exactly once, at the right side, every page right, and nothing is left behind.

use super::any_moment::{Moment, OLD, Watch, is_lost, settle, state};
use super::die::sigkill;
use crate::cleanup::still_time;
use crate::command::Run;
use crate::error::check;
use crate::packages::Qemu;
use crate::scenario::fixture::micro::{Life, Micro, NAME, Qemus, raw_disk};
use crate::scenario::fixture::pair::{At, KEEPS, NEWEST, Pair};
use crate::scenario::fixture::transhume::{Answer, ask};
use crate::scenario::post_copy::hand_over::loop_device;
use crate::scenario::{Bed, Draw, Scenario};
use crate::{Error, Result};
use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How many of each, unless the environment says otherwise: for each change, of another seed each time, and with `--all`.
/// In post-copy they take longer.
const MIGRATIONS: [u64; 2] = [40, 150];
const IN_POST_COPY: [u64; 2] = [15, 150];
/// Of all that are drawn with `--all`.
const LIMIT: Duration = Duration::from_secs(3600);
const COUNT: &str = "TRANSHUME_TEST_MIGRATIONS";

pub(crate) fn scenarios() -> Vec<Scenario> {
    vec![
        Scenario {
            name: "die-at-random",
            about: "migrations to and fro, each with a failure drawn from a seed",
            limit: LIMIT,
            run: |bed| many(bed, NEWEST, Mode::Pre, MIGRATIONS),
        },
        Scenario {
            name: "die-at-random-7.2",
            about: "the same with QEMU 7.2",
            limit: LIMIT,
            run: |bed| many(bed, OLD, Mode::Pre, MIGRATIONS),
        },
        Scenario {
            name: "die-at-random-post-copy",
            about: "the same, and the guest runs before all of its memory is there",
            limit: LIMIT,
            run: |bed| many(bed, NEWEST, Mode::Post, IN_POST_COPY),
        },
        Scenario {
            name: "die-at-random-post-copy-7.2",
            about: "the same with QEMU 7.2",
            limit: LIMIT,
            run: |bed| many(bed, OLD, Mode::Post, IN_POST_COPY),
        },
        Scenario {
            name: "die-at-random-7.2-to-10.0",
            about: "the same from QEMU 7.2 to 10.0, by pre-copy",
            limit: LIMIT,
            run: |bed| many(bed, (Qemu::V7_2, Qemu::V10_0), Mode::Pre, IN_POST_COPY),
        },
        Scenario {
            name: "die-at-random-10.0-to-11.1",
            about: "the same from QEMU 10.0 to 11.1",
            limit: LIMIT,
            run: |bed| many(bed, (Qemu::V10_0, Qemu::V11_1), Mode::Pre, IN_POST_COPY),
        },
    ]
}

/// Those that take long.
pub(crate) fn long_scenarios() -> Vec<Scenario> {
    vec![Scenario {
        name: "die-at-random-post-copy-11.1",
        about: "the same with QEMU 11.1, which keeps the VM until its devices are loaded at its destination",
        limit: LIMIT,
        run: |bed| many(bed, KEEPS, Mode::Post, IN_POST_COPY),
    }]
}

/// Numbers from a seed (splitmix64).
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }

    fn one<T: Copy>(&mut self, of: &[T]) -> T {
        let most = u64::try_from(of.len()).unwrap_or(1);
        of[usize::try_from(self.below(most)).unwrap_or(0)]
    }
}

/// How long what failed stays so, at most, when a migration waits for it: for longer than its patience.
const OUTAGE: Duration = Duration::from_secs(4);

/// How memory moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Pre,
    Post,
}

/// Which of the two hosts.
#[derive(Debug, Clone, Copy)]
enum Role {
    Source,
    Destination,
}

#[derive(Debug, Clone, Copy)]
enum Failure {
    /// SIGKILL of a transhumed.
    Daemon(Role),
    /// SIGKILL of a guest's QEMU.
    Qemu(Role),
    /// The link carries nothing for so many milliseconds.
    Frozen(u64),
    /// Its connections break as well.
    Cut(u64),
    /// For longer than it may.
    Away,
    /// No more can be written where a daemon keeps what must survive it.
    FullDisk(Role),
    /// The destination's disk cannot be read.
    BadDisk,
    /// `transhume job cancel`.
    Cancel,
}

fn draw(dice: &mut Dice, mode: Mode) -> (Failure, Moment, u64) {
    let failure = match dice.below(14) {
        0 | 1 => Failure::Daemon(Role::Source),
        2 | 3 => Failure::Daemon(Role::Destination),
        4 => Failure::Qemu(Role::Source),
        5 | 6 => Failure::Qemu(Role::Destination),
        7 => Failure::Frozen(100 + dice.below(1500)),
        8 => Failure::Cut(100 + dice.below(1500)),
        9 => Failure::Away,
        10 => Failure::FullDisk(dice.one(&[Role::Source, Role::Destination])),
        11 => Failure::BadDisk,
        _ => Failure::Cancel,
    };
    let moment = match dice.below(6) {
        0 => Moment::After(dice.below(300)),
        1 => Moment::Phase("prepare"),
        2 | 3 => Moment::Phase("pre-copy"),
        4 => Moment::Phase("switchover"),
        _ => Moment::Phase("commit"),
    };
    // Half of them when there is most to lose.
    let moment = match mode {
        Mode::Post if dice.below(2) == 0 => Moment::Phase("post-copy"),
        _ => moment,
    };
    // A disk that is bad before is refused.
    let moment = match failure {
        Failure::BadDisk => Moment::Phase("pre-copy"),
        _ => moment,
    };
    // Mostly at once.
    let later = dice.one(&[0, 0, 5, 20, 100, 300]);
    (failure, moment, later)
}

/// A disk of the second host's own, with the same content: a loop device, whose end can be cut off.
struct CutDisk {
    device: PathBuf,
    image: PathBuf,
    whole: PathBuf,
    /// The device is given back when the last one closes it.
    _open: File,
}

impl CutDisk {
    fn new(bed: &Bed, folder: &Path) -> Result<Self> {
        let whole = raw_disk(bed)?;
        let image = folder.join("disk.raw");
        fs::copy(&whole, &image).map_err(Error::file("copy", &whole))?;
        let (device, open) = loop_device(&image)?;
        Ok(Self {
            device,
            image,
            whole,
            _open: open,
        })
    }

    fn resized(&self) -> Result<()> {
        Run::new("losetup")
            .args(["--set-capacity"])
            .args([&self.device])
            .cure("It needs loop devices")
            .output()
            .map(drop)
    }

    /// All but its beginning fails to be read.
    fn cut(&self) -> Result<()> {
        let image = OpenOptions::new().write(true).open(&self.image);
        let cut = image.and_then(|image| image.set_len(1 << 20));
        cut.map_err(Error::file("cut", &self.image))?;
        self.resized()
    }

    fn mend(&self) -> Result<()> {
        fs::copy(&self.whole, &self.image).map_err(Error::file("copy", &self.whole))?;
        self.resized()
    }
}

/// One guest, wherever it is.
struct Scene<'a> {
    pair: Pair<'a>,
    disk: CutDisk,
    life: Life,
    at: At,
    qemus: Qemus,
    mode: Mode,
}

impl<'a> Scene<'a> {
    fn new(bed: &'a Bed, qemus: Qemus, mode: Mode) -> Result<Self> {
        let link = match mode {
            Mode::Pre => 1000,
            Mode::Post => 200,
        };
        let pair = Pair::with_small_state(bed, qemus, Some(link))?;
        let disk = CutDisk::new(bed, &pair.hosts.b.folder)?;
        let life = boot(&pair, &disk, qemus, mode)?;
        Ok(Self {
            pair,
            disk,
            life,
            at: At::A,
            qemus,
            mode,
        })
    }

    fn host(&self, role: Role) -> At {
        match role {
            Role::Source => self.at,
            Role::Destination => self.at.other(),
        }
    }

    /// One migration. Says how it went, and whether the guest moved.
    fn migrate(&mut self, dice: &mut Dice) -> Result<(String, bool)> {
        let (failure, moment, later) = draw(dice, self.mode);
        let from = self.at;
        let mut watch = Watch::open(self.pair.host(from))?;
        let mode = match self.mode {
            Mode::Pre => "pre",
            Mode::Post => "post",
        };
        let begin = ["--link-timeout", "3", "--mode", mode];
        let command = self.pair.begin_migration(from, &begin)?;
        let phase = watch.wait(moment)?;
        std::thread::sleep(Duration::from_millis(later));
        self.inject(failure)?;
        // After the hand-over it waits until what failed is there again.
        let since = Instant::now();
        while !command.ended() && (self.mode == Mode::Pre || since.elapsed() < OUTAGE) {
            still_time()?;
            std::thread::sleep(Duration::from_millis(10));
        }
        self.repair(failure)?;
        let answer = command.end()?;
        let told = format!(
            "{failure:?} from {} at {moment:?} + {later} ms (in {phase}), exit code {}",
            from.name(),
            answer.code
        );
        let in_time = |error| Error::Check(format!("{told}: {error}"));
        let may_be_lost = matches!(failure, Failure::Qemu(_));
        let place = if self.is_lost(from, failure, &answer).map_err(in_time)? {
            for process in [At::A, At::B].map(|at| self.pair.qemus(at)).concat() {
                sigkill(process)?;
            }
            None
        } else {
            self.settle(from, &answer, may_be_lost).map_err(in_time)?
        };
        if let Some(at) = place {
            self.is_well(from, at).map_err(in_time)?;
        }
        let moved = place.is_some_and(|at| at != from);
        let place = place.filter(|at| {
            // A QEMU that began to use the disk while it was short keeps it so.
            let is_short = matches!(failure, Failure::BadDisk);
            // And none goes back to an older one.
            let is_newer = self.qemus.0 != self.qemus.1;
            !((is_short || is_newer) && *at == At::B)
        });
        if place.is_none() {
            for process in self.pair.qemus(At::B) {
                sigkill(process)?;
            }
            self.settle(from, &answer, true).map_err(in_time)?;
            // The log of a QEMU that was killed stays where an operator would look for it.
            for at in [At::A, At::B] {
                let _ = fs::remove_dir_all(self.pair.folder(at));
            }
            self.life = boot(&self.pair, &self.disk, self.qemus, self.mode).map_err(in_time)?;
            self.at = At::A;
        }
        let place = place.map_or("started anew".to_owned(), |at| {
            format!("it runs at {}", at.name())
        });
        Ok((format!("{told}: {place}"), moved))
    }

    /// In post-copy each QEMU has a part of the memory that the other one does not have. And QEMU neither takes
    /// a VM back once its devices are on their way, nor resumes before they are loaded.
    fn is_lost(&self, from: At, failure: Failure, answer: &Answer) -> Result<bool> {
        if self.mode == Mode::Pre || !matches!(answer.code, 5 | 7) {
            return Ok(false);
        }
        if matches!(failure, Failure::Qemu(_)) {
            return Ok(true);
        }
        let mut lost = false;
        self.pair.wait("the job to be settled", || {
            let jobs = ask(self.pair.daemon(from), &["job", "list"])?.expect(0)?;
            let job = jobs.value.as_array().and_then(|jobs| jobs.last());
            let job = job.cloned().unwrap_or_default();
            lost = is_lost(&job);
            Ok(job["state"] != "running" && job["in-doubt"] != true)
        })?;
        // A link is waited for, and room for the journal is kept.
        let may = matches!(failure, Failure::Daemon(_));
        check(!lost || may, || {
            format!("{failure:?} cost the guest: {answer}")
        })?;
        Ok(lost)
    }

    fn inject(&mut self, failure: Failure) -> Result<()> {
        match failure {
            Failure::Daemon(role) => match self.host(role) {
                At::A => self.pair.a.kill(),
                At::B => self.pair.b.kill(),
            },
            Failure::Qemu(role) => {
                for process in self.pair.qemus(self.host(role)) {
                    sigkill(process)?;
                }
            }
            Failure::Frozen(ms) => {
                self.pair.hosts.set_link(false)?;
                std::thread::sleep(Duration::from_millis(ms));
                self.pair.hosts.set_link(true)?;
            }
            Failure::Cut(ms) => {
                self.pair.hosts.break_link()?;
                std::thread::sleep(Duration::from_millis(ms));
                self.pair.hosts.set_link(true)?;
            }
            Failure::Away => self.pair.hosts.break_link()?,
            Failure::FullDisk(role) => {
                self.pair.fill_state(self.host(role))?;
            }
            Failure::BadDisk => self.disk.cut()?,
            Failure::Cancel => {
                let daemon = self.pair.daemon(self.at);
                let jobs = ask(daemon, &["job", "list"])?.expect(0)?;
                let last = jobs.value.as_array().and_then(|jobs| jobs.last());
                if let Some(job) = last {
                    // It may have ended, or be too late.
                    ask(daemon, &["job", "cancel", &job["id"].to_string()])?;
                }
            }
        }
        Ok(())
    }

    fn repair(&mut self, failure: Failure) -> Result<()> {
        match failure {
            Failure::Daemon(role) => self.pair.restart(self.host(role)),
            Failure::Away => self.pair.hosts.set_link(true),
            Failure::FullDisk(role) => self.pair.empty_state(self.host(role)),
            Failure::BadDisk => self.disk.mend(),
            Failure::Qemu(_) | Failure::Frozen(_) | Failure::Cut(_) | Failure::Cancel => Ok(()),
        }
    }

    /// Where the guest is when all is settled; nowhere only if its QEMU was killed.
    fn settle(&self, from: At, answer: &Answer, may_be_lost: bool) -> Result<Option<At>> {
        if may_be_lost {
            let pair = &self.pair;
            let mut found = None;
            pair.wait("the hosts to agree", || {
                let states = [state(pair, At::A)?, state(pair, At::B)?];
                let runs = |at: usize| states[at].as_deref() == Some("running");
                found = match (&states[0], &states[1]) {
                    (Some(_), None) if runs(0) => Some(Some(At::A)),
                    (None, Some(_)) if runs(1) => Some(Some(At::B)),
                    (None, None) => Some(None),
                    _ => None,
                };
                Ok(found.is_some())
            })?;
            return Ok(found.flatten());
        }
        settle(&self.pair, from, answer).map(Some)
    }

    fn is_well(&mut self, from: At, at: At) -> Result<()> {
        self.at = at;
        if at == from {
            self.pair.stayed(at, &mut self.life)?;
        } else {
            self.pair.arrived(at, &mut self.life)?;
            self.pair.nothing_left(from)?;
        }
        self.life.check()
    }
}

fn boot(pair: &Pair<'_>, disk: &CutDisk, qemus: Qemus, mode: Mode) -> Result<Life> {
    // In post-copy more than a pause could carry is written while memory is scanned once.
    let parameters = match mode {
        Mode::Pre => "cache=32M data=16M zero=8M rate=8M",
        Mode::Post => "cache=16M data=32M zero=8M rate=60M",
    };
    let micro = Micro {
        machine: match qemus {
            (from, to) if from != to => format!("pc-i440fx-{}", from.version()),
            _ => "pc".into(),
        },
        memory: 96,
        parameters: parameters.into(),
        // Nothing proves that the copy is the same storage.
        more: format!(
            "shared = \"trust\"\n[disk.on]\nhostb = \"{}\"\n",
            disk.device.display()
        ),
        ..Micro::new(pair.bed)?
    };
    pair.boot(&micro)
}

/// A number of the environment's.
fn number(name: &str, default: u64) -> Result<u64> {
    match std::env::var(name) {
        Ok(text) => text
            .parse()
            .map_err(|error| Error::Check(format!("{name}: {error}"))),
        Err(_) => Ok(default),
    }
}

fn many(bed: &Bed, qemus: Qemus, mode: Mode, [some, all]: [u64; 2]) -> Result<()> {
    let seed = bed.draw.seed;
    let migrations = number(COUNT, bed.draw.count(some, all))?;
    println!("  seed {seed}: {}={seed} repeats this", Draw::SEED);
    let mut dice = Dice(seed);
    let mut scene = Scene::new(bed, qemus, mode)?;
    let mut moved = 0;
    for number in 1..=migrations {
        let (told, is_there) = scene.migrate(&mut dice).map_err(|error| {
            let error = Error::Check(format!("seed {seed}, migration {number}: {error}"));
            scene.pair.with_logs(error)
        })?;
        moved += u32::from(is_there);
        println!("  {number}: {told}");
    }
    println!("  {moved} of {migrations} moved all the same");
    // Whatever failed, it is not all that does.
    check(moved > 0, || "No migration ever succeeded".into())?;
    let at = scene.at;
    if mode == Mode::Post {
        scene.pair.hosts.shape(None)?;
    }
    scene.pair.moves(at, &mut scene.life)?;
    drop(scene.life);
    let there = at.other();
    ask(scene.pair.daemon(there), &["vm", "stop", NAME, "--force"])?.expect(0)?;
    scene.pair.nothing_left(at)?;
    // The log of a VM that was stopped stays.
    check(scene.pair.qemus(there).is_empty(), || {
        "A QEMU is left".into()
    })
}
