//! Which blocks are compared: some that neither host can foretell, and those where a disk's recent past shows.

use super::drawn::Drawn;
use super::node::Node;
use super::structure;
use super::{Proof, Storage};
use crate::AlignedBuffer;
use nix::unistd::{Whence, lseek64};
use transhume_machine::definition::Format;
use transhume_protocol::link::{COMPARED_BLOCK, Sample, StorageHere};

const BLOCK: u64 = COMPARED_BLOCK as u64;

/// How many blocks of a node are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Care {
    /// It is proven to be the same: for the case that a proof is worth less than it seems.
    Proven,
    /// It is not.
    Unproven,
    /// Something does not fit together.
    Doubt,
}

impl Care {
    fn drawn(self) -> u16 {
        match self {
            Self::Proven => 48,
            Self::Unproven => 384,
            Self::Doubt => 768,
        }
    }
}

/// What is to be compared of all disks, by how well each node is proven to be the same. Reads the disks' structure.
pub fn samples(
    here: &Storage,
    there: &StorageHere,
    key: &[u8; 16],
    care: impl Fn(u16, u16) -> Option<Care>,
) -> Vec<Sample> {
    let mut samples = Vec::new();
    for (disk, number) in here.disks().iter().zip(0_u16..) {
        for (node, at) in disk.nodes.iter().zip(0_u16..) {
            let theirs = there
                .disks
                .get(usize::from(number))
                .and_then(|nodes| nodes.get(usize::from(at)));
            let (Some(theirs), Some(care)) = (theirs, care(number, at)) else {
                continue;
            };
            let format = if at == 0 { disk.format } else { Format::Raw };
            samples.push(of_node(node, number, at, theirs.length, format, key, care));
        }
    }
    samples
}

fn of_node(
    node: &Node,
    disk: u16,
    at: u16,
    theirs: u64,
    format: Format,
    key: &[u8; 16],
    care: Care,
) -> Sample {
    use crate::Reader as _;
    let length = node.reader.size().min(theirs);
    let blocks = length / BLOCK;
    let mut buffer = AlignedBuffer::allocate(COMPARED_BLOCK).ok();
    let read = |place: u64| {
        node.block(place, buffer.as_mut()?)
            .map(|block| Box::new(*block))
    };
    let mut places = match format {
        Format::Raw => structure::of_raw(length, read),
        Format::Qcow2 => structure::of_qcow2(length, read),
    };
    places.extend(data(
        node,
        length,
        Drawn::new(key, u64::from(disk) << 32 | u64::from(at) << 16),
        care.drawn(),
    ));
    places.retain(|&place| place < blocks);
    Sample {
        disk,
        node: at,
        blocks,
        drawn: care.drawn(),
        places,
    }
}

/// Blocks that are not within holes, of a file that has some: most of a thin disk is nothing.
fn data(node: &Node, length: u64, mut drawn: Drawn, count: u16) -> Vec<u64> {
    let mut places = Vec::new();
    if length == 0 {
        return places;
    }
    for _ in 0..count {
        let Ok(from) = i64::try_from(drawn.below(length)) else {
            return places;
        };
        let Ok(begin) = lseek64(&node.reader.file, from, Whence::SeekData) else {
            continue;
        };
        let Ok(end) = lseek64(&node.reader.file, begin, Whence::SeekHole) else {
            return places;
        };
        let (begin, end) = (begin.cast_unsigned(), end.cast_unsigned().min(length));
        if begin < end {
            places.push((begin + drawn.below(end - begin)) / BLOCK);
        }
    }
    places
}

impl Care {
    /// For a node with that proof.
    pub fn of(proof: &Proof) -> Self {
        match proof {
            Proof::Same(_) => Self::Proven,
            Proof::Unproven(_) => Self::Unproven,
        }
    }
}
