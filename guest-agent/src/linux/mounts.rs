//! The file systems whose page cache can be reported.

use super::Error;
use super::disks::Dev;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

/// Longest mount table that is read, in bytes; what is behind is left out.
const MAX_TABLE_LEN: u64 = 1 << 20;

/// A mounted file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mount {
    /// Its block device.
    pub(super) dev: Dev,
    /// Where it is mounted.
    pub(super) point: PathBuf,
    /// The directory of the file system that is mounted there is its root.
    whole: bool,
}

/// Reads `/proc/self/mountinfo`: one mount of each file system.
pub(super) fn read(proc: &Path) -> Result<Vec<Mount>, Error> {
    let path = proc.join("self/mountinfo");
    let mut table = Vec::new();
    File::open(&path)
        .and_then(|file| file.take(MAX_TABLE_LEN).read_to_end(&mut table))
        .map_err(Error::file(&path))?;
    Ok(parse(&table))
}

fn parse(table: &[u8]) -> Vec<Mount> {
    let mut mounts: BTreeMap<Dev, Mount> = BTreeMap::new();
    for mount in table.split(|&byte| byte == b'\n').filter_map(parse_line) {
        let better = mounts
            .get(&mount.dev)
            .is_none_or(|known| mount.whole && !known.whole);
        if better {
            mounts.insert(mount.dev, mount);
        }
    }
    mounts.into_values().collect()
}

/// `36 35 98:0 /root /point options [optional fields] - type source super-options`
fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|&byte| byte == b' ');
    let dev = Dev::parse(core::str::from_utf8(fields.nth(2)?).ok()?)?;
    let root = fields.next()?;
    let point = fields.next()?;
    let mut fields = fields.skip_while(|&field| field != b"-").skip(1);
    let kind = fields.next()?;
    let options = fields.nth(1)?;
    is_reportable(kind, options).then(|| Mount {
        dev,
        point: PathBuf::from(OsString::from_vec(unescape(point))),
        whole: root == b"/",
    })
}

/// Only file systems whose extents are sectors of their one device. Data that goes through ext4's
/// journal looks clean before it is in its place, and what lies on XFS's realtime device has
/// extents on that.
fn is_reportable(kind: &[u8], options: &[u8]) -> bool {
    let has = |wanted: &[u8]| {
        options
            .split(|&byte| byte == b',')
            .any(|option| option.starts_with(wanted))
    };
    match kind {
        b"ext2" | b"ext3" | b"ext4" => !has(b"data=journal"),
        b"xfs" => !has(b"rtdev="),
        _ => false,
    }
}

/// Space, tab, line feed and backslash are written as three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [byte, tail @ ..] = rest {
        rest = tail;
        let octal = tail.get(..3).and_then(|digits| {
            digits.iter().try_fold(0_u8, |value, digit| {
                let digit = digit.checked_sub(b'0').filter(|digit| *digit < 8)?;
                value.checked_mul(8)?.checked_add(digit)
            })
        });
        match octal {
            Some(value) if *byte == b'\\' => {
                out.push(value);
                rest = &tail[3..];
            }
            _ => out.push(*byte),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TABLE: &str = "\
21 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw,errors=remount-ro
22 21 0:5 / /dev rw shared:2 - devtmpfs udev rw
40 21 254:16 /data /bind\\040mount rw - xfs /dev/vdb rw,inode64
41 21 254:16 / /srv\\134x rw,noatime shared:3 master:4 - xfs /dev/vdb rw,inode64
42 21 254:16 / /again rw - xfs /dev/vdb rw
43 21 254:32 / /j rw - ext4 /dev/vdc rw,data=journal
44 21 254:48 / /r rw - xfs /dev/vdd rw,rtdev=/dev/vde
45 21 0:40 / /b rw - btrfs /dev/vdf rw
46 21 nonsense
";

    #[test]
    fn one_mount_of_each_file_system_is_chosen() {
        let mounts: Vec<_> = parse(TABLE.as_bytes())
            .into_iter()
            .map(|mount| (mount.dev.minor, mount.point))
            .collect();
        assert_eq!(mounts, [(1, "/".into()), (16, "/srv\\x".into())]);
    }

    #[test]
    fn a_bind_mount_serves_where_there_is_no_other() {
        let line = b"40 21 254:16 /data /bind\\040mount rw - xfs /dev/vdb rw,inode64";
        assert_eq!(
            parse(line).first().map(|mount| mount.point.clone()),
            Some("/bind mount".into())
        );
    }

    proptest! {
        #[test]
        fn any_table_is_survived(table in prop::collection::vec(any::<u8>(), 0..300)) {
            parse(&table);
            unescape(&table);
        }

        #[test]
        fn a_field_without_escapes_stays(field in "[a-zA-Z0-9/._-]{0,40}") {
            prop_assert_eq!(unescape(field.as_bytes()), field.as_bytes());
        }
    }
}
