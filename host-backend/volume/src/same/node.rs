//! The nodes of a VM's disks on this host: opened once, so that what is looked at, compared and later read again is
//! the same.

use super::lock::{self, Lock};
use super::mark::{Beside, Mark};
use super::{Error, device, drawn};
use crate::reader::raw::RawReader;
use crate::{AlignedBuffer, Reader};
use nix::libc::{major, minor};
use nix::sys::stat::{FileStat, SFlag, fstat};
use nix::sys::statfs::fstatfs;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};
use transhume_base::process_identity::boot_id;
use transhume_machine::definition::{Format, Shared};
use transhume_machine::{Definition, image_chain};
use transhume_pages::digest::{Digester, random_key};
use transhume_protocol::link::{
    COMPARED_BLOCK, Compared, Comparison, Digest, MAX_NODES, MAX_PLACES, MAX_STORAGE_TEXT,
    NodeHere, Sample, Signs, StorageHere,
};

/// Reads under way at once: storage over a network is worked on in parallel.
const READERS: usize = 8;

pub(super) struct Node {
    pub(super) reader: RawReader,
    path: PathBuf,
    /// Its directory, if it is a file.
    beside: Option<Beside>,
    here: NodeHere,
}

/// A disk on this host.
pub struct Disk {
    /// Its name in the definition.
    pub id: String,
    /// How the uppermost node is laid out.
    pub format: Format,
    /// What the operator says of it.
    pub shared: Shared,
    /// Whether the guest may not write to it.
    pub read_only: bool,
    pub(super) nodes: Vec<Node>,
}

/// All disks of a VM on this host.
pub struct Storage {
    boot: String,
    disks: Vec<Disk>,
}

/// Signs on this host's storage, which stay as long as this lives.
pub struct Signed {
    /// By what the other host knows them.
    pub signs: Signs,
    _locks: Vec<Lock>,
    _marks: Vec<Mark>,
}

impl Node {
    fn open(path: &Path) -> Result<Self, Error> {
        let look = |source| Error::Look {
            path: path.to_owned(),
            source,
        };
        let reader = RawReader::open(path)?;
        let stat = fstat(&reader.file).map_err(|errno| look(errno.into()))?;
        let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
        let is_device = kind == SFlag::S_IFBLK;
        let here = NodeHere {
            path: path.display().to_string(),
            is_device,
            length: reader.size(),
            ..NodeHere::default()
        };
        if is_device {
            let (major, minor) = (major(stat.st_rdev), minor(stat.st_rdev));
            let sysfs = Path::new("/sys");
            let here = NodeHere {
                device: stat.st_rdev,
                identifiers: device::identifiers(sysfs, major.into(), minor.into()),
                ..here
            };
            return Ok(Self {
                reader,
                path: path.to_owned(),
                beside: None,
                here,
            });
        }
        let file_system = fstatfs(&reader.file).map_err(|errno| look(errno.into()))?;
        let here = NodeHere {
            device: stat.st_dev,
            inode: stat.st_ino,
            // Numbers of 32 bits, whatever the type.
            file_system: file_system.filesystem_type().0.cast_unsigned() & 0xffff_ffff,
            mounted: mounted(&stat),
            ..here
        };
        Ok(Self {
            beside: Beside::of(path, &stat),
            reader,
            path: path.to_owned(),
            here,
        })
    }

    /// Digests of blocks; nothing where one cannot be read.
    fn digests(&self, digester: &Digester, places: &[u64]) -> Vec<Option<Digest>> {
        let next = AtomicUsize::new(0);
        let mut found = vec![None; places.len()];
        let read = || {
            let mut read = Vec::new();
            let Ok(mut buffer) = AlignedBuffer::allocate(COMPARED_BLOCK) else {
                return read;
            };
            loop {
                let n = next.fetch_add(1, Ordering::Relaxed);
                let Some(&place) = places.get(n) else {
                    return read;
                };
                read.push((
                    n,
                    self.block(place, &mut buffer)
                        .map(|block| digester.digest(block)),
                ));
            }
        };
        let readers = READERS.min(places.len());
        std::thread::scope(|scope| {
            let threads: Vec<_> = (1..readers)
                .map_while(|_| std::thread::Builder::new().spawn_scoped(scope, read).ok())
                .collect();
            for (n, digest) in read() {
                found[n] = digest;
            }
            for (n, digest) in threads
                .into_iter()
                .filter_map(|one| one.join().ok())
                .flatten()
            {
                found[n] = digest;
            }
        });
        found
    }

    /// One block, past all caches; what lies behind the end is zero.
    pub(super) fn block<'a>(
        &self,
        place: u64,
        buffer: &'a mut AlignedBuffer,
    ) -> Option<&'a [u8; COMPARED_BLOCK]> {
        let offset = place.checked_mul(COMPARED_BLOCK as u64)?;
        let there = self.reader.size().checked_sub(offset)?;
        let length =
            usize::try_from(there).map_or(COMPARED_BLOCK, |there| there.min(COMPARED_BLOCK));
        if length == 0 {
            return None;
        }
        buffer[length..].fill(0);
        self.reader.read_at(offset, &mut buffer[..length]).ok()?;
        buffer.first_chunk()
    }
}

/// The kind and the source of the file system, as in `nfs4 nas:/vms`.
fn mounted(stat: &FileStat) -> String {
    let device = format!("{}:{}", major(stat.st_dev), minor(stat.st_dev));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let line = mounts
        .lines()
        .find(|line| line.split(' ').nth(2) == Some(&device));
    let mut words = line
        .and_then(|line| line.split_once(" - "))
        .map_or("", |(_, end)| end)
        .split(' ');
    let (kind, source) = (
        words.next().unwrap_or_default(),
        words.next().unwrap_or_default(),
    );
    let mut text = format!("{kind} {source}").trim().to_owned();
    while text.len() > MAX_STORAGE_TEXT {
        text.pop();
    }
    text
}

impl Disk {
    fn open(
        definition: &Definition,
        disk: &transhume_machine::definition::Disk,
        host: &str,
    ) -> Result<Self, Error> {
        let path = definition.disk_path(disk, host);
        let mut paths = vec![path.to_owned()];
        if disk.format == Format::Qcow2 {
            let below = image_chain::below(path, |_| Ok(())).map_err(|source| Error::Chain {
                path: path.to_owned(),
                source,
            })?;
            paths.extend(below);
        }
        if paths.len() > MAX_NODES {
            return Err(Error::Bounds("images on top of each other"));
        }
        Ok(Self {
            id: disk.id.clone(),
            format: disk.format,
            shared: disk.shared,
            read_only: disk.read_only,
            nodes: paths
                .iter()
                .map(|path| Node::open(path))
                .collect::<Result<_, _>>()?,
        })
    }

    /// Whether nobody writes to that node: all but the uppermost are only read.
    pub fn is_only_read(&self, node: usize) -> bool {
        self.read_only || node > 0
    }

    /// Whether that node's length may change while the VM runs.
    pub fn may_grow(&self, node: usize) -> bool {
        self.format == Format::Qcow2 && !self.is_only_read(node)
    }
}

impl Storage {
    /// Opens the disks of a VM as they are on this host. Blocks.
    ///
    /// # Errors
    /// Of files and devices, with the path.
    pub fn open(definition: &Definition, host: &str) -> Result<Self, Error> {
        let open = |disk| Disk::open(definition, disk, host);
        Ok(Self {
            boot: boot_id(),
            disks: definition
                .disks
                .iter()
                .map(open)
                .collect::<Result<_, _>>()?,
        })
    }

    /// Leaves signs for the other host. A node that cannot have one gets none.
    ///
    /// # Errors
    /// Without random numbers.
    pub fn sign(&self) -> Result<Signed, Error> {
        let nonce = random_key().map_err(Error::Random)?;
        let made = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs();
        let signs = Signs { nonce, made };
        let (mut locks, mut marks) = (Vec::new(), Vec::new());
        for (disk, number) in self.disks.iter().zip(0..) {
            for (node, at) in disk.nodes.iter().zip(0..) {
                let Some(beside) = &node.beside else { continue };
                locks.extend(Lock::take(
                    &node.reader.file,
                    lock::offset(&nonce, number, at),
                ));
                if at == 0 {
                    marks.extend(beside.leave(&signs, number));
                }
            }
        }
        Ok(Signed {
            signs,
            _locks: locks,
            _marks: marks,
        })
    }

    /// What is known of the nodes, and which signs of the other host are seen.
    pub fn look(&self, theirs: &Signs, ours: &Signs) -> StorageHere {
        let node = |disk: u16, at: u16, node: &Node| {
            let Some(beside) = &node.beside else {
                return node.here.clone();
            };
            NodeHere {
                sees_lock: lock::is_held(&node.reader.file, lock::offset(&theirs.nonce, disk, at)),
                sees_mark: at == 0 && beside.sees(theirs, disk),
                ..node.here.clone()
            }
        };
        let disk = |(disk, number): (&Disk, u16)| {
            let nodes = disk.nodes.iter().zip(0..);
            nodes.map(|(one, at)| node(number, at, one)).collect()
        };
        StorageHere {
            signs: *ours,
            boot: self.boot.clone(),
            disks: self.disks.iter().zip(0..).map(disk).collect(),
        }
    }

    /// The disks, in the order of the definition.
    pub fn disks(&self) -> &[Disk] {
        &self.disks
    }

    pub(super) fn node(&self, disk: u16, node: u16) -> Option<&Node> {
        self.disks
            .get(usize::from(disk))?
            .nodes
            .get(usize::from(node))
    }

    /// Path of a node on this host, for messages.
    pub fn path(&self, disk: u16, node: u16) -> &Path {
        self.node(disk, node)
            .map_or(Path::new("?"), |node| &node.path)
    }

    /// Reads what is to be compared. Blocks.
    ///
    /// # Errors
    /// If more is asked for than may be.
    pub fn read(&self, asked: &Comparison, key: &[u8; 16]) -> Result<Compared, Error> {
        if asked.places() > MAX_PLACES || asked.samples.len() > MAX_PLACES {
            return Err(Error::Bounds("blocks to compare"));
        }
        let digester = Digester::new(key);
        let read = |sample: &Sample| {
            let node = self
                .node(sample.disk, sample.node)
                .ok_or(Error::Bounds("a disk to compare"))?;
            Ok(node.digests(&digester, &drawn::all(sample, key)))
        };
        Ok(Compared {
            number: asked.number,
            digests: asked
                .samples
                .iter()
                .map(read)
                .collect::<Result<_, Error>>()?,
        })
    }
}
