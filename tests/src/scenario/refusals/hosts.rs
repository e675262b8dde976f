//! What cannot work is refused before the guest is touched, with its cause and its cure.

use crate::error::check;
use crate::hosts::HOST_B;
use crate::packages::Qemu;
use crate::scenario::fixture::micro::{Micro, NAME, Qemus, UNALIGNED_KIB, raw_disk};
use crate::scenario::fixture::pair::{At, KEEPS, NEWEST, Pair};
use crate::scenario::fixture::transhume::ask;
use crate::scenario::{Bed, Scenario};
use crate::{Error, Result};
use std::fs;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(120);
const TO_OLDER: Qemus = (Qemu::V10_0, Qemu::V7_2);

pub(crate) fn scenarios() -> Vec<Scenario> {
    macro_rules! refusals {
        ($($name:literal, $about:literal, $run:expr;)*) => {
            vec![$(Scenario { name: $name, about: $about, limit: LIMIT, run: $run }),*]
        };
    }
    refusals! {
        "refused-definition", "fields that nobody knows, and values that make no sense", definition;
        "refused-without-the-disk", "the destination has no such file", without_the_disk;
        "refused-another-disk", "the destination's file has another size", another_disk;
        "refused-without-the-memory", "a guest that was adopted is larger than the destination", without_the_memory;
        "refused-machine-type", "the destination's QEMU is too old for the machine type", machine_type;
        "refused-older-qemu", "the destination's QEMU is older, the machine type is known", older_qemu;
        "refused-missed-writes", "a QEMU whose translator misses what the guest writes", missed_writes;
        "refused-queues", "the destination's QEMU has no room for the virtqueues of the source's", queues;
        "refused-names", "hosts and VMs that are not there, and a name that is taken", names;
        "refused-second-migration", "two migrations of one VM at once", second_migration;
        "dry-run", "a plan, and nothing is touched", dry_run;
    }
}

fn definition(bed: &Bed) -> Result<()> {
    let pair = Pair::new(bed, NEWEST, None)?;
    let right = Micro::new(bed)?.definition(bed)?;
    let disk = raw_disk(bed)?;
    let disk = disk.file_name().unwrap_or_default().to_string_lossy();
    for (from, to, words) in [
        ("vcpus = ", "colour = \"red\"\nvcpus = ", &["colour"][..]),
        ("id = \"root\"", "id = \"root\"\nsize = 3", &["size"]),
        ("port = \"console\"", "prot = \"console\"", &["prot"]),
        ("memory = \"131080KiB\"", "memory = \"128\"", &["memory"]),
        (
            "memory = \"131080KiB\"",
            "memory = \"900TiB\"",
            &["memory", "16TiB"],
        ),
        (
            "format = \"raw\"",
            "format = \"vmdk\"",
            &["vmdk", "raw", "qcow2"],
        ),
        ("name = \"micro\"", "name = \"../micro\"", &["name", "a-z"]),
        (
            "machine = \"q35\"",
            "machine = \"q35,usb=on\"",
            &["machine"],
        ),
        (
            "machine = \"q35\"",
            "machine = \"pc-q35-99.0\"",
            &["pc-q35-99.0", "-machine help"],
        ),
        (&*disk, "none.raw", &["none.raw", "[disk.on]"]),
    ] {
        let wrong = right.replace(from, to);
        check(wrong != right, || {
            format!("\"{from}\" is not in the definition")
        })?;
        let path = pair.write(&wrong)?;
        let answer = ask(&pair.a, &["vm", "start", &path])?;
        answer
            .refused(3, words)
            .map_err(|error| pair.with_logs(error))?;
    }
    let missing = ask(&pair.a, &["vm", "start", "/none.toml"])?.expect(1)?;
    check(missing.message().contains("/none.toml"), || {
        format!("It does not say which file: {missing}")
    })?;
    pair.nothing_left(At::A)
}

/// Refused with these words, and the guest is as it was.
pub(crate) fn refused(
    pair: &Pair<'_>,
    life: &mut crate::scenario::fixture::micro::Life,
    words: &[&str],
) -> Result<()> {
    for more in [&[][..], &["--dry-run"]] {
        let answer = pair.migrate(At::A, more)?;
        let answer = answer
            .refused(3, words)
            .map_err(|error| pair.with_logs(error))?;
        check(answer.word("/state")? == "refused", || {
            format!("Not refused: {answer}")
        })?;
    }
    pair.stayed(At::A, life)
}

fn without_the_disk(bed: &Bed) -> Result<()> {
    let micro = Micro {
        more: format!("[disk.on]\n{HOST_B} = \"/srv/none.raw\"\n"),
        ..Micro::new(bed)?
    };
    let pair = Pair::new(bed, NEWEST, None)?;
    let mut life = pair.boot(&micro)?;
    refused(
        &pair,
        &mut life,
        &["disk root on hostb", "/srv/none.raw", "[disk.on]"],
    )
}

fn another_disk(bed: &Bed) -> Result<()> {
    let path = raw_disk(bed)?.with_file_name("micro-short.raw");
    fs::write(&path, vec![0; 1 << 20]).map_err(Error::file("write", &path))?;
    let micro = Micro {
        more: format!("[disk.on]\n{HOST_B} = \"{}\"\n", path.display()),
        ..Micro::new(bed)?
    };
    let pair = Pair::new(bed, NEWEST, None)?;
    let mut life = pair.boot(&micro)?;
    refused(
        &pair,
        &mut life,
        &["disk root", "micro-short.raw", "same disk"],
    )
}

/// `vm start` would refuse it at the source already: so QEMU is started by hand, with the arguments that
/// `vm arguments` tells, and adopted.
fn without_the_memory(bed: &Bed) -> Result<()> {
    let pair = Pair::new(bed, NEWEST, None)?;
    let micro = Micro {
        memory: machine_memory()?,
        ..Micro::new(bed)?
    };
    let path = pair.write(&micro.definition(bed)?)?;
    let words = ["memory available", "stop another VM"];
    ask(&pair.a, &["vm", "start", &path])?.refused(3, &words)?;
    let (_qemu, mut life) = pair.adopt(&micro)?;
    refused(
        &pair,
        &mut life,
        &["hostb has", "memory available", "stop another VM"],
    )
}

/// All of this machine's memory, in MiB: more than is ever available.
fn machine_memory() -> Result<u64> {
    let path = "/proc/meminfo";
    let text = fs::read_to_string(path).map_err(Error::file("read", path))?;
    let total = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB"))
        .and_then(|kib| kib.parse::<u64>().ok());
    total
        .map(|kib| kib >> 10)
        .ok_or_else(|| Error::Check("No MemTotal in /proc/meminfo".into()))
}

fn machine_type(bed: &Bed) -> Result<()> {
    let micro = Micro::new(bed)?;
    let pair = Pair::new(bed, TO_OLDER, None)?;
    let mut life = pair.boot(&micro)?;
    refused(
        &pair,
        &mut life,
        &[
            "hostb",
            "no machine type pc-q35-10.0",
            "-machine help",
            "QEMU loads no state",
        ],
    )
}

fn older_qemu(bed: &Bed) -> Result<()> {
    let micro = Micro {
        machine: "pc-q35-7.2".into(),
        ..Micro::new(bed)?
    };
    let pair = Pair::new(bed, TO_OLDER, None)?;
    let mut life = pair.boot(&micro)?;
    refused(
        &pair,
        &mut life,
        &["QEMU is 7.2", "hostb", "QEMU loads no state"],
    )
}

fn names(bed: &Bed) -> Result<()> {
    let mut pair = Pair::new(bed, NEWEST, None)?;
    let mut life = pair.boot(&Micro::new(bed)?)?;
    for (arguments, words) in [
        (
            &["migrate", NAME, "--to", "hostc"][..],
            &["hostc", "hostb", "transhumed.toml"][..],
        ),
        (&["migrate", NAME, "--to", "hosta"], &["on hosta already"]),
        (&["migrate", "web9", "--to", "hostb"], &["web9", "vm list"]),
        (
            &["migrate", "web9.toml", "--to", "hostb"],
            &["web9.toml", "vm list"],
        ),
        (&["vm", "show", "web9"], &["web9", "vm list"]),
        (&["vm", "stop", "web9"], &["web9", "vm list"]),
        (&["vm", "resume", NAME], &["runs already"]),
        (&["vm", "pause", "web9"], &["web9", "vm list"]),
        (&["job", "show", "77"], &["77", "job list"]),
        (&["job", "cancel", "77"], &["77", "job list"]),
    ] {
        ask(&pair.a, arguments)?.refused(3, words)?;
    }
    // The same name at the destination.
    let namesake = Micro {
        parameters: "data=8M zero=8M".into(),
        disks: Vec::new(),
        ..Micro::new(bed)?
    };
    let path = pair.hosts.b.folder.join("definition.toml");
    fs::write(&path, namesake.definition(bed)?).map_err(Error::file("write", &path))?;
    let path = path.display().to_string();
    let start = ["vm", "start", &path];
    ask(&pair.b, &start)?.refused(3, &["hosta says that micro is there"])?;
    pair.a.kill();
    ask(&pair.b, &start)?.refused(3, &["hosta", "--anyway"])?;
    ask(&pair.b, &[&start[..], &["--anyway"]].concat())?.expect(0)?;
    pair.restart(At::A)?;
    let answer = pair.migrate(At::A, &[])?;
    answer
        .refused(3, &["hostb", "vm show micro", "rename"])
        .map_err(|error| pair.with_logs(error))?;
    ask(&pair.b, &["vm", "stop", NAME, "--force"])?.expect(0)?;
    // It is another VM, which stays defined.
    let answer = pair.migrate(At::A, &[])?;
    answer
        .refused(3, &["other disks", "vm undefine micro"])
        .map_err(|error| pair.with_logs(error))?;
    ask(&pair.b, &["vm", "undefine", NAME])?.expect(0)?;
    pair.copies.forget_ended();
    life.goes_on()?;
    pair.moves(At::A, &mut life).map(drop)
}

fn second_migration(bed: &Bed) -> Result<()> {
    let micro = Micro {
        memory: 192,
        parameters: "cache=48M data=96M zero=8M rate=1M".into(),
        ..Micro::new(bed)?
    };
    let pair = Pair::new(bed, NEWEST, Some(100))?;
    let mut life = pair.boot(&micro)?;
    let first = pair.begin_migration(At::A, &[])?;
    let job = pair.in_pre_copy(At::A)?;
    let words = [&format!("job {job}"), "job cancel"];
    for more in [&[][..], &["--dry-run"], &["--detach"]] {
        pair.migrate(At::A, more)?.refused(3, &words)?;
    }
    for arguments in [&["vm", "stop", NAME][..], &["vm", "stop", NAME, "--force"]] {
        ask(&pair.a, arguments)?.refused(3, &words)?;
    }
    pair.hosts.shape(Some(1000))?;
    first.end()?.expect(0)?;
    pair.arrived(At::B, &mut life)
        .map_err(|error| pair.with_logs(error))
}

/// Debian 13's QEMU 10.0.13 makes each queue 1,024 long: a VM with virtio devices goes to no QEMU 11.1.
fn queues(bed: &Bed) -> Result<()> {
    let micro = Micro {
        machine: "pc-q35-10.0".into(),
        ..Micro::new(bed)?
    };
    let pair = Pair::new(bed, (Qemu::V10_0_13, Qemu::V11_1), None)?;
    let mut life = pair.boot(&micro)?;
    let words = ["1024 entries", "shut micro down and start it on hostb"];
    let dry = pair.migrate(At::A, &["--dry-run"])?;
    dry.refused(3, &words)
        .map_err(|error| pair.with_logs(error))?;
    // Its QEMU there was started by then.
    let tried = pair.migrate(At::A, &[])?;
    tried
        .refused(4, &words)
        .map_err(|error| pair.with_logs(error))?;
    pair.stayed(At::A, &mut life)?;
    pair.nothing_left(At::B)
}

/// The translator of QEMU 11.1 misses writes: a VM moves only if it is paused, or its definition accepts that.
fn missed_writes(bed: &Bed) -> Result<()> {
    let pair = Pair::new(bed, KEEPS, None)?;
    let mut life = pair.boot_definition(&Micro::new(bed)?.definition(bed)?)?;
    let words = ["translator of QEMU 11.1", "vm pause micro", "missed-writes"];
    for more in [&["--dry-run"][..], &[]] {
        let tried = pair.migrate(At::A, more)?;
        tried
            .refused(3, &words)
            .map_err(|error| pair.with_logs(error))?;
    }
    pair.stayed(At::A, &mut life)?;
    pair.nothing_left(At::B)?;
    ask(&pair.a, &["vm", "pause", NAME])?.expect(0)?;
    pair.migrate(At::A, &[])?.expect(0)?;
    ask(&pair.b, &["vm", "resume", NAME])?.expect(0)?;
    pair.arrived(At::B, &mut life)?;
    life.check()
}

fn dry_run(bed: &Bed) -> Result<()> {
    let pair = Pair::new(bed, NEWEST, None)?;
    let mut life = pair.boot(&Micro::new(bed)?)?;
    let answer = pair.migrate(At::A, &["--dry-run"])?.expect(0)?;
    check(answer.word("/state")? == "planned", || {
        format!("No plan: {answer}")
    })?;
    let plan = &answer.value["plan"];
    check(
        plan["to"] == HOST_B
            && plan["memory-bytes"] == (128_u64 << 20) + (UNALIGNED_KIB << 10)
            && plan["machine"] == "pc-q35-10.0",
        || format!("The plan is wrong: {plan}"),
    )?;
    pair.stayed(At::A, &mut life)?;
    pair.moves(At::A, &mut life).map(drop)
}
