//! QEMU hands memory over through several channels (`multifd`): every page is right, whatever comes through
//! which; and a channel that breaks leaves the guest where it is.

use crate::error::check;
use crate::packages::Qemu;
use crate::scenario::fixture::micro::{Micro, Qemus};
use crate::scenario::fixture::pair::{At, NEWEST, Pair};
use crate::scenario::fixture::transhume::Answer;
use crate::scenario::{Bed, Scenario};
use crate::{Error, Result};
use std::collections::HashMap;
use std::fs;
use std::net::Shutdown;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(150);
const OLD: Qemus = (Qemu::V7_2, Qemu::V7_2);
const CHANNELS: u8 = 2;
/// So slow that copying takes long enough to be looked at, in Mbit/s.
const SLOW: u32 = 200;
/// What the daemon calls the threads that read channels.
const READER: &str = "relay-channel";

pub(crate) fn scenarios() -> Vec<Scenario> {
    macro_rules! scenarios {
        ($($name:literal, $about:literal, $run:expr;)*) => {
            vec![$(Scenario { name: $name, about: $about, limit: LIMIT, run: $run }),*]
        };
    }
    scenarios! {
        "channels-10.0", "there and back, points of order in the stream", |bed| {
            there_and_back(bed, NEWEST, &busy(bed)?)
        };
        "channels-7.2", "there and back, a point of order with each section, zero pages in the stream", |bed| {
            there_and_back(bed, OLD, &busy(bed)?)
        };
        "channels-newer-qemu", "QEMU 10.0 with a machine type of 7.2, which orders as that does", |bed| {
            there_and_back(bed, NEWEST, &Micro { machine: "pc-q35-7.2".into(), ..busy(bed)? })
        };
        "channels-one-breaks", "a channel breaks: the guest runs on, and moves the next time", |bed| {
            one_breaks(bed, NEWEST)
        };
        "channels-one-breaks-7.2", "the same with QEMU 7.2", |bed| one_breaks(bed, OLD);
    }
}

/// A guest that writes all that it has again and again while it moves.
fn busy(bed: &Bed) -> Result<Micro> {
    Ok(Micro {
        memory: 192,
        parameters: "cache=32M data=64M zero=16M rate=12M".into(),
        vcpus: 2,
        ..Micro::new(bed)?
    })
}

fn uses_channels(pair: &Pair<'_>, at: At) -> Result<()> {
    let readers = pair.daemon(at).threads(READER);
    check(readers == usize::from(CHANNELS), || {
        format!("{readers} channels are read on {}", at.name())
    })
}

fn there_and_back(bed: &Bed, qemus: Qemus, micro: &Micro) -> Result<()> {
    let pair = Pair::with_channels(bed, qemus, Some(SLOW), CHANNELS)?;
    let mut life = pair.boot(micro)?;
    for from in [At::A, At::B] {
        let command = pair.begin_migration(from, &[])?;
        let moved = || -> Result<Answer> {
            pair.in_pre_copy(from)?;
            uses_channels(&pair, from)?;
            command.end()?.expect(0)
        };
        let answer = moved().map_err(|error| pair.with_logs(error))?;
        pair.arrived(from.other(), &mut life)
            .map_err(|error| pair.with_logs(error))?;
        let count = |kind: &str| answer.number(&format!("/summary/traffic/{kind}-pages"));
        println!(
            "  {}: zero {}, disk {}, data {}, again {}",
            from.name(),
            count("zero")?,
            count("disk")?,
            count("data")?,
            count("resent")?
        );
        check(count("disk")? > 1000 && count("resent")? > 0, || {
            format!("The guest was not busy, or the disk not used: {answer}")
        })?;
    }
    Ok(())
}

fn one_breaks(bed: &Bed, qemus: Qemus) -> Result<()> {
    let pair = Pair::with_channels(bed, qemus, Some(SLOW), CHANNELS)?;
    let mut life = pair.boot(&busy(bed)?)?;
    let command = pair.begin_migration(At::A, &[])?;
    let failed = || -> Result<()> {
        pair.in_pre_copy(At::A)?;
        uses_channels(&pair, At::A)?;
        break_channel(pair.daemon(At::A).id())?;
        command.end()?.refused(4, &["runs on at hosta"]).map(drop)
    };
    failed().map_err(|error| pair.with_logs(error))?;
    pair.stayed(At::A, &mut life)?;
    pair.hosts.shape(Some(1000))?;
    pair.moves(At::A, &mut life).map(drop)
}

/// Shuts a daemon's last channel, as if the kernel had.
fn break_channel(daemon: i32) -> Result<()> {
    // Sockets that were accepted have the path of the one that listened.
    let sockets = fs::read_to_string(format!("/proc/{daemon}/net/unix"))
        .map_err(Error::system("read the list of sockets"))?;
    let accepted: Vec<&str> = sockets
        .lines()
        .filter(|line| line.ends_with("/stream.sock"))
        .filter_map(|line| line.split_whitespace().nth(6))
        .collect();
    let mut first = HashMap::new();
    let open = fs::read_dir(format!("/proc/{daemon}/fd"))
        .map_err(Error::system("list a daemon's descriptors"))?;
    for entry in open.flatten() {
        let Ok(target) = fs::read_link(entry.path()) else {
            continue;
        };
        let target = target.display().to_string();
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.parse::<RawFd>().ok());
        if let (Some(number), true) = (
            number,
            accepted
                .iter()
                .any(|inode| target == format!("socket:[{inode}]")),
        ) {
            let least = first.entry(target).or_insert(number);
            *least = number.min(*least);
        }
    }
    check(first.len() == usize::from(CHANNELS) + 1, || {
        format!("The daemon has not a stream and {CHANNELS} channels, but {first:?}")
    })?;
    // The stream came first.
    let last = first.into_values().max().unwrap_or(-1);
    let channel = UnixStream::from(copy_descriptor(daemon, last)?);
    channel
        .shutdown(Shutdown::Both)
        .map_err(Error::system("shut a socket"))
}

/// A copy of another process's descriptor.
fn copy_descriptor(process: i32, number: RawFd) -> Result<OwnedFd> {
    use nix::libc::{SYS_pidfd_getfd, SYS_pidfd_open, syscall};
    let made = |result: i64, what| -> Result<OwnedFd> {
        let number = RawFd::try_from(result).unwrap_or(-1);
        if number < 0 {
            return Err(Error::system(what)(std::io::Error::last_os_error()));
        }
        // SAFETY: the kernel has just made it for us, and nobody else knows it.
        Ok(unsafe { OwnedFd::from_raw_fd(number) })
    };
    // SAFETY: the call takes numbers alone.
    let process = unsafe { syscall(SYS_pidfd_open, process, 0) };
    let process = made(process, "open a process")?;
    let process = std::os::fd::AsRawFd::as_raw_fd(&process);
    // SAFETY: the same; `process` is open until the end of this function.
    let copy = unsafe { syscall(SYS_pidfd_getfd, process, number, 0) };
    made(copy, "copy a descriptor")
}
