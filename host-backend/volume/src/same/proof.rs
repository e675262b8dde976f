//! What proves that two hosts have the same node, and what does not; see `docs/storage.md`.

use transhume_protocol::link::{NodeHere, StorageHere};

/// File systems of one host alone, by the numbers of linux/magic.h: two hosts that mount one see nothing of each
/// other's writes, and destroy it.
const LOCAL: [u64; 15] = [
    0xef53,      // ext2, ext3, ext4
    0x5846_5342, // XFS
    0x9123_683e, // btrfs
    0xf2f5_2010, // F2FS
    0x0102_1994, // tmpfs
    0x8584_58f6, // ramfs
    0x2fc1_2fc1, // ZFS
    0xca45_1a4e, // bcachefs
    0x794c_7630, // overlayfs
    0x3153_464a, // JFS
    0x5265_4973, // ReiserFS
    0x4d44,      // FAT
    0x2011_bab0, // exFAT
    0x7366_746e, // NTFS
    0x5346_544e, // NTFS, the older driver
];

/// How well it is known that a node of both hosts is the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Proof {
    /// It is, by this.
    Same(String),
    /// It may be another one; why that is not excluded.
    Unproven(String),
}

impl Proof {
    /// Whether it is one.
    pub fn is_given(&self) -> bool {
        matches!(self, Self::Same(_))
    }
}

fn same(how: impl Into<String>) -> Proof {
    Proof::Same(how.into())
}

fn unproven(why: impl Into<String>) -> Proof {
    Proof::Unproven(why.into())
}

/// Judges a node by what both hosts say of it.
pub fn prove(here: &NodeHere, there: &NodeHere, one_kernel: bool) -> Proof {
    if here.is_device != there.is_device {
        return unproven("it is a block device on one host, and a file on the other");
    }
    if one_kernel && (here.device, here.inode) == (there.device, there.inode) {
        return same("both hosts run by one kernel, and it is the same there");
    }
    if here.is_device {
        return prove_device(here, there);
    }
    if !one_kernel
        && let Some(local) = [here, there]
            .into_iter()
            .find(|node| LOCAL.contains(&node.file_system))
    {
        return unproven(format!(
            "it lies on a file system of one host alone ({}): what is written on one host is not seen on the other",
            local.mounted
        ));
    }
    if here.sees_lock || there.sees_lock {
        return same("one host sees the other's lock on the file");
    }
    let sees_mark = here.sees_mark || there.sees_mark;
    if sees_mark && here.inode == there.inode && here.file_system == there.file_system {
        return same("one host sees what the other writes beside it, and it has the same inode");
    }
    unproven(if one_kernel {
        "both hosts run by one kernel, and these are two files there"
    } else if sees_mark {
        "both hosts see the same directory, and the files have different inodes there: is the name right?"
    } else {
        "neither host sees a lock or a mark that the other one makes"
    })
}

fn prove_device(here: &NodeHere, there: &NodeHere) -> Proof {
    let common = here
        .identifiers
        .iter()
        .find(|one| there.identifiers.contains(one));
    match (common, here.identifiers.first(), there.identifiers.first()) {
        (Some(common), ..) => same(format!("it has the same identifier, {common}")),
        (None, Some(here), Some(there)) => unproven(format!(
            "the devices have different identifiers, {here} and {there}"
        )),
        _ => unproven(
            "the devices have no identifier that is unique in the world (NAA, EUI, NVMe's UUID, Ceph's)",
        ),
    }
}

/// Whether both hosts run by the same kernel, as two containers do.
pub fn is_one_kernel(here: &StorageHere, there: &StorageHere) -> bool {
    !here.boot.is_empty() && here.boot == there.boot
}
