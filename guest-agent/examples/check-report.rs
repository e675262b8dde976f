//! Reads one report from a guest's agent, stops the guest, and compares every reported page with
//! the guest's memory and its raw disks.
//!
//! ```text
//! check-report AGENT.sock QMP.sock MEMORY-FILE SERIAL=DISK.raw...
//! ```
//! The guest's memory must be a shared file (`memory-backend-file,share=on`) of at most 2 GiB, so
//! that a guest-physical address is an offset into it.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use transhume_protocol::agent::{
    AgentMessage, Decoder, HostMessage, MAX_FRAME_LEN, Range, VERSION,
};

type Checked<T> = Result<T, Box<dyn Error>>;

/// One whole report.
#[derive(Default)]
struct Report {
    /// Serial and size in sectors, by number.
    disks: BTreeMap<u16, (String, u64)>,
    ranges: Vec<(u16, Range)>,
}

fn say(channel: &mut UnixStream, message: HostMessage) -> Checked<()> {
    let mut out = vec![0; MAX_FRAME_LEN];
    let length = message.encode(&mut out)?;
    channel.write_all(&out[..length])?;
    Ok(())
}

fn receive(channel: &mut UnixStream) -> Checked<Report> {
    channel.set_read_timeout(Some(Duration::from_secs(120)))?;
    say(
        channel,
        HostMessage::Hello {
            oldest: VERSION,
            newest: VERSION,
            session: 42,
        },
    )?;
    say(
        channel,
        HostMessage::ReportStart {
            interval_ms: 500,
            cpu_permille: 1000,
        },
    )?;
    let mut decoder = Decoder::new();
    let mut report = Report::default();
    let mut frames = 0_u64;
    let mut bytes = 0;
    let mut input = vec![0; 64 * 1024];
    let started = Instant::now();
    loop {
        let read = channel.read(&mut input)?;
        if read == 0 {
            return Err("the guest's port was closed".into());
        }
        bytes += read;
        let mut rest = &input[..read];
        while !rest.is_empty() {
            let taken = decoder.push(rest);
            rest = &rest[taken..];
            while let Some((kind, payload)) = decoder.next_frame() {
                frames += 1;
                match AgentMessage::decode(kind, payload)? {
                    AgentMessage::Hello { source, agent, .. } => {
                        println!("hello from {agent}, source {source:?}");
                    }
                    AgentMessage::Disk {
                        index,
                        sectors,
                        serial,
                        name,
                    } => {
                        println!("disk {index}: {name}, serial {serial:?}, {sectors} sectors");
                        report.disks.insert(index, (serial.to_owned(), sectors));
                    }
                    AgentMessage::EpochBegin { .. } => report.ranges.clear(),
                    AgentMessage::Ranges(ranges) => {
                        for range in ranges.iter(8) {
                            report.ranges.push((ranges.disk, range?));
                        }
                    }
                    AgentMessage::EpochEnd {
                        epoch,
                        pages,
                        cpu_us,
                    } => {
                        println!(
                            "epoch {epoch}: {pages} pages in {} ranges, {cpu_us} us of CPU time, \
                             {frames} frames, {bytes} bytes, {:?} since hello, {} bytes skipped",
                            report.ranges.len(),
                            started.elapsed(),
                            decoder.skipped()
                        );
                        if epoch >= 2 {
                            say(channel, HostMessage::ReportStop)?;
                            return Ok(report);
                        }
                    }
                    AgentMessage::Trouble { text } => println!("trouble: {text}"),
                }
            }
        }
    }
}

/// Stops the guest, so that its memory stands still.
fn stop(qmp: &str) -> Checked<()> {
    let mut qmp = UnixStream::connect(qmp)?;
    let mut answers = BufReader::new(qmp.try_clone()?);
    let mut line = String::new();
    answers.read_line(&mut line)?;
    for command in ["qmp_capabilities", "stop"] {
        writeln!(qmp, "{{\"execute\":\"{command}\"}}")?;
        line.clear();
        while !line.contains("\"return\"") {
            line.clear();
            answers.read_line(&mut line)?;
        }
    }
    Ok(())
}

fn main() -> Checked<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [agent, qmp, memory, disks @ ..] = &arguments[..] else {
        return Err("usage: check-report AGENT.sock QMP.sock MEMORY SERIAL=DISK...".into());
    };
    let mut files = BTreeMap::new();
    for disk in disks {
        let (serial, path) = disk.split_once('=').ok_or("a disk is SERIAL=PATH")?;
        files.insert(serial.to_owned(), File::open(path)?);
    }
    let memory = File::open(memory)?;
    let report = receive(&mut UnixStream::connect(agent)?)?;
    stop(qmp)?;

    let mut wrong = 0_u64;
    let mut seen = BTreeMap::new();
    for (number, (serial, sectors)) in &report.disks {
        let Some(file) = files.get(serial) else {
            continue;
        };
        if file.metadata()?.len() != sectors * 512 {
            return Err(format!("{serial} has another size than the guest says").into());
        }
        let (mut pages, mut bad, mut zero) = (0_u64, 0_u64, 0_u64);
        for (_, range) in report.ranges.iter().filter(|(disk, _)| disk == number) {
            for page in 0..u64::from(range.pages) {
                let (mut ours, mut theirs) = (vec![0; 4096], vec![0; 4096]);
                memory.read_exact_at(&mut ours, (range.pfn + page) * 4096)?;
                file.read_exact_at(&mut theirs, range.sector * 512 + page * 4096)?;
                pages += 1;
                zero += u64::from(ours.iter().all(|&byte| byte == 0));
                if ours != theirs {
                    bad += 1;
                    if bad <= 5 {
                        println!("{serial}: pfn {:#x} differs", range.pfn + page);
                    }
                }
                *seen.entry(range.pfn + page).or_insert(0_u32) += 1;
            }
        }
        wrong += bad;
        println!("{serial}: {pages} pages compared, {bad} differ, {zero} of them all zero");
    }
    let twice = seen.values().filter(|&&times| times > 1).count();
    println!("{} page frames in all, {twice} reported twice", seen.len());
    if wrong > 0 || seen.is_empty() {
        return Err(format!("{wrong} of {} pages are wrong", seen.len()).into());
    }
    Ok(())
}
