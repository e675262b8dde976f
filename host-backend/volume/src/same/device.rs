//! What identifies a block device in the whole world, from sysfs. Numbers that are only meant to be unique (a serial
//! number, a file system's or partition table's UUID, LVM's by itself) do not count: a copy has them too.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use transhume_protocol::link::{MAX_IDENTIFIERS, MAX_STORAGE_TEXT};

/// Devices on top of each other that are followed down, at most.
const DEPTH: usize = 6;

/// Of the device with this number; `root` is sysfs.
pub(super) fn identifiers(root: &Path, major: u64, minor: u64) -> Vec<String> {
    let link = root.join(format!("dev/block/{major}:{minor}"));
    let Ok(folder) = link.canonicalize() else {
        return Vec::new();
    };
    let mut found: Vec<String> = of_folder(root, &folder, DEPTH).into_iter().collect();
    found.retain(|one| one.len() <= MAX_STORAGE_TEXT);
    found.truncate(MAX_IDENTIFIERS);
    found
}

fn read(path: PathBuf) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let text = text.trim();
    let plain =
        !text.is_empty() && text.len() <= 256 && text.bytes().all(|byte| byte.is_ascii_graphic());
    plain.then(|| text.to_owned())
}

fn of_folder(root: &Path, folder: &Path, depth: usize) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    if depth == 0 {
        return found;
    }
    if folder.join("partition").exists() {
        let whole = folder
            .parent()
            .map(|whole| of_folder(root, whole, depth - 1));
        let (start, size) = (read(folder.join("start")), read(folder.join("size")));
        if let (Some(whole), Some(start), Some(size)) = (whole, start, size) {
            found.extend(
                whole
                    .into_iter()
                    .map(|one| format!("{one}, sectors {start}+{size}")),
            );
        }
        return found;
    }
    if let Some(uuid) = read(folder.join("dm/uuid")) {
        let below = below(root, folder, depth);
        if let Some(of_lun) = uuid.strip_prefix("mpath-") {
            found.extend(of_scsi_id(of_lun));
            found.extend(below.into_iter().flatten());
        } else if !below.is_empty() && below.iter().all(|ids| !ids.is_empty()) {
            // A mapping of the same name on the same devices.
            let below: Vec<String> = below
                .into_iter()
                .filter_map(|mut ids| ids.pop_first())
                .collect();
            found.insert(format!("{uuid} on {}", below.join(" and ")));
        }
        return found;
    }
    for path in ["device/wwid", "wwid"] {
        found.extend(read(folder.join(path)).filter(|wwid| is_unique(wwid)));
    }
    found.extend(of_rbd(root, folder));
    found
}

/// The identifiers of each device that a mapping is made of, in an order that does not depend on the host.
fn below(root: &Path, folder: &Path, depth: usize) -> Vec<BTreeSet<String>> {
    let entries = fs::read_dir(folder.join("slaves")).into_iter().flatten();
    let mut below: Vec<_> = entries
        .take(64)
        .flatten()
        .filter_map(|entry| entry.path().canonicalize().ok())
        .map(|folder| of_folder(root, &folder, depth - 1))
        .collect();
    below.sort();
    below
}

/// multipath-tools names a device by udev's `scsi_id`: the type of the designator, and its digits.
fn of_scsi_id(id: &str) -> Option<String> {
    let digits = id.get(1..)?;
    let wwid = match id.get(..1)? {
        "3" => format!("naa.{digits}"),
        "2" => format!("eui.{digits}"),
        // Those of NVMe are as the kernel writes them.
        _ => id.to_owned(),
    };
    is_unique(&wwid).then_some(wwid)
}

/// Whether whoever gave the number away saw to it that there is no other. NAA's kind 3 is given away locally, and
/// "t10." and "nvme." are made of names and serial numbers.
fn is_unique(wwid: &str) -> bool {
    let (digits, kinds) = match wwid.split_once('.') {
        Some(("naa", digits)) => (digits, "256"),
        Some(("eui" | "uuid", digits)) => (digits, ""),
        _ => return false,
    };
    let is_kind = kinds.is_empty() || digits.starts_with(|kind| kinds.contains(kind));
    let is_number = digits.len() >= 16
        && digits
            .bytes()
            .all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
    is_kind && is_number && digits.bytes().any(|byte| !matches!(byte, b'0' | b'-'))
}

/// An image of a Ceph cluster that is mapped itself, and no snapshot of it.
fn of_rbd(root: &Path, folder: &Path) -> Option<String> {
    let number = folder.file_name()?.to_str()?.strip_prefix("rbd")?;
    let image = root.join("bus/rbd/devices").join(number);
    let tell = |name: &str| read(image.join(name));
    (tell("current_snap")? == "-").then_some(())?;
    let (cluster, pool, id) = (tell("cluster_fsid")?, tell("pool_id")?, tell("image_id")?);
    Some(format!("rbd {cluster}/{pool}/{id}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A sysfs of few files.
    struct Sysfs(tempfile::TempDir);

    impl Sysfs {
        fn new() -> Self {
            let folder = tempfile::tempdir().expect("a folder");
            fs::create_dir_all(folder.path().join("dev/block")).expect("made");
            Self(folder)
        }

        fn device(&self, number: &str, name: &str, files: &[(&str, &str)]) -> PathBuf {
            let folder = self.0.path().join("devices").join(name);
            for (file, text) in files {
                let path = folder.join(file);
                fs::create_dir_all(path.parent().expect("a folder")).expect("made");
                fs::write(path, format!("{text}\n")).expect("written");
            }
            symlink(&folder, self.0.path().join("dev/block").join(number)).expect("linked");
            folder
        }

        fn found(&self, minor: u64) -> Vec<String> {
            identifiers(self.0.path(), 8, minor)
        }
    }

    const NAA: &str = "naa.60014055f1b7e2c4c1a4d0f8e7a1b2c3";

    #[test]
    fn a_lun_is_known_by_its_number_on_one_path_and_on_many() {
        let sysfs = Sysfs::new();
        let sda = sysfs.device("8:0", "sda", &[("device/wwid", NAA), ("size", "100")]);
        sysfs.device(
            "8:1",
            "sda/sda1",
            &[("partition", "1"), ("start", "8"), ("size", "64")],
        );
        let uuid = format!("mpath-3{}", &NAA[4..]);
        let dm = sysfs.device("8:2", "dm-0", &[("dm/uuid", &uuid)]);
        fs::create_dir_all(dm.join("slaves")).expect("made");
        symlink(&sda, dm.join("slaves/sda")).expect("linked");
        assert_eq!(sysfs.found(0), [NAA]);
        assert_eq!(sysfs.found(1), [format!("{NAA}, sectors 8+64")]);
        assert_eq!(sysfs.found(2), [NAA]);
        assert!(sysfs.found(9).is_empty());
    }

    #[test]
    fn a_logical_volume_counts_only_on_devices_that_count() {
        let sysfs = Sysfs::new();
        let good = sysfs.device("8:0", "sda", &[("device/wwid", NAA)]);
        let bad = sysfs.device("8:16", "vda", &[("serial", "7")]);
        for (number, below) in [(1, &good), (2, &bad)] {
            let dm = sysfs.device(
                &format!("8:{number}"),
                &format!("dm-{number}"),
                &[("dm/uuid", "LVM-abc")],
            );
            fs::create_dir_all(dm.join("slaves")).expect("made");
            symlink(below, dm.join("slaves/one")).expect("linked");
        }
        assert_eq!(sysfs.found(1), [format!("LVM-abc on {NAA}")]);
        assert!(sysfs.found(2).is_empty());
    }

    #[test]
    fn numbers_that_a_copy_may_have_too_do_not_count() {
        for wwid in [
            "t10.ATA QEMU HARDDISK QM00001",
            "naa.3333333000007d0",
            "naa.3333333000007d00",
            "naa.6000000",
            "naa.60xx4055f1b7e2c4c1a4d0f8e7a1b2c3",
            "eui.0000000000000000",
            "nvme.1b36-64656164-51454d55",
            "",
        ] {
            assert!(!is_unique(wwid), "{wwid}");
        }
        for wwid in [
            NAA,
            "eui.0025385b71b00001",
            "uuid.6b6f1d4c-0b1e-4a52-8f0e-2d7a7f1c9b11",
        ] {
            assert!(is_unique(wwid), "{wwid}");
        }
    }

    #[test]
    fn an_image_of_ceph_is_known_by_its_cluster() {
        let sysfs = Sysfs::new();
        sysfs.device("8:0", "rbd0", &[("size", "100")]);
        let image = sysfs.0.path().join("bus/rbd/devices/0");
        fs::create_dir_all(&image).expect("made");
        for (name, text) in [
            ("cluster_fsid", "f5"),
            ("pool_id", "2"),
            ("image_id", "1ab"),
            ("current_snap", "-"),
        ] {
            fs::write(image.join(name), text).expect("written");
        }
        assert_eq!(sysfs.found(0), ["rbd f5/2/1ab"]);
        fs::write(image.join("current_snap"), "daily").expect("written");
        assert!(sysfs.found(0).is_empty());
    }
}
