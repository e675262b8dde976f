//! Two hosts with one disk, or with two that look alike.

use super::*;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use transhume_machine::Definition;
use transhume_protocol::link::{Compared, Comparison, MAX_PLACES, Sample, Signs, StorageHere};

const BLOCK: usize = 4096;
const BLOCKS: usize = 4096;
const KEY: [u8; 16] = [0x3c; 16];
const NFS: u64 = 0x6969;

struct Hosts {
    folder: tempfile::TempDir,
    format: &'static str,
    more: &'static str,
}

impl Hosts {
    fn new(format: &'static str) -> Self {
        Self {
            folder: tempfile::tempdir().expect("a folder"),
            format,
            more: "",
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A disk of 16 MiB in which each block is another.
    fn disk(&self, name: &str) -> PathBuf {
        let mut bytes = vec![0; BLOCKS * BLOCK];
        for (n, block) in bytes.chunks_mut(BLOCK).enumerate() {
            block.fill(u8::try_from(n % 251).unwrap_or(0));
            block[..8].copy_from_slice(&(n as u64 + 1).to_le_bytes());
        }
        fs::write(self.path(name), bytes).expect("written");
        self.path(name)
    }

    fn open(&self, host: &str, path: &Path) -> Storage {
        let text = format!(
            "name = \"web1\"\nmachine = \"q35\"\nmemory = \"64MiB\"\nvcpus = 1\n[[disk]]\nid = \"root\"\n\
             format = \"{}\"\n{}\npath = \"{}\"\n",
            self.format,
            self.more,
            path.display()
        );
        let definition = Definition::parse(&text).expect("a definition");
        Storage::open(&definition, host).expect("storage")
    }

    /// Both hosts' storage, and what they say of it, each after the other has left its signs.
    fn looked(&self, here: &Path, there: &Path) -> (Storage, Storage, StorageHere, StorageHere) {
        let (a, b) = (self.open("hosta", here), self.open("hostb", there));
        let (sign_a, sign_b) = (a.sign().expect("signs"), b.sign().expect("signs"));
        let says_a = a.look(&sign_b.signs, &sign_a.signs);
        let says_b = b.look(&sign_a.signs, &sign_b.signs);
        (a, b, says_a, says_b)
    }

    fn differing(&self, here: &Path, there: &Path, care: Care) -> Vec<Difference> {
        let (a, b, _, says) = self.looked(here, there);
        let samples = samples(&a, &says, &KEY, |_, _| Some(care));
        let ask = |asked: Comparison| b.read(&asked, &KEY);
        compare(&a, &KEY, samples, ask)
            .expect("compared")
            .differences
    }
}

fn write(path: &Path, blocks: impl IntoIterator<Item = usize>, byte: u8) {
    let file = OpenOptions::new().write(true).open(path).expect("opened");
    for n in blocks {
        file.write_all_at(&[byte; BLOCK], (n * BLOCK) as u64)
            .expect("written");
    }
    file.sync_all().expect("synced");
}

/// What two kernels would say, with the file on NFS.
fn by_two_kernels(a: &StorageHere, b: &StorageHere) -> Proof {
    let (mut a, mut b) = (a.disks[0][0].clone(), b.disks[0][0].clone());
    a.file_system = NFS;
    b.file_system = NFS;
    prove(&a, &b, false)
}

#[test]
fn one_file_by_two_paths_is_the_same() {
    let hosts = Hosts::new("raw");
    let disk = hosts.disk("disk");
    let (link, hard) = (hosts.path("link"), hosts.path("hard"));
    std::os::unix::fs::symlink(&disk, &link).expect("linked");
    fs::hard_link(&disk, &hard).expect("linked");
    for other in [&disk, &link, &hard] {
        let (_, _, a, b) = hosts.looked(&disk, other);
        assert!(is_one_kernel(&a, &b));
        assert!(prove(&a.disks[0][0], &b.disks[0][0], true).is_given());
        assert!(a.disks[0][0].sees_lock && b.disks[0][0].sees_lock);
        assert!(a.disks[0][0].sees_mark && b.disks[0][0].sees_mark);
        assert!(by_two_kernels(&a, &b).is_given());
        // The same on ext4 is two hosts that mount one device.
        let (mut a, b) = (a.disks[0][0].clone(), &b.disks[0][0]);
        a.file_system = 0xef53;
        assert!(!prove(&a, b, false).is_given());
    }
    assert!(hosts.differing(&disk, &link, Care::Proven).is_empty());
    let left: Vec<_> = fs::read_dir(hosts.folder.path()).expect("read").collect();
    assert_eq!(left.len(), 3, "a mark is left: {left:?}");
}

#[test]
fn a_copy_is_not_proven_however_equal_it_is() {
    let hosts = Hosts::new("raw");
    let (disk, copy) = (hosts.disk("disk"), hosts.path("copy"));
    fs::copy(&disk, &copy).expect("copied");
    let (_, _, a, b) = hosts.looked(&disk, &copy);
    assert!(!a.disks[0][0].sees_lock && !b.disks[0][0].sees_lock);
    assert!(!prove(&a.disks[0][0], &b.disks[0][0], true).is_given());
    // It is in the directory that both see, and is another file there.
    let Proof::Unproven(why) = by_two_kernels(&a, &b) else {
        panic!("proven");
    };
    assert!(why.contains("inode"), "{why}");
    assert!(hosts.differing(&disk, &copy, Care::Unproven).is_empty());
}

#[test]
fn a_stale_copy_a_blank_disk_and_another_one_differ() {
    let hosts = Hosts::new("raw");
    let (disk, copy) = (hosts.disk("disk"), hosts.path("copy"));
    fs::copy(&disk, &copy).expect("copied");
    // Two in a hundred were written since.
    write(&disk, (0..BLOCKS).skip(31).step_by(50), 0xee);
    let found = hosts.differing(&disk, &copy, Care::Unproven);
    assert_eq!(found.len(), 1);
    assert!(
        found[0].blocks > 1 && found[0].blocks < found[0].of / 10,
        "{found:?}"
    );

    let blank = hosts.path("blank");
    let file = File::create(&blank).expect("made");
    file.set_len((BLOCKS * BLOCK) as u64).expect("sized");
    for care in [Care::Proven, Care::Unproven, Care::Doubt] {
        assert!(hosts.differing(&disk, &blank, care)[0].blocks > 40);
        assert!(hosts.differing(&blank, &disk, care)[0].blocks > 40);
    }
    fs::copy(&disk, &copy).expect("copied");
    write(&copy, 0..BLOCKS, 0x11);
    assert!(!hosts.differing(&disk, &copy, Care::Proven).is_empty());
}

#[test]
fn one_block_of_a_disks_start_is_enough() {
    let hosts = Hosts::new("raw");
    let (disk, copy) = (hosts.disk("disk"), hosts.path("copy"));
    fs::copy(&disk, &copy).expect("copied");
    write(&disk, [1], 0xee);
    let found = hosts.differing(&disk, &copy, Care::Proven);
    assert_eq!((found[0].blocks, found[0].first), (1, 1));
}

/// A qcow2 header on a raw base, and bytes behind it.
fn overlay(path: &Path, base: &str) {
    let mut bytes = b"QFI\xfb\0\0\0\x03".to_vec();
    bytes.extend(512_u64.to_be_bytes());
    bytes.extend(u32::try_from(base.len()).expect("short").to_be_bytes());
    bytes.extend(16_u32.to_be_bytes());
    bytes.extend((16_u64 << 20).to_be_bytes());
    bytes.resize(100, 0);
    bytes.extend(104_u32.to_be_bytes());
    bytes.extend(0xe279_2aca_u32.to_be_bytes());
    bytes.extend(3_u32.to_be_bytes());
    bytes.extend(b"raw\0\0\0\0\0");
    bytes.resize(512, 0);
    bytes.extend(base.as_bytes());
    bytes.resize(1 << 20, 0x5a);
    fs::write(path, bytes).expect("written");
}

#[test]
fn each_file_of_a_chain_is_looked_at() {
    let hosts = Hosts::new("qcow2");
    let (base, top, copy) = (hosts.disk("base"), hosts.path("top"), hosts.path("copy"));
    overlay(&top, "base");
    fs::copy(&top, &copy).expect("copied");
    let (a, _, says_a, says_b) = hosts.looked(&top, &copy);
    assert_eq!(says_a.disks[0].len(), 2);
    assert!(!prove(&says_a.disks[0][0], &says_b.disks[0][0], true).is_given());
    assert!(prove(&says_a.disks[0][1], &says_b.disks[0][1], true).is_given());
    assert!(!a.disks()[0].is_only_read(0) && a.disks()[0].is_only_read(1));
    assert_eq!(a.path(0, 1), base);
    assert!(hosts.differing(&top, &copy, Care::Unproven).is_empty());
    // The guest writes: its newest clusters are at the end.
    write(&top, 250..256, 0xee);
    let found = hosts.differing(&top, &copy, Care::Proven);
    assert_eq!((found.len(), found[0].node), (1, 0));

    // The same overlay on another base.
    let other = tempfile::tempdir().expect("a folder");
    fs::copy(&top, other.path().join("top")).expect("copied");
    fs::write(other.path().join("base"), vec![0x77; BLOCKS * BLOCK]).expect("written");
    let found = hosts.differing(&top, &other.path().join("top"), Care::Proven);
    assert_eq!((found.len(), found[0].node), (1, 1));
}

#[test]
fn a_disk_that_is_written_meanwhile_is_the_same() {
    let hosts = Hosts::new("raw");
    let disk = hosts.disk("disk");
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut written = 0_usize;
            while !over.load(Ordering::Relaxed) {
                write(
                    &disk,
                    [0, 1, 2, 3].map(|n| (written * 7 + n) % BLOCKS),
                    u8::try_from(written % 256).unwrap_or(0),
                );
                write(&disk, [0, 1], u8::try_from(written % 256).unwrap_or(0));
                written += 1;
            }
            written
        });
        for _ in 0..20 {
            let found = hosts.differing(&disk, &disk, Care::Doubt);
            assert!(found.is_empty(), "{found:?}");
        }
        over.store(true, Ordering::Relaxed);
        assert!(writer.join().expect("a count") > 0);
    });
}

#[test]
fn a_block_that_differs_for_a_while_is_read_again() {
    let hosts = Hosts::new("raw");
    let (disk, copy) = (hosts.disk("disk"), hosts.path("copy"));
    fs::copy(&disk, &copy).expect("copied");
    write(&copy, [2], 0xee);
    let (a, b, _, says) = hosts.looked(&disk, &copy);
    let samples = samples(&a, &says, &KEY, |_, _| Some(Care::Proven));
    let mut asked = 0;
    let outcome = compare(&a, &KEY, samples, |comparison| {
        asked += 1;
        if asked == 3 {
            // What this host wrote has arrived there at last.
            fs::copy(&disk, &copy).expect("copied");
        }
        b.read(&comparison, &KEY)
    });
    assert_eq!(outcome.expect("compared").differences, []);
    assert_eq!(asked, 3);
}

#[test]
fn nobody_reads_more_than_was_agreed() {
    let hosts = Hosts::new("raw");
    let storage = hosts.open("hosta", &hosts.disk("disk"));
    let sample = |disk, node, places| Sample {
        disk,
        node,
        blocks: BLOCKS as u64,
        drawn: 0,
        places,
    };
    let read = |samples: Vec<Sample>| storage.read(&Comparison { number: 7, samples }, &KEY);
    assert!(read(vec![sample(1, 0, vec![0])]).is_err());
    assert!(read(vec![sample(0, 1, vec![0])]).is_err());
    assert!(read(vec![sample(0, 0, vec![0; MAX_PLACES + 1])]).is_err());
    assert!(
        read(vec![Sample {
            drawn: u16::MAX,
            ..sample(0, 0, vec![])
        }])
        .is_err()
    );
    let end = BLOCKS as u64;
    let some = read(vec![sample(0, 0, vec![end - 1, end, u64::MAX, 0, 0])]).expect("read");
    let digests = &some.digests[0];
    assert!(digests[0].is_some() && digests[1].is_none() && digests[2].is_none());
    assert!(digests[3].is_some() && digests[3] == digests[4] && digests[3] != digests[0]);
    // Answers that fit no question are refused.
    let says = storage.look(
        &Signs {
            nonce: [1; 16],
            made: 0,
        },
        &Signs {
            nonce: [2; 16],
            made: 0,
        },
    );
    let samples = samples(&storage, &says, &KEY, |_, _| Some(Care::Proven));
    let none = |asked: Comparison| {
        Ok::<_, Error>(Compared {
            number: asked.number,
            digests: vec![],
        })
    };
    assert!(compare(&storage, &KEY, samples, none).is_err());
}

#[test]
fn a_disk_that_ends_within_a_block_is_read_to_its_end() {
    let hosts = Hosts::new("raw");
    let (disk, copy) = (hosts.path("disk"), hosts.path("copy"));
    for path in [&disk, &copy] {
        fs::write(path, vec![0x41; 3 * BLOCK + 1536]).expect("written");
    }
    assert!(hosts.differing(&disk, &copy, Care::Unproven).is_empty());
    for empty in [0_usize, 512] {
        fs::write(&disk, vec![0; empty]).expect("written");
        assert!(hosts.differing(&disk, &disk, Care::Unproven).is_empty());
    }
}
