//! Writes to the memory of a guest that does not run, in its hypervisor's process.
//!
//! `process_vm_writev(2)` puts pages there: one copy instead of three, and none of it in the hypervisor's own thread. It
//! needs the right to trace that process, which root has unless the kernel takes it away
//! (`kernel.yama.ptrace_scope` of 2 or 3).

use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::unix::fs::FileExt;

/// Pieces in one call (`IOV_MAX` of Linux).
const MAX_PIECES: usize = 1024;

/// Where a process has a block of a guest's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    /// Its name.
    pub block: String,
    /// The address of the block's first byte in it.
    pub address: u64,
    /// In bytes.
    pub length: u64,
}

/// The memory of a guest that does not run.
#[derive(Debug)]
pub struct GuestMemory {
    pid: Pid,
    /// The process's `stat` in `/proc`, which cannot be read any more once that very process has ended.
    process: File,
    mappings: Vec<Mapping>,
}

impl GuestMemory {
    /// That of a process, whose `stat` in `/proc` is open.
    pub fn new(pid: Pid, process: File, mappings: Vec<Mapping>) -> Self {
        Self {
            pid,
            process,
            mappings,
        }
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

    /// Tries whether the kernel lets us there.
    ///
    /// # Errors
    /// If it does not.
    pub fn probe(&self) -> io::Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;

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
