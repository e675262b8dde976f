//! Small files that are either the old one or the new one, never a part, also after a power cut.
//!
//! Beside each there is another of its size, `NAME.new`, where the next content is written before the two change places. So a
//! file that was written once can be replaced when there is no room any more, as long as it does not grow by a block:
//! what must be noted at a migration's worst moment does not fail for that.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};

/// One at a time: two who write to one file would change places with each other's old content.
static WRITING: Mutex<()> = Mutex::new(());

fn writing() -> MutexGuard<'static, ()> {
    WRITING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The file beside another one.
fn spare(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    name.into()
}

/// Replaces a file, or makes it. It is on disk when this returns.
pub fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let _writing = writing();
    let spare = write_beside(path, content)?;
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
            write(&spare, content).inspect_err(|_| drop(remove_all(path)))?;
        }
    }
    sync_folder(path)
}

/// The same for what will not change any more: no room is kept for another content.
pub fn conclude(path: &Path, content: &[u8]) -> io::Result<()> {
    let _writing = writing();
    let spare = write_beside(path, content)?;
    fs::rename(&spare, path)?;
    sync_folder(path)
}

/// Writes what a file is to become into the one beside it, which is returned.
fn write_beside(path: &Path, content: &[u8]) -> io::Result<PathBuf> {
    let spare = spare(path);
    if spare.exists() {
        // If that failed the last time, the one on disk may be what is the other one here.
        sync_folder(path)?;
    }
    write(&spare, content)?;
    Ok(spare)
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

/// Gives a file another name, with the room that is kept beside it; it takes the place of one that has that name. One that
/// is not there is left so.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    let _writing = writing();
    for (from, to) in [(from.to_owned(), to.to_owned()), (spare(from), spare(to))] {
        match fs::rename(from, to) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    sync_folder(to)
}

/// Gives up the room that is kept beside a file.
pub fn give_room_up(path: &Path) -> io::Result<()> {
    let _writing = writing();
    fs::remove_file(spare(path))
}

/// Removes a file, if it is there.
pub fn remove(path: &Path) -> io::Result<()> {
    let _writing = writing();
    remove_all(path)
}

fn remove_all(path: &Path) -> io::Result<()> {
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
    fn notes_of_one_stem_have_room_of_their_own() {
        let folder = tempfile::tempdir().unwrap();
        let [here, coming] = ["web1.toml", "web1.arriving"].map(|name| folder.path().join(name));
        replace(&here, b"defined").unwrap();
        replace(&coming, b"comes").unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 4);
        rename(&coming, &here).unwrap();
        assert_eq!(fs::read(&here).unwrap(), b"comes");
        assert!(!coming.exists() && spare(&here).exists());
        // What is not there changes nothing.
        rename(&coming, &here).unwrap();
        replace(&here, b"is here").unwrap();
        assert_eq!(fs::read(&here).unwrap(), b"is here");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn who_writes_at_once_loses_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("note");
        replace(&path, b"0").unwrap();
        std::thread::scope(|scope| {
            for number in 1..=2_u8 {
                let path = &path;
                scope.spawn(move || {
                    for round in 0..50_u8 {
                        replace(path, &[number, round]).unwrap();
                    }
                });
            }
        });
        // Whoever was last wrote its last.
        assert_eq!(fs::read(&path).unwrap()[1], 49);
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
