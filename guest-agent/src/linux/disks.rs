//! The guest's disks, as /sys names them.

use super::Error;
use crate::cache::Disk;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::Path;
use transhume_protocol::agent::MAX_TEXT_LEN;

/// Disks that are reported at most; more would only be in a guest that plays tricks.
const MAX_DISKS: usize = 256;

/// A device number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Dev {
    pub(super) major: u32,
    pub(super) minor: u32,
}

impl Dev {
    /// Parses `major:minor`.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.trim().split_once(':')?;
        Some(Self {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
        })
    }

    /// The kernel's packed form, as the module reports it (`new_encode_dev`).
    pub(super) fn packed(self) -> u32 {
        (self.minor & 0xff) | ((self.major & 0xfff) << 8) | ((self.minor & !0xff) << 12)
    }
}

/// A whole disk with a device behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct WholeDisk {
    pub(super) dev: Dev,
    sectors: u64,
    serial: String,
    name: String,
}

/// Where a file system's block device lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// Number of the disk in [`Disks`].
    pub(super) disk: u16,
    /// The disk's device number.
    pub(super) dev: Dev,
    /// First sector of the partition; 0 for a whole disk.
    pub(super) first_sector: u64,
}

/// The disks, numbered in the order of their names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Disks(Vec<WholeDisk>);

impl Disks {
    /// Reads `/sys/block`. Disks that come and go meanwhile are left out.
    ///
    /// Only disks with a parent device: what is made of other block devices (dm, md, loop) has
    /// none, and its sectors mean nothing to the host.
    pub(super) fn read(sys: &Path) -> Result<Self, Error> {
        let block = sys.join("block");
        let mut disks: Vec<WholeDisk> = fs::read_dir(&block)
            .map_err(Error::file(&block))?
            .filter_map(Result::ok)
            .filter_map(|entry| read_disk(&entry.path()))
            .take(MAX_DISKS)
            .collect();
        disks.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Self(disks))
    }

    /// The disk with this number.
    pub(super) fn get(&self, number: u16) -> Option<Disk<'_>> {
        let disk = self.0.get(usize::from(number))?;
        Some(Disk {
            sectors: disk.sectors,
            serial: &disk.serial,
            name: &disk.name,
        })
    }

    /// Where this block device, a disk or a partition of one, lies.
    pub(super) fn place(&self, sys: &Path, device: Dev) -> Option<Place> {
        let mut at = fs::canonicalize(
            sys.join("dev/block")
                .join(format!("{}:{}", device.major, device.minor)),
        )
        .ok()?;
        let mut first_sector = 0;
        if at.join("partition").exists() {
            first_sector = read_text(&at.join("start"))?.parse().ok()?;
            at.pop();
        }
        let dev = Dev::parse(&read_text(&at.join("dev"))?)?;
        let disk = self.0.iter().position(|disk| disk.dev == dev)?;
        Some(Place {
            disk: u16::try_from(disk).ok()?,
            dev,
            first_sector,
        })
    }
}

fn read_disk(path: &Path) -> Option<WholeDisk> {
    let name = path.file_name()?.to_str()?.to_owned();
    let sectors = read_text(&path.join("size"))?.parse().ok()?;
    if !path.join("device").exists() || sectors == 0 {
        return None;
    }
    Some(WholeDisk {
        dev: Dev::parse(&read_text(&path.join("dev"))?)?,
        sectors,
        serial: serial(path),
        name,
    })
}

/// virtio-blk has its serial beside the disk, `NVMe` at the controller, SCSI in a vital product data
/// page: 4 bytes of header, then the text.
fn serial(disk: &Path) -> String {
    read_text(&disk.join("serial"))
        .or_else(|| read_text(&disk.join("device/serial")))
        .or_else(|| {
            let page = read_bytes(&disk.join("device/vpd_pg80")).ok()?;
            Some(String::from_utf8_lossy(page.get(4..)?).trim().to_owned())
        })
        .unwrap_or_default()
}

fn read_text(path: &Path) -> Option<String> {
    let bytes = read_bytes(path).ok()?;
    Some(String::from_utf8_lossy(&bytes).trim().to_owned())
}

fn read_bytes(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?
        .take(MAX_TEXT_LEN as u64)
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn write(path: &Path, text: &[u8]) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// A virtio disk with a partition, a SCSI disk, a dm device and an empty drive.
    fn sys() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let sys = dir.path();
        for (name, dev, size, real) in [
            ("vda", "254:0", "2048\n", true),
            ("sdb", "8:16", "4096\n", true),
            ("dm-0", "253:0", "100\n", false),
            ("sr0", "11:0", "0\n", true),
        ] {
            let at = sys.join("devices").join(name);
            write(&at.join("dev"), dev.as_bytes());
            write(&at.join("size"), size.as_bytes());
            if real {
                fs::create_dir_all(at.join("device")).unwrap();
            }
            fs::create_dir_all(sys.join("block")).unwrap();
            fs::create_dir_all(sys.join("dev/block")).unwrap();
            symlink(&at, sys.join("block").join(name)).unwrap();
            symlink(&at, sys.join("dev/block").join(dev)).unwrap();
        }
        let vda = sys.join("devices/vda");
        write(&vda.join("serial"), b"root\n");
        write(&vda.join("vda1/partition"), b"1\n");
        write(&vda.join("vda1/start"), b"256\n");
        write(&vda.join("vda1/dev"), b"254:1\n");
        symlink(vda.join("vda1"), sys.join("dev/block/254:1")).unwrap();
        write(
            &sys.join("devices/sdb/device/vpd_pg80"),
            b"\0\x80\0\x06abcdef",
        );
        dir
    }

    #[test]
    fn disks_are_real_ones_in_order() {
        let sys = sys();
        let disks = Disks::read(sys.path()).unwrap();
        let sdb = Disk {
            sectors: 4096,
            serial: "abcdef",
            name: "sdb",
        };
        let vda = Disk {
            sectors: 2048,
            serial: "root",
            name: "vda",
        };
        assert_eq!(disks.get(0), Some(sdb));
        assert_eq!(disks.get(1), Some(vda));
        assert_eq!(disks.get(2), None);
    }

    #[test]
    fn a_partition_lies_on_its_disk() {
        let sys = sys();
        let disks = Disks::read(sys.path()).unwrap();
        let place = |text| disks.place(sys.path(), Dev::parse(text).unwrap());
        let vda = Dev {
            major: 254,
            minor: 0,
        };
        let at = |first_sector| {
            Some(Place {
                disk: 1,
                dev: vda,
                first_sector,
            })
        };
        assert_eq!(place("254:1"), at(256));
        assert_eq!(place("254:0"), at(0));
        assert_eq!(place("253:0"), None, "a dm device");
        assert_eq!(place("1:1"), None, "no such device");
    }

    #[test]
    fn device_numbers_are_packed_as_the_kernel_does() {
        let packed = |major, minor| Dev { major, minor }.packed();
        assert_eq!(packed(254, 1), 0xfe01);
        assert_eq!(packed(259, 0x12345), 0x1231_0345);
    }
}
