//! Finds out whether the destination has the same storage for the VM's disks, before the guest is touched and, where
//! digests make one doubt it, while memory moves.

use std::fmt::{self, Write as _};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use transhume_protocol::link::{COMPARED_BLOCK, Compared, Comparison, Control, Signs, StorageHere};

use transhume_link::{self as link, Connection};
use transhume_machine::Definition;
use transhume_machine::definition::{Format, Shared};
use transhume_pages::SECTORS_PER_PAGE;
use transhume_pages::hint_table::Place;
use transhume_volume::same::{self, Care, Difference, Disk, Outcome, Proof, Signed, Storage};

/// How long the destination may take to read blocks.
pub(crate) const READ_TIMEOUT: Duration = Duration::from_secs(30);

/// What a disk of both hosts is known to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SharedDisk {
    /// Its name in the definition.
    pub disk: String,
    /// By what it is held to be the same.
    pub by: SharedBy,
    /// In words.
    pub how: String,
}

/// By what a disk is held to be the same on two hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SharedBy {
    /// It was proven.
    Proof,
    /// Nobody writes to it, and what was compared is equal.
    Content,
    /// The operator says so, and what was compared is equal.
    Trust,
}

impl fmt::Display for SharedDisk {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let by = match self.by {
            SharedBy::Proof => "the same on both hosts",
            SharedBy::Content => "equal on both hosts",
            SharedBy::Trust => "NOT PROVEN to be the same on both hosts, and trusted",
        };
        write!(out, "{} is {by}: {}", self.disk, self.how)
    }
}

/// Why there is no agreement on the storage.
pub(crate) enum NotAgreed {
    /// The connection broke.
    Broke(link::Error),
    /// The storage is not the same, or it cannot be seen that it is.
    Refused(Vec<String>),
}

/// This host's storage, and its signs.
pub(crate) struct Ours {
    storage: Arc<Storage>,
    signed: Signed,
    host: String,
}

/// The storage that both hosts agreed on.
#[derive(Clone)]
pub(crate) struct Agreed {
    here: Arc<Storage>,
    there: Arc<StorageHere>,
    key: [u8; 16],
    from: String,
    to: String,
    pub(crate) disks: Vec<SharedDisk>,
}

impl Ours {
    /// Opens the disks, and leaves signs that the destination looks for. Blocks.
    pub(crate) fn open(definition: &Definition, host: &str) -> Result<Self, NotAgreed> {
        let refused = |error: same::Error| {
            let reason = format!("the disks on {host}: {error}; see `dmesg` there");
            NotAgreed::Refused(vec![reason])
        };
        let storage = Storage::open(definition, host).map_err(refused)?;
        let signed = storage.sign().map_err(refused)?;
        Ok(Self {
            storage: Arc::new(storage),
            signed,
            host: host.to_owned(),
        })
    }

    pub(crate) fn signs(&self) -> Signs {
        self.signed.signs
    }

    /// Judges what the destination has, and compares it. Blocks.
    pub(crate) fn agree(
        self,
        there: StorageHere,
        to: &str,
        connection: &mut Connection,
    ) -> Result<Agreed, NotAgreed> {
        let begun = Instant::now();
        let there = bounded(there, self.storage.disks().len())?;
        let here = self.storage.look(&there.signs, &self.signed.signs);
        let key = same::key(&self.signed.signs.nonce, &there.signs.nonce);
        // Both have looked; the destination keeps its own until it goes on.
        drop(self.signed);
        let mut agreed = Agreed {
            here: self.storage,
            there: Arc::new(there),
            key,
            from: self.host,
            to: to.to_owned(),
            disks: Vec::new(),
        };
        let proofs = agreed.prove(&here).map_err(NotAgreed::Refused)?;
        let care = |disk: u16, node: u16| {
            let proof = proofs.get(usize::from(disk))?.get(usize::from(node))?;
            Some(Care::of(proof))
        };
        let samples = same::samples(&agreed.here, &agreed.there, &key, care);
        let outcome = same::compare(&agreed.here, &key, samples, |comparison| {
            ask(connection, comparison)
        })?;
        let differences = agreed.differences(&outcome);
        if !differences.is_empty() {
            return Err(NotAgreed::Refused(differences));
        }
        agreed.disks = agreed.shared(&proofs);
        tracing::info!(
            blocks = outcome.blocks,
            ms = begun.elapsed().as_millis(),
            "both hosts have the same storage"
        );
        for disk in &agreed.disks {
            if disk.by == SharedBy::Trust {
                tracing::warn!("disk {disk}");
            } else {
                tracing::info!("disk {disk}");
            }
        }
        Ok(agreed)
    }
}

/// What the destination says, if it is of this VM and within bounds.
fn bounded(there: StorageHere, disks: usize) -> Result<StorageHere, NotAgreed> {
    if there.is_bounded() && there.disks.len() == disks {
        return Ok(there);
    }
    Err(NotAgreed::Broke(link::Error::Unexpected(
        "another VM's disks",
    )))
}

fn ask(connection: &mut Connection, comparison: Comparison) -> Result<Compared, NotAgreed> {
    let answer = connection
        .send(&Control::Compare(comparison))
        .and_then(|()| connection.receive(READ_TIMEOUT))
        .map_err(NotAgreed::Broke)?;
    match answer {
        Control::Compared(compared) => Ok(compared),
        _ => Err(NotAgreed::Broke(link::Error::Unexpected(
            "no answer to a comparison",
        ))),
    }
}

impl From<same::Error> for NotAgreed {
    fn from(error: same::Error) -> Self {
        Self::Refused(vec![format!(
            "comparing the disks failed: {error}; see `dmesg`"
        )])
    }
}

impl Agreed {
    /// The proof for each node of each disk, or every disk's reason why that is not enough.
    fn prove(&self, here: &StorageHere) -> Result<Vec<Vec<Proof>>, Vec<String>> {
        let one_kernel = same::is_one_kernel(here, &self.there);
        let (mut proofs, mut refused) = (Vec::new(), Vec::new());
        for ((disk, ours), theirs) in self
            .here
            .disks()
            .iter()
            .zip(&here.disks)
            .zip(&self.there.disks)
        {
            if ours.len() != theirs.len() {
                refused.push(format!(
                    "disk {} is made of {} files on {}, and of {} on {}; `qemu-img info --backing-chain` shows them: \
                     correct its path or its mount",
                    disk.id,
                    ours.len(),
                    self.from,
                    theirs.len(),
                    self.to,
                ));
                continue;
            }
            let nodes = || ours.iter().zip(theirs).enumerate();
            for (n, (ours, theirs)) in nodes() {
                if !disk.may_grow(n) && ours.length != theirs.length {
                    refused.push(format!(
                        "disk {}: {} has {} bytes on {}, and {} on {} has {}; the two hosts do not see the same disk: \
                         correct its path or its mount",
                        disk.id, ours.path, ours.length, self.from, theirs.path, self.to, theirs.length,
                    ));
                }
            }
            let of_disk: Vec<Proof> = nodes()
                .map(|(_, (ours, theirs))| same::prove(ours, theirs, one_kernel))
                .collect();
            if let (Some(Proof::Unproven(why)), false, Shared::Proven) =
                (of_disk.first(), disk.is_only_read(0), disk.shared)
            {
                refused.push(self.unproven(disk, why, &ours[0].path, &theirs[0].path));
            }
            proofs.push(of_disk);
        }
        if refused.is_empty() {
            Ok(proofs)
        } else {
            Err(refused)
        }
    }

    fn unproven(&self, disk: &Disk, why: &str, ours: &str, theirs: &str) -> String {
        format!(
            "disk {} is not proven to be the same disk on both hosts ({ours} on {}, {theirs} on {}): {why}; a VM that \
             runs on with another disk is destroyed. Correct the path or the mount. If you know that both are one \
             storage, say it: shared = \"trust\" in its [[disk]]",
            disk.id, self.from, self.to,
        )
    }

    /// Compares more of all disks, and what is at these places. Returns why they are not the same. Blocks.
    pub(crate) fn compare_again<E: From<same::Error>>(
        &self,
        places: &[Place],
        ask: impl FnMut(Comparison) -> Result<Compared, E>,
    ) -> Result<Vec<String>, E> {
        let doubt = |_, _| Some(Care::Doubt);
        let mut samples = same::samples(&self.here, &self.there, &self.key, doubt);
        for (disk, number) in self.here.disks().iter().zip(0_u16..) {
            // Of an image the guest's sectors are somewhere else.
            let sample = samples
                .iter_mut()
                .find(|sample| (sample.disk, sample.node) == (number, 0));
            if let Some(sample) = sample.filter(|_| disk.format == Format::Raw) {
                let named = places.iter().filter(|place| place.disk == number);
                let blocks = named.flat_map(|place| blocks(place.sector));
                sample
                    .places
                    .extend(blocks.filter(|&block| block < sample.blocks));
            }
        }
        let outcome = same::compare(&self.here, &self.key, samples, ask)?;
        Ok(self.differences(&outcome))
    }

    /// Why nodes are not the same.
    fn differences(&self, outcome: &Outcome) -> Vec<String> {
        outcome
            .differences
            .iter()
            .map(|one| self.differs(one))
            .collect()
    }

    fn differs(&self, one: &Difference) -> String {
        let Difference {
            disk,
            node,
            blocks,
            first,
            of,
        } = *one;
        let id = self
            .here
            .disks()
            .get(usize::from(disk))
            .map_or("?", |disk| &disk.id);
        let theirs = self
            .there
            .disks
            .get(usize::from(disk))
            .and_then(|nodes| nodes.get(usize::from(node)));
        format!(
            "disk {id} is not the same disk on both hosts: at least {blocks} of {of} blocks that were compared differ \
             between {} on {} and {} on {}, read past all caches and more than once (the first at byte {}); correct its \
             path or its mount",
            self.here.path(disk, node).display(),
            self.from,
            theirs.map_or("?", |node| &node.path),
            self.to,
            first.saturating_mul(COMPARED_BLOCK as u64),
        )
    }

    fn shared(&self, proofs: &[Vec<Proof>]) -> Vec<SharedDisk> {
        let disks = self.here.disks().iter().zip(proofs);
        disks.map(|(disk, proofs)| shared(disk, proofs)).collect()
    }
}

/// The blocks that a page at this sector lies in: two, where it is not aligned.
fn blocks(sector: u64) -> impl Iterator<Item = u64> {
    const _: () = assert!(COMPARED_BLOCK == transhume_pages::PAGE_SIZE);
    let first = sector / SECTORS_PER_PAGE;
    first..=first + u64::from(!sector.is_multiple_of(SECTORS_PER_PAGE))
}

fn shared(disk: &Disk, proofs: &[Proof]) -> SharedDisk {
    let (by, mut how) = match proofs.first() {
        Some(Proof::Same(how)) => (SharedBy::Proof, how.clone()),
        Some(Proof::Unproven(why)) if disk.is_only_read(0) => (
            SharedBy::Content,
            format!("nobody writes to it, and what was compared is equal; {why}"),
        ),
        Some(Proof::Unproven(why)) => (SharedBy::Trust, why.clone()),
        None => (SharedBy::Proof, String::new()),
    };
    let copies = proofs
        .iter()
        .skip(1)
        .filter(|proof| !proof.is_given())
        .count();
    if copies > 0 {
        let _ = write!(
            how,
            "; {copies} of the files below it may be copies, and are equal where they were compared"
        );
    }
    SharedDisk {
        disk: disk.id.clone(),
        by,
        how,
    }
}
