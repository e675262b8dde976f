//! Finds where a QEMU that waits for a migration has its guest's memory.
//!
//! QEMU says by `gpa2hva` where it has mapped a RAM block.

use super::layout::Layout;
use super::{Error, Result, Vm};
use nix::unistd::Pid;
use std::fs::File;
use transhume_base::process_memory::{GuestMemory, Mapping};

/// Blocks smaller than this, in bytes, are left to the stream: firmware, tables, video memory.
const MINIMUM: u64 = 16 << 20;

/// Finds the memory of a VM that waits for its stream.
///
/// # Errors
/// If QEMU does not say where it is, or the kernel does not let us there.
pub async fn guest_memory(vm: &Vm) -> Result<GuestMemory> {
    let wrong = |cause: String| Error::Protocol(format!("the guest's memory: {cause}"));
    let number = vm
        .pid()
        .ok_or_else(|| wrong("QEMU's process is not known".to_owned()))?;
    let path = format!("/proc/{number}/stat");
    let process = File::open(&path).map_err(|error| Error::file("open", &path, error))?;
    let pid = Pid::from_raw(i32::try_from(number).map_err(|error| wrong(error.to_string()))?);
    let path = format!("/proc/{number}/maps");
    let maps = std::fs::read_to_string(&path).map_err(|error| Error::file("read", &path, error))?;
    let maps = writable(&maps);
    let layout = Layout::read(vm.qmp()).await?;
    let mut mappings: Vec<Mapping> = Vec::new();
    for region in layout.regions() {
        // What other blocks cover of main memory (firmware, video) is in the block all the same.
        let answer = vm.qmp().hmp(&format!("gpa2hva {}", region.start)).await?;
        let address =
            parse(&answer, &region.block).and_then(|address| address.checked_sub(region.offset));
        let (Some(address), Some(end)) = (address, region.offset.checked_add(region.length)) else {
            return Err(wrong(format!("gpa2hva {}: {answer}", region.start)));
        };
        match mappings
            .iter_mut()
            .find(|mapping| mapping.block == region.block)
        {
            Some(mapping) if mapping.address == address => {
                mapping.length = mapping.length.max(end);
            }
            Some(_) => return Err(wrong(format!("{} is not in one piece", region.block))),
            None => mappings.push(Mapping {
                block: region.block.clone(),
                address,
                length: end,
            }),
        }
    }
    mappings.retain(|mapping| mapping.length >= MINIMUM && covers(&maps, mapping));
    let memory = GuestMemory::new(pid, process, mappings);
    memory.probe().map_err(|error| {
        wrong(format!(
            "{error}; see kernel.yama.ptrace_scope and CAP_SYS_PTRACE"
        ))
    })?;
    Ok(memory)
}

/// Reads the answer to `gpa2hva`.
fn parse(answer: &str, block: &str) -> Option<u64> {
    let (head, address) = answer.trim().rsplit_once(" is 0x")?;
    let name = head.split_once('(')?.1.strip_suffix(')')?;
    (name == block)
        .then(|| u64::from_str_radix(address, 16).ok())
        .flatten()
}

/// The writable, private mappings in `/proc/PID/maps`, those that touch joined.
fn writable(maps: &str) -> Vec<(u64, u64)> {
    let mut joined: Vec<(u64, u64)> = Vec::new();
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (Some(range), Some(rights)) = (words.next(), words.next()) else {
            continue;
        };
        let hex = |text: &str| u64::from_str_radix(text, 16).ok();
        let bounds = range
            .split_once('-')
            .and_then(|(start, end)| Some((hex(start)?, hex(end)?)));
        let Some((start, end)) = bounds.filter(|_| rights.starts_with("rw")) else {
            continue;
        };
        match joined.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => joined.push((start, end)),
        }
    }
    joined
}

fn covers(maps: &[(u64, u64)], mapping: &Mapping) -> bool {
    mapping
        .address
        .checked_add(mapping.length)
        .is_some_and(|end| {
            maps.iter()
                .any(|&(start, stop)| start <= mapping.address && end <= stop)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_qemu_says() {
        let answer = "Host virtual address for 0x100000000 (pc.ram) is 0x7fee4fe00000\r\n";
        assert_eq!(parse(answer, "pc.ram"), Some(0x7fee_4fe0_0000));
        assert_eq!(parse(answer, "pc.rom"), None);
        for answer in ["", "Memory at address 0x0 is not RAM", "x (pc.ram) is 0xzz"] {
            assert_eq!(parse(answer, "pc.ram"), None);
        }
    }

    #[test]
    fn joins_mappings() {
        let maps = "1000-3000 rw-p 0 0:0 0\n3000-4000 rw-p 0 0:0 0\n4000-5000 r--p 0 0:0 0\nbad\n";
        let maps = writable(maps);
        assert_eq!(maps, [(0x1000, 0x4000)]);
        let mapping = |address, length| Mapping {
            block: String::new(),
            address,
            length,
        };
        assert!(covers(&maps, &mapping(0x1000, 0x3000)));
        assert!(!covers(&maps, &mapping(0x1000, 0x3001)));
        assert!(!covers(&maps, &mapping(0x1000, u64::MAX)));
    }
}
