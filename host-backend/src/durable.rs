//! Small files that are either the old one or the new one, never a part, also after a power cut.
//!
//! Beside each there is another of its size, `*.new`, where the next content is written before the two change places. So a
//! file that was written once can be replaced when there is no room any more, as long as it does not grow by a block:
//! what must be noted at a migration's worst moment does not fail for that.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

/// The file beside another one.
fn spare(path: &Path) -> PathBuf {
    path.with_extension("new")
}

/// Replaces a file, or makes it. It is on disk when this returns.
pub(crate) fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let spare = spare(path);
    write(&spare, content)?;
    let exchanged = renameat2(
        AT_FDCWD,
        path,
        AT_FDCWD,
        &spare,
        RenameFlags::RENAME_EXCHANGE,
    );
    if exchanged.is_err() {
        // It is new, or the file system does not let files change places.
        let is_new = !path.exists();
        fs::rename(&spare, path)?;
        if is_new {
            // Without room for the next content, this one shall not be relied on.
            write(&spare, content).inspect_err(|_| drop(remove(path)))?;
        }
    }
    sync_folder(path)
}

/// The same for what will not change any more: no room is kept for another content.
pub(crate) fn conclude(path: &Path, content: &[u8]) -> io::Result<()> {
    let spare = spare(path);
    write(&spare, content)?;
    fs::rename(&spare, path)?;
    sync_folder(path)
}

/// Writes over what is there, without giving its room up first.
fn write(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let mut file = options
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)?;
    file.write_all(content)?;
    file.set_len(content.len() as u64)?;
    file.sync_all()
}

/// Removes a file, if it is there.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    for path in [path, &spare(path)] {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    match sync_folder(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn sync_folder(path: &Path) -> io::Result<()> {
    path.parent()
        .map_or(Ok(()), |folder| File::open(folder)?.sync_all())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_the_old_one_or_the_new_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("note");
        for text in ["waits", "runs here, and has done so for long", "taken"] {
            replace(&path, text.as_bytes()).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
            assert!(spare(&path).exists());
        }
        remove(&path).unwrap();
        remove(&path).unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_is_final_keeps_no_room() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("note");
        for (first, count) in [(replace as fn(&Path, &[u8]) -> _, 2), (conclude, 1)] {
            first(&path, b"waits").unwrap();
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), count);
            conclude(&path, b"taken").unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"taken");
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        }
        // It did change.
        replace(&path, b"lost").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"lost");
    }

    #[test]
    fn room_is_kept_for_the_next_content() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("note");
        replace(&path, &[1; 100]).unwrap();
        let inodes = |path: &Path| {
            use std::os::unix::fs::MetadataExt;
            fs::metadata(path).map(|found| (found.ino(), found.blocks()))
        };
        let before = [inodes(&path).unwrap(), inodes(&spare(&path)).unwrap()];
        replace(&path, &[2; 80]).unwrap();
        // Nothing was made and nothing given up: they changed places.
        let after = [inodes(&spare(&path)).unwrap(), inodes(&path).unwrap()];
        assert_eq!(before, after);
    }
}
