//! Reads one report from a guest's agent, stops the guest, and compares every reported page with
//! the guest's memory and its raw disks.
//!
//! ```text
//! check-report AGENT.sock QMP.sock MEMORY-FILE SERIAL=DISK.raw...
//! ```
//! The guest's memory must be a shared file (`memory-backend-file,share=on`) of at most 2 GiB, so
//! that a guest-physical address is an offset into it.

use std::error::Error;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;
use transhume_agent::compare::{compare, receive};

/// Stops the guest, so that its memory stands still.
fn stop(qmp: &str) -> Result<(), Box<dyn Error>> {
    let mut qmp = UnixStream::connect(qmp)?;
    let mut answers = BufReader::new(qmp.try_clone()?);
    let mut line = String::new();
    answers.read_line(&mut line)?;
    for command in ["qmp_capabilities", "stop"] {
        writeln!(qmp, "{{\"execute\":\"{command}\"}}")?;
        line.clear();
        while !line.contains("\"return\"") {
            line.clear();
            if answers.read_line(&mut line)? == 0 {
                return Err("QEMU closed its QMP socket".into());
            }
        }
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [agent, qmp, memory, disks @ ..] = &arguments[..] else {
        return Err("usage: check-report AGENT.sock QMP.sock MEMORY SERIAL=DISK...".into());
    };
    let memory = File::open(memory)?;
    let memory_len = memory.metadata()?.len();

    let mut channel = UnixStream::connect(agent)?;
    channel.set_read_timeout(Some(Duration::from_secs(1)))?;
    // The second report: the first also warms what it walks.
    let report = receive(&mut channel, 42, 2, Duration::from_secs(120))?;
    stop(qmp)?;

    println!(
        "source {:?}: {} pages in {} ranges, {} us of CPU time, {} bytes since hello",
        report.source,
        report.pages(),
        report.ranges.len(),
        report.cpu_us,
        report.bytes
    );
    for trouble in &report.troubles {
        println!("trouble: {trouble}");
    }
    for (number, disk) in &report.disks {
        println!("disk {number}: {disk:?}");
    }
    let mut differing = 0;
    let mut pages = 0;
    for argument in disks {
        let (serial, path) = argument.split_once('=').ok_or("a disk is SERIAL=PATH")?;
        let offset_of = |address: u64| (address < memory_len).then_some(address);
        let compared = compare(&report, serial, &memory, offset_of, &File::open(path)?)?;
        println!("{serial}: {compared:?}");
        differing += compared.differing;
        pages += compared.pages;
    }
    if differing > 0 || pages == 0 {
        return Err(format!("{differing} of {pages} pages differ").into());
    }
    Ok(())
}
