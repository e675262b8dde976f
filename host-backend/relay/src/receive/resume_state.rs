//! What must be known of a VM in post-copy to resume it, also after this process: the table of RAM blocks,
//! which a resumed stream does not have, and which pages QEMU forgot at the switch.
//!
//! A page is missing if it was forgotten and has not been received since, which QEMU itself knows
//! (`receivedmap` in its `include/exec/ramblock.h`). QEMU's word alone is not enough: it does not know
//! what was written straight into its memory before the switch.
//!
//! The file, in the VM's run directory, is a line of JSON, and a bitmap a block in 64-bit words of low
//! bytes first. It is there before the VM may run here.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use transhume_protocol::link::MAX_BLOCKS;
use transhume_protocol::memory::Block;

use transhume_base::{bounded, durable};
use transhume_pages::PAGE_SIZE;
use transhume_pages::bitmap::Bitmap;

const NAME: &str = "post-copy";
/// The version of the file that is written.
const VERSION: u32 = 1;
/// The file's length, at most: pages of 64 TiB of memory.
const LENGTH: u64 = (2 << 30) + (1 << 20);

/// See the module.
#[derive(Debug, Clone)]
pub(crate) struct ResumeState {
    /// Number of QEMU's RAM section.
    pub(crate) section: u32,
    pub(crate) blocks: Vec<Block>,
    /// A bitmap a block.
    pub(crate) pages: Vec<Bitmap>,
}

#[derive(Serialize, Deserialize)]
struct Head {
    #[serde(default)]
    version: u32,
    job: u64,
    from: String,
    section: u32,
    blocks: Vec<(String, u64)>,
}

fn path(folder: &Path) -> PathBuf {
    folder.join(NAME)
}

/// Removes the file, if it is there.
pub(crate) fn remove(folder: &Path) -> io::Result<()> {
    durable::remove(&path(folder))
}

impl ResumeState {
    /// Writes the file for a migration from the host `from`. It is on disk when this returns.
    pub(crate) fn write(&self, folder: &Path, job: u64, from: &str) -> io::Result<()> {
        let head = Head {
            version: VERSION,
            job,
            from: from.to_owned(),
            section: self.section,
            blocks: self
                .blocks
                .iter()
                .map(|block| (block.name.clone(), block.length))
                .collect(),
        };
        let mut bytes = serde_json::to_vec(&head)?;
        bytes.push(b'\n');
        for pages in &self.pages {
            pages.write(&mut bytes);
        }
        durable::conclude(&path(folder), &bytes)
    }

    /// Reads the file of a migration: it, and the host that the VM came from.
    pub(crate) fn read(folder: &Path, job: u64) -> io::Result<(Self, String)> {
        let bytes = bounded::read(&path(folder), LENGTH)?;
        Self::decode(&bytes, job).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidData,
                "it is damaged, another migration's, or of a newer version",
            )
        })
    }

    fn decode(bytes: &[u8], job: u64) -> Option<(Self, String)> {
        let end = bytes.iter().position(|byte| *byte == b'\n')?;
        let (head, mut rest) = bytes.split_at_checked(end + 1)?;
        let head: Head = serde_json::from_slice(head).ok()?;
        if head.version > VERSION || head.job != job || head.blocks.len() > MAX_BLOCKS {
            return None;
        }
        let mut pages = Vec::new();
        for (_, length) in &head.blocks {
            let bits = length / PAGE_SIZE as u64;
            let bytes = usize::try_from(bits.div_ceil(64).checked_mul(8)?).ok()?;
            let (words, more) = rest.split_at_checked(bytes)?;
            pages.push(Bitmap::read(bits, words));
            rest = more;
        }
        let blocks = head.blocks.into_iter();
        let forgotten = Self {
            section: head.section,
            blocks: blocks
                .map(|(name, length)| Block { name, length })
                .collect(),
            pages,
        };
        rest.is_empty().then_some((forgotten, head.from))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let block = |name: &str, pages: u64| Block {
            name: name.to_owned(),
            length: pages * PAGE_SIZE as u64,
        };
        let mut pages = vec![Bitmap::new(130), Bitmap::new(3)];
        for page in [0, 64, 129] {
            pages[0].insert(page);
        }
        pages[1].insert(2);
        let forgotten = ResumeState {
            section: 4,
            blocks: vec![block("pc.ram", 130), block("vga", 3)],
            pages,
        };
        forgotten.write(folder.path(), 7, "hosta").unwrap();
        let (read, from) = ResumeState::read(folder.path(), 7).unwrap();
        assert_eq!((from.as_str(), read.section), ("hosta", 4));
        assert_eq!(read.blocks, forgotten.blocks);
        for (one, other) in read.pages.iter().zip(&forgotten.pages) {
            assert!((0..200).all(|page| one.contains(page) == other.contains(page)));
        }
        assert!(ResumeState::read(folder.path(), 8).is_err());

        let file = path(folder.path());
        let whole = std::fs::read(&file).unwrap();
        for cut in 0..whole.len() {
            assert!(ResumeState::decode(&whole[..cut], 7).is_none(), "{cut}");
        }
        remove(folder.path()).unwrap();
        remove(folder.path()).unwrap();
        assert!(!file.exists());
    }
}
