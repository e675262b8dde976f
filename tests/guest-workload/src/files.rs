//! The files whose pages fill the page cache.

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use xxhash_rust::xxh64::xxh64;

/// What one request reads, in bytes.
const PIECE: usize = 128 * 1024;

/// One piece of a file, and what it was when first read.
#[derive(Debug)]
struct Piece {
    file: u32,
    length: u32,
    offset: u64,
    digest: u64,
}

/// The files that were read.
#[derive(Debug)]
pub(crate) struct Files {
    paths: Vec<PathBuf>,
    pieces: Vec<Piece>,
    bytes: u64,
}

impl Files {
    /// Reads the files below a folder, in their order by name, until `size` bytes of pages are cached.
    pub(crate) fn warm(folder: &Path, size: u64) -> Result<Self, String> {
        let mut files = Self {
            paths: Vec::new(),
            pieces: Vec::new(),
            bytes: 0,
        };
        let mut buffer = vec![0; PIECE];
        files.warm_folder(folder, size, &mut buffer)?;
        if files.bytes < size {
            return Err(format!(
                "the disks hold {} bytes of files, fewer than {size}",
                files.bytes
            ));
        }
        Ok(files)
    }

    fn warm_folder(&mut self, folder: &Path, size: u64, buffer: &mut [u8]) -> Result<(), String> {
        let failed = |error: std::io::Error| format!("cannot read {}: {error}", folder.display());
        let mut entries: Vec<_> = std::fs::read_dir(folder)
            .map_err(failed)?
            .collect::<Result<_, _>>()
            .map_err(failed)?;
        entries.sort_by_key(std::fs::DirEntry::file_name);
        for entry in entries {
            if self.bytes >= size {
                return Ok(());
            }
            let kind = entry.file_type().map_err(failed)?;
            if kind.is_dir() {
                self.warm_folder(&entry.path(), size, buffer)?;
            } else if kind.is_file() {
                self.warm_file(entry.path(), size, buffer)?;
            }
        }
        Ok(())
    }

    fn warm_file(&mut self, path: PathBuf, size: u64, buffer: &mut [u8]) -> Result<(), String> {
        let failed = |error: std::io::Error| format!("cannot read {}: {error}", path.display());
        let file = File::open(&path).map_err(failed)?;
        let number = u32::try_from(self.paths.len()).map_err(|_| "too many files")?;
        let mut offset = 0;
        while self.bytes < size {
            let length = read_full(&file, buffer, offset).map_err(failed)?;
            if length == 0 {
                break;
            }
            self.pieces.push(Piece {
                file: number,
                length: u32::try_from(length).map_err(|_| "a piece is too long")?,
                offset,
                digest: xxh64(&buffer[..length], 0),
            });
            offset += length as u64;
            self.bytes += (length as u64).next_multiple_of(4096);
        }
        self.paths.push(path);
        Ok(())
    }

    pub(crate) fn count(&self) -> usize {
        self.paths.len()
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Has the kernel drop one file after the other from its cache and read it anew, so many bytes a second, none at
    /// a rate of 0: the cache stays warm, and its memory is written.
    pub(crate) fn renew(&self, rate: &AtomicU64) {
        const PAUSE: Duration = Duration::from_millis(20);
        let mut next = 0;
        loop {
            let path = self.paths.get(next).or_else(|| self.paths.first());
            let (rate, Some(path)) = (rate.load(Ordering::Relaxed), path) else {
                return;
            };
            if rate == 0 {
                std::thread::sleep(PAUSE);
                continue;
            }
            next = (next + 1) % self.paths.len().max(1);
            let Ok(file) = File::open(path) else { continue };
            let length = file.metadata().map_or(0, |data| data.len());
            for advice in [
                PosixFadviseAdvice::POSIX_FADV_DONTNEED,
                PosixFadviseAdvice::POSIX_FADV_WILLNEED,
            ] {
                // The kernel need not follow; then the cache is only older.
                let _ = posix_fadvise(&file, 0, 0, advice);
            }
            std::thread::sleep(Duration::from_micros(length * 1_000_000 / rate));
        }
    }

    /// Reads one piece of the caller's choice and compares it.
    pub(crate) fn check_piece(&self, choice: u64, buffer: &mut Vec<u8>) -> Result<(), String> {
        let count = self.pieces.len().max(1) as u64;
        let piece = usize::try_from(choice % count)
            .ok()
            .and_then(|index| self.pieces.get(index));
        let Some(piece) = piece else { return Ok(()) };
        let path = &self.paths[piece.file as usize];
        buffer.resize(PIECE, 0);
        let length = piece.length as usize;
        let read =
            File::open(path).and_then(|file| read_full(&file, &mut buffer[..length], piece.offset));
        let place = || format!("{} at {}", path.display(), piece.offset);
        match read {
            Err(error) => Err(format!("cannot read {}: {error}", place())),
            Ok(read) if read != length => Err(format!("{} is shorter than it was", place())),
            Ok(_) if xxh64(&buffer[..length], 0) != piece.digest => {
                Err(format!("{} is not what it was", place()))
            }
            Ok(_) => Ok(()),
        }
    }

    /// Compares every piece; says how many there are.
    pub(crate) fn check_all(&self) -> Result<usize, String> {
        let mut buffer = Vec::new();
        for index in 0..self.pieces.len() {
            self.check_piece(index as u64, &mut buffer)?;
        }
        Ok(self.pieces.len())
    }
}

fn read_full(file: &File, buffer: &mut [u8], offset: u64) -> std::io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], offset + done as u64)? {
            0 => break,
            read => done += read,
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_byte_is_found() {
        let folder = std::env::temp_dir().join(format!("guest-workload-{}", std::process::id()));
        std::fs::create_dir_all(folder.join("sub")).expect("a folder");
        let path = folder.join("sub/file");
        let mut content = vec![7_u8; PIECE + 5000];
        std::fs::write(&path, &content).expect("a file");
        let files = Files::warm(&folder, 4096).expect("files");
        assert_eq!(files.check_all(), Ok(1));
        let whole = Files::warm(&folder, (PIECE + 8192) as u64).expect("files");
        assert_eq!(whole.check_all(), Ok(2));
        content[PIECE + 1] ^= 1;
        std::fs::write(&path, &content).expect("a file");
        assert_eq!(files.check_all(), Ok(1));
        assert!(whole.check_all().is_err());
        std::fs::remove_dir_all(&folder).expect("removed");
    }
}
