//! What hosts tell each other to find out whether what each of them has for a disk is the same storage.
//!
//! A disk is one or more files or devices, its *nodes*: the one that the definition names, and what that is based
//! on. Each host does something to its nodes that the other one can see only if they are the same, and the source
//! compares what both read. Nothing of it touches the guest's data.

use super::{Digest, PAGE_LEN};
use serde::{Deserialize, Serialize};

/// Bytes in a block, the unit of comparing.
pub const COMPARED_BLOCK: usize = PAGE_LEN;
/// Nodes of one disk, at most.
pub const MAX_NODES: usize = 33;
/// Blocks that one [`Comparison`] may be of, at most: 64 MiB.
pub const MAX_PLACES: usize = 16 << 10;
/// Identifiers of one node, at most, and bytes in a text about a node.
pub const MAX_IDENTIFIERS: usize = 32;
/// See [`MAX_IDENTIFIERS`].
pub const MAX_STORAGE_TEXT: usize = 512;

/// By what the signs of one host on its storage are known: its locks and its marks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signs {
    /// Random, of that host's choice.
    pub nonce: [u8; 16],
    /// When they were made, in seconds since 1970 by that host's clock.
    pub made: u64,
}

/// What the destination says of its storage.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StorageHere {
    /// Its own signs, which the source looks for.
    pub signs: Signs,
    /// The kernel that it runs by: a random number of its boot.
    pub boot: String,
    /// The nodes of each disk, in the order of the definition; in a disk, the uppermost first.
    pub disks: Vec<Vec<NodeHere>>,
}

/// A file or device of a disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeHere {
    /// Its path, for people.
    pub path: String,
    /// Whether it is a block device.
    pub is_device: bool,
    /// A file: the number of its file system. A device: its own number.
    pub device: u64,
    /// Its inode.
    pub inode: u64,
    /// Its length in bytes.
    pub length: u64,
    /// A file: the kind of its file system, as `statfs` numbers it.
    pub file_system: u64,
    /// A file: the file system's kind and source, for people.
    pub mounted: String,
    /// A device: what identifies it in the whole world.
    pub identifiers: Vec<String>,
    /// Whether the source's lock on it is seen.
    pub sees_lock: bool,
    /// Whether the source's mark beside it is seen.
    pub sees_mark: bool,
}

/// Blocks of nodes that both hosts are to read.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Comparison {
    /// Number of the question, which its answer has too.
    pub number: u32,
    /// What is to be read.
    pub samples: Vec<Sample>,
}

/// Blocks of one node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// Number of the disk in the definition.
    pub disk: u16,
    /// Number of the node in the disk.
    pub node: u16,
    /// Blocks that the node has at both hosts; no place lies behind them.
    pub blocks: u64,
    /// So many places are drawn from both hosts' nonces.
    pub drawn: u16,
    /// Further places, as numbers of blocks.
    pub places: Vec<u64>,
}

/// What was read.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compared {
    /// Number of the question.
    pub number: u32,
    /// For each sample a digest a place, under a key of both nonces: first [`Sample::places`], then those that were
    /// drawn. Nothing where the block cannot be read.
    pub digests: Vec<Vec<Option<Digest>>>,
}

impl Comparison {
    /// Blocks that it is of.
    pub fn places(&self) -> usize {
        let of = |sample: &Sample| sample.places.len() + usize::from(sample.drawn);
        self.samples.iter().map(of).fold(0, usize::saturating_add)
    }
}

impl StorageHere {
    /// Whether it stays within the bounds.
    pub fn is_bounded(&self) -> bool {
        let short = |text: &String| text.len() <= MAX_STORAGE_TEXT;
        let node = |node: &NodeHere| {
            short(&node.mounted)
                && node.path.len() <= 4096
                && node.identifiers.len() <= MAX_IDENTIFIERS
                && node.identifiers.iter().all(short)
        };
        short(&self.boot)
            && self
                .disks
                .iter()
                .all(|nodes| nodes.len() <= MAX_NODES && nodes.iter().all(node))
    }
}
