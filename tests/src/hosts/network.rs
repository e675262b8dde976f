//! Namespaces and the link between them, by iproute2.

use super::Rate;
use crate::command::Run;
use crate::{Error, Result};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::File;
use std::path::PathBuf;
use std::process::Command;

/// From the range set aside for benchmarks (RFC 2544); nothing leaves the namespaces.
pub(super) const ADDRESS_A: &str = "198.18.0.1";
/// The other end.
pub(super) const ADDRESS_B: &str = "198.18.0.2";
const DEVICE: &str = "eth0";

const CURE: &str = "The test bed needs root, network namespaces, veth and the qdisc tbf; in a container, run it privileged";

pub(super) fn ip(arguments: &str) -> Result<()> {
    Run::new("ip")
        .args(arguments.split_whitespace())
        .cure(CURE)
        .output()
        .map(drop)
}

/// The file that stands for a namespace.
pub(super) fn path(namespace: &str) -> PathBuf {
    PathBuf::from("/run/netns").join(namespace)
}

/// Does something in a namespace, on a thread of its own.
pub(super) fn inside<T: Send>(namespace: &str, work: impl FnOnce() -> T + Send) -> Result<T> {
    let path = path(namespace);
    let namespace = File::open(&path).map_err(Error::file("open", &path))?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            setns(namespace, CloneFlags::CLONE_NEWNET)
                .map_err(Error::system("enter a namespace"))?;
            Ok(work())
        });
        thread
            .join()
            .unwrap_or_else(|_| Err(Error::Check("A thread failed".into())))
    })
}

/// Makes a namespace with a loopback device.
pub(super) fn create(namespace: &str) -> Result<()> {
    ip(&format!("netns add {namespace}"))?;
    ip(&format!("-n {namespace} link set lo up"))
}

/// The processes in a namespace, threads' own namespaces aside.
pub(super) fn processes(namespace: &str) -> Vec<i32> {
    let output = Command::new("ip")
        .args(["netns", "pids", namespace])
        .output();
    let text = output.map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&text)
        .lines()
        .filter_map(|line| line.trim().parse().ok())
        .collect()
}

/// Ends what runs in a namespace, and removes it.
pub(super) fn delete(namespace: &str) {
    for process in processes(namespace) {
        // It may have ended meanwhile.
        let _ = kill(Pid::from_raw(process), Signal::SIGKILL);
    }
    let _ = Command::new("ip")
        .args(["netns", "delete", namespace])
        .output();
}

/// Joins two namespaces. Neither end is ever in this machine's own.
pub(super) fn join(a: &str, b: &str) -> Result<()> {
    ip(&format!(
        "link add {DEVICE} netns {a} type veth peer name {DEVICE} netns {b}"
    ))?;
    for (namespace, address) in [(a, ADDRESS_A), (b, ADDRESS_B)] {
        give(namespace, address)?;
    }
    Ok(())
}

/// Joins each of two namespaces with a third, and says what the ends there are called.
pub(super) fn join_through(a: &str, b: &str, between: &str) -> Result<[&'static str; 2]> {
    let ends = ["wire0", "wire1"];
    for ((namespace, address), end) in [(a, ADDRESS_A), (b, ADDRESS_B)].into_iter().zip(ends) {
        ip(&format!(
            "link add {DEVICE} netns {namespace} type veth peer name {end} netns {between}"
        ))?;
        give(namespace, address)?;
        ip(&format!("-n {between} link set {end} up"))?;
    }
    Ok(ends)
}

fn give(namespace: &str, address: &str) -> Result<()> {
    ip(&format!(
        "-n {namespace} address add {address}/30 dev {DEVICE}"
    ))?;
    ip(&format!("-n {namespace} link set {DEVICE} up"))
}

/// A token bucket of 4 ms at the rate, so that 64 KiB segments pass, and a queue of 20 ms: with these
/// one TCP connection reaches all of what is left of 1 Gbit/s after headers.
pub(super) fn shape(namespace: &str, rate: Rate) -> Result<()> {
    let tc = || Run::new("tc").args(["-n", namespace, "qdisc"]).cure(CURE);
    let Some(rate) = rate else {
        // None there is what is wanted.
        let _ = tc().args(["delete", "dev", DEVICE, "root"]).finish()?;
        return Ok(());
    };
    let burst = (u64::from(rate) * 1_000_000 / 8 * 4 / 1000).max(128 * 1024);
    tc().args([
        "replace",
        "dev",
        DEVICE,
        "root",
        "tbf",
        "rate",
        &format!("{rate}mbit"),
    ])
    .args(["burst", &burst.to_string(), "latency", "20ms"])
    .output()
    .map(drop)
}

/// Takes an end of the link down or up.
pub(super) fn set_link(namespace: &str, up: bool) -> Result<()> {
    ip(&format!(
        "-n {namespace} link set {DEVICE} {}",
        if up { "up" } else { "down" }
    ))
}

/// Breaks every connection of a namespace, as a reset from the network does (`sock_diag(7)`).
pub(super) fn reset_connections(namespace: &str) -> Result<()> {
    Run::new("ss")
        .args(["-N", namespace, "-K", "dst", "198.18.0.0/30"])
        .cure("It needs iproute2 and a kernel with CONFIG_INET_DIAG_DESTROY, as Debian's")
        .output()
        .map(drop)
}
