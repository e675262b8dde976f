//! Writes to the memory of a guest whose QEMU waits for a migration, without a detour by its stream.
//!
//! QEMU says by `gpa2hva` where it has mapped a RAM block; `process_vm_writev(2)` puts pages there: one
//! copy instead of three, and none of it in QEMU's own thread. It needs the right to trace QEMU, which
//! root has unless the kernel takes it away (`kernel.yama.ptrace_scope` of 2 or 3).

use super::layout::Layout;
use super::{Error, Result, Vm};
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::unix::fs::FileExt;

/// Blocks smaller than this, in bytes, are left to the stream: firmware, tables, video memory.
const LEAST: u64 = 16 << 20;
/// Pieces in one call (`IOV_MAX` of Linux).
const MAX_PIECES: usize = 1024;

/// Where QEMU has a RAM block.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Mapping {
    block: String,
    /// The address of the block's first byte in QEMU.
    address: u64,
    /// In bytes.
    length: u64,
}

/// The memory of a guest that does not run.
#[derive(Debug)]
pub struct GuestMemory {
    pid: Pid,
    /// QEMU's `stat` in `/proc`, which cannot be read any more once that very process has ended.
    process: File,
    mappings: Vec<Mapping>,
}

impl GuestMemory {
    /// Finds the memory of a VM that waits for its stream.
    ///
    /// # Errors
    /// If QEMU does not say where it is, or the kernel does not let us there.
    pub async fn of(vm: &Vm) -> Result<Self> {
        let wrong = |cause: String| Error::Protocol(format!("the guest's memory: {cause}"));
        let number = vm
            .pid()
            .ok_or_else(|| wrong("QEMU's process is not known".to_owned()))?;
        let path = format!("/proc/{number}/stat");
        let process = File::open(&path).map_err(|error| Error::file("open", &path, error))?;
        let pid = Pid::from_raw(i32::try_from(number).map_err(|error| wrong(error.to_string()))?);
        let path = format!("/proc/{number}/maps");
        let maps =
            std::fs::read_to_string(&path).map_err(|error| Error::file("read", &path, error))?;
        let maps = writable(&maps);
        let layout = Layout::read(vm.qmp()).await?;
        let mut mappings: Vec<Mapping> = Vec::new();
        for region in layout.regions() {
            // What other blocks cover of main memory (firmware, video) is in the block all the same.
            let answer = vm.qmp().hmp(&format!("gpa2hva {}", region.start)).await?;
            let address = parse(&answer, &region.block)
                .and_then(|address| address.checked_sub(region.offset));
            let (Some(address), Some(end)) = (address, region.offset.checked_add(region.length))
            else {
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
        mappings.retain(|mapping| mapping.length >= LEAST && covers(&maps, mapping));
        let memory = Self {
            pid,
            process,
            mappings,
        };
        memory.probe().map_err(|error| {
            wrong(format!(
                "{error}; see kernel.yama.ptrace_scope and CAP_SYS_PTRACE"
            ))
        })?;
        Ok(memory)
    }

    /// The number by which [`GuestMemory::write`] knows a block of that name and length in bytes.
    pub fn block(&self, name: &str, length: u64) -> Option<usize> {
        self.mappings
            .iter()
            .position(|mapping| mapping.block == name && mapping.length == length)
    }

    /// Writes pieces to a block, each to its offset in bytes.
    ///
    /// # Errors
    /// If QEMU has ended, or a piece does not lie within the block.
    pub fn write(&self, block: usize, pieces: &[(u64, &[u8])]) -> io::Result<()> {
        let outside =
            || io::Error::new(io::ErrorKind::InvalidInput, "outside of the guest's memory");
        let mapping = self.mappings.get(block).ok_or_else(outside)?;
        for pieces in pieces.chunks(MAX_PIECES) {
            let mut local = Vec::with_capacity(pieces.len());
            let mut remote: Vec<RemoteIoVec> = Vec::with_capacity(pieces.len());
            let mut total = 0;
            for &(offset, piece) in pieces {
                let end = offset.checked_add(piece.len() as u64);
                if end.is_none_or(|end| end > mapping.length) {
                    return Err(outside());
                }
                let base = usize::try_from(mapping.address + offset).map_err(|_| outside())?;
                local.push(IoSlice::new(piece));
                match remote.last_mut() {
                    Some(last) if last.base + last.len == base => last.len += piece.len(),
                    _ => remote.push(RemoteIoVec {
                        base,
                        len: piece.len(),
                    }),
                }
                total += piece.len();
            }
            self.alive()?;
            if process_vm_writev(self.pid, &local, &remote)? != total {
                return Err(io::Error::other("QEMU's memory is not all there"));
            }
        }
        Ok(())
    }

    /// Its number could be another process's once it has ended.
    fn alive(&self) -> io::Result<()> {
        self.process.read_at(&mut [0; 16], 0).map(drop)
    }

    fn probe(&self) -> io::Result<()> {
        for mapping in &self.mappings {
            let mut byte = [0];
            let remote = RemoteIoVec {
                base: usize::try_from(mapping.address).unwrap_or(0),
                len: 1,
            };
            process_vm_readv(self.pid, &mut [IoSliceMut::new(&mut byte)], &[remote])?;
        }
        Ok(())
    }
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

    #[test]
    fn writes_to_a_process() {
        let mut target = vec![0_u8; 3 * 4096];
        let memory = GuestMemory {
            pid: nix::unistd::getpid(),
            process: File::open("/proc/self/stat").expect("proc"),
            mappings: vec![Mapping {
                block: "pc.ram".to_owned(),
                address: target.as_mut_ptr() as u64,
                length: target.len() as u64,
            }],
        };
        assert_eq!(memory.block("pc.ram", 3 * 4096), Some(0));
        assert_eq!(memory.block("pc.ram", 4096), None);
        let (one, two) = ([1; 4096], [2; 4096]);
        memory
            .write(0, &[(8192, &two), (0, &one)])
            .expect("written");
        assert_eq!((target[0], target[4096], target[8192]), (1, 0, 2));
        assert!(memory.write(0, &[(8193, &two)]).is_err());
        assert!(memory.write(1, &[(0, &two)]).is_err());
    }
}
