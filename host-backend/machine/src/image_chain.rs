//! A disk's image with all that it is based on: whoever may name an image names those files too. Each is opened here,
//! once, and is looked at as it was opened; QEMU gets the descriptors, and what to make of each, and opens nothing by
//! itself. The format is QEMU's `docs/interop/qcow2.txt`.

use crate::definition::Format;
use nix::fcntl::OFlag;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Images on top of each other.
const MAX_CHAIN: usize = 32;
/// The header with its extensions is no longer; QEMU wants it within the first cluster.
const MAX_HEADER: usize = 64 << 10;
/// As QEMU's.
const MAX_NAME: usize = 1023;
const MAGIC: &[u8] = b"QFI\xfb";
/// Of `incompatible_features`: the guest's data is in a file beside the image.
const EXTERNAL_DATA: u64 = 1 << 2;
const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;

/// Direct reads are made in multiples of this many bytes, to memory at such.
const BLOCK: usize = 4096;

/// One file of a disk.
#[derive(Debug)]
pub struct Node {
    /// Its name, for messages and for whoever looks at the running QEMU.
    pub path: PathBuf,
    /// What it is read as.
    pub format: Format,
    /// It, past the host's page cache.
    pub file: File,
    /// Whether it is a block device.
    pub block_device: bool,
    /// Whether it is opened for reading alone.
    pub read_only: bool,
}

/// A disk: its image, and below it what that is based on.
#[derive(Debug)]
pub struct Image {
    /// At least one.
    pub nodes: Vec<Node>,
}

impl Image {
    /// Opens an image and all that it is based on. `admit` sees each file, by a descriptor that can only tell what it is,
    /// before it is opened.
    ///
    /// # Errors
    /// Of files; [`io::ErrorKind::InvalidData`] with the cause for images that leave to QEMU what to open, and
    /// whatever `admit` says.
    pub fn open(
        path: &Path,
        format: Format,
        read_only: bool,
        admit: impl Fn(&Path, &File) -> io::Result<()>,
    ) -> io::Result<Self> {
        let (mut path, mut format, mut read_only) = (path.to_owned(), format, read_only);
        let mut nodes = Vec::new();
        loop {
            let (file, block_device) = open(&path, OFlag::O_DIRECT, read_only, &admit)?;
            let next = match format {
                Format::Raw => None,
                Format::Qcow2 => next(&file, &path)?,
            };
            nodes.push(Node {
                path,
                format,
                file,
                block_device,
                read_only,
            });
            let Some((below, is_image)) = next else {
                return Ok(Self { nodes });
            };
            if nodes.len() > MAX_CHAIN {
                return Err(too_many());
            }
            (path, format, read_only) = (
                below,
                if is_image { Format::Qcow2 } else { Format::Raw },
                true,
            );
        }
    }
}

/// The files below an image, nearest first. A file that is no qcow2 image, as its first bytes say, has none. `admit` sees
/// each before it is opened.
///
/// # Errors
/// Of files; [`io::ErrorKind::InvalidData`] with the cause for images that leave to QEMU what to open; and whatever `admit`
/// says.
pub fn below(image: &Path, admit: impl Fn(&Path) -> io::Result<()>) -> io::Result<Vec<PathBuf>> {
    let mut found: Vec<PathBuf> = Vec::new();
    loop {
        let image = found.last().map_or(image, PathBuf::as_path);
        let (file, _) = open(image, OFlag::empty(), true, |_, _| Ok(()))?;
        let Some((path, is_image)) = next(&file, image)? else {
            return Ok(found);
        };
        admit(&path)?;
        found.push(path);
        if !is_image {
            return Ok(found);
        }
        if found.len() >= MAX_CHAIN {
            return Err(too_many());
        }
    }
}

fn too_many() -> io::Error {
    wrong(format!(
        "more than {MAX_CHAIN} images are on top of each other"
    ))
}

fn wrong(cause: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, cause.into())
}

/// The file that an image is based on, and whether that is a qcow2 image again.
fn next(file: &File, image: &Path) -> io::Result<Option<(PathBuf, bool)>> {
    based_on(&read_header(file)?, image)
}

/// The same by the first bytes of the file, which are its header and may be more. Without I/O.
///
/// # Errors
/// [`io::ErrorKind::InvalidData`] with the cause for images that leave to QEMU what to open.
pub fn based_on(header: &[u8], image: &Path) -> io::Result<Option<(PathBuf, bool)>> {
    if !header.starts_with(MAGIC) {
        return Ok(None);
    }
    let shown = image.display();
    let short = || wrong(format!("{shown} ends within its header"));
    let number = |at: usize| word(header, at).ok_or_else(short);
    let version = number(4)?;
    let long =
        |at: usize| Ok::<_, io::Error>(u64::from(number(at)?) << 32 | u64::from(number(at + 4)?));
    let (features, length) = match version {
        2 => (0, 72),
        3 => (long(72)?, number(100)?),
        _ => {
            return Err(wrong(format!(
                "{shown} is qcow2 of the unknown version {version}"
            )));
        }
    };
    if features & EXTERNAL_DATA != 0 {
        return Err(wrong(format!(
            "{shown} keeps its data in another file (data_file); make one file of it: qemu-img convert -O qcow2"
        )));
    }
    let (at, size) = (long(8)?, number(16)? as usize);
    if at == 0 {
        return Ok(None);
    }
    if size > MAX_NAME {
        return Err(wrong(format!(
            "{shown} names a backing file of {size} bytes"
        )));
    }
    let far = || {
        wrong(format!(
            "{shown} names its backing file beyond the first {} KiB",
            MAX_HEADER >> 10
        ))
    };
    let at = usize::try_from(at).map_err(|_| far())?;
    let end = at.saturating_add(size);
    if end > MAX_HEADER {
        return Err(far());
    }
    let name = header.get(at..end).ok_or_else(short)?;
    let name = String::from_utf8(name.to_vec())
        .ok()
        .filter(|name| !name.is_empty() && !name.chars().any(char::is_control))
        .ok_or_else(|| wrong(format!("{shown} names a backing file that is no text")))?;
    // As QEMU tells a protocol (nbd:…, json:…) from a path.
    if name
        .find([':', '/'])
        .is_some_and(|at| name.as_bytes()[at] == b':')
    {
        return Err(wrong(format!(
            "{shown} is based on {name:?}, which is no path"
        )));
    }
    let format = backing_format(&header[..at], length as usize).map_err(|cause| {
        wrong(format!(
            "{shown} {cause}, which can be read in two ways; write its header anew: qemu-img rebase -u -b {name:?} -F \
             raw|qcow2 {shown}"
        ))
    })?;
    let is_image = match format {
        Some(format) if format == b"qcow2" => true,
        Some(format) if format == b"raw" => false,
        // QEMU would guess, also formats whose files name files.
        _ => {
            return Err(wrong(format!(
                "{shown} does not say that its backing file is raw or qcow2; say it: qemu-img rebase -u -b {name:?} \
                 -F raw|qcow2 {shown}"
            )));
        }
    };
    Ok(Some((image.parent().unwrap_or(image).join(name), is_image)))
}

/// Opens a file or a block device that `admit` admits, and tells if it is a device. Nothing else is ever opened: that alone
/// can do something, as with a watchdog.
pub fn open(
    path: &Path,
    flags: OFlag,
    read_only: bool,
    admit: impl Fn(&Path, &File) -> io::Result<()>,
) -> io::Result<(File, bool)> {
    let found = OpenOptions::new()
        .read(true)
        .custom_flags(OFlag::O_PATH.bits())
        .open(path)?;
    admit(path, &found)?;
    let kind = found.metadata()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(wrong(format!(
            "{} is neither a file nor a block device",
            path.display()
        )));
    }
    let file = OpenOptions::new()
        .read(true)
        .write(!read_only)
        .custom_flags((flags | OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits())
        .open(format!("/proc/self/fd/{}", found.as_raw_fd()))?;
    Ok((file, kind.is_block_device()))
}

/// The first bytes of an image, for a file that may be open for direct reads.
fn read_header(file: &File) -> io::Result<Vec<u8>> {
    let mut memory = vec![0; MAX_HEADER + BLOCK];
    let skip = memory.as_ptr().align_offset(BLOCK);
    let blocks = memory
        .get_mut(skip..)
        .and_then(|rest| rest.get_mut(..MAX_HEADER))
        .ok_or_else(|| wrong("memory cannot be aligned"))?;
    let mut done = 0;
    while done < MAX_HEADER {
        match file.read_at(&mut blocks[done..], done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        }
        // The file ends there, and a direct read cannot begin there.
        if !done.is_multiple_of(BLOCK) {
            break;
        }
    }
    Ok(blocks[..done].to_vec())
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_be_bytes(bytes.try_into().ok()?))
}

/// What the header's extensions, from `at` to its end, say of the backing file's format; or why QEMU might read them
/// otherwise: of several it takes the last, and it stops where the backing file's name begins.
fn backing_format(header: &[u8], mut at: usize) -> Result<Option<&[u8]>, &'static str> {
    const LONG: &str = "has header extensions that reach into its backing file's name";
    let mut found = None;
    while at < header.len() {
        let (Some(kind), Some(length)) = (word(header, at), word(header, at.saturating_add(4)))
        else {
            return Err(LONG);
        };
        if kind == EXTENSION_END {
            break;
        }
        let start = at.saturating_add(8);
        let content = header.get(start..start.saturating_add(length as usize));
        let content = content.ok_or(LONG)?;
        if kind == EXTENSION_BACKING_FORMAT && found.replace(content).is_some() {
            return Err("names the format of its backing file twice");
        }
        // It was within the header: no overflow.
        at = start + (length as usize).next_multiple_of(8);
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use transhume_testing::qcow2_header as header;

    fn all_below(image: &Path) -> io::Result<Vec<PathBuf>> {
        below(image, |_| Ok(()))
    }

    struct Folder(tempfile::TempDir);

    impl Folder {
        fn new() -> Self {
            Self(tempfile::tempdir().expect("a folder"))
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
            std::fs::write(self.path(name), bytes).expect("written");
            self.path(name)
        }

        fn refused(&self, bytes: &[u8], word: &str) {
            let error = all_below(&self.write("image", bytes)).expect_err(word);
            assert!(error.to_string().contains(word), "{error}");
        }
    }

    #[test]
    fn the_chain_is_followed_to_its_end() {
        let folder = Folder::new();
        let top = folder.write("top", &header("middle", Some("qcow2"), 0));
        folder.write("middle", &header("/base.raw", Some("raw"), 0));
        assert_eq!(
            all_below(&top).expect("a chain"),
            [folder.path("middle"), PathBuf::from("/base.raw")]
        );
        let alone = folder.write("alone", &header("", None, 0));
        assert!(all_below(&alone).expect("an image").is_empty());
        let raw = folder.write("raw", b"anything");
        assert!(all_below(&raw).expect("a file").is_empty());
    }

    #[test]
    fn what_would_be_left_to_qemu_is_refused() {
        let folder = Folder::new();
        folder.refused(&header("nbd:host:1", Some("raw"), 0), "no path");
        folder.refused(&header("json:{}", Some("raw"), 0), "no path");
        folder.refused(&header("base", None, 0), "qemu-img rebase");
        folder.refused(&header("base", Some("vmdk"), 0), "qemu-img rebase");
        folder.refused(&header("ba\0se", Some("raw"), 0), "no text");
        folder.refused(&header(&"x".repeat(2000), Some("raw"), 0), "2000 bytes");
        folder.refused(&header("", None, EXTERNAL_DATA), "data_file");
        folder.refused(&header("image", Some("qcow2"), 0), "on top of each other");
        folder.refused(&header("base", Some("raw"), 0)[..90], "ends within");
        let mut endless = header("base", Some("raw"), 0);
        endless[108..112].copy_from_slice(&u32::MAX.to_be_bytes());
        folder.refused(&endless, "reach into");
        // QEMU takes the last of two, and reads nothing from the backing file's name on.
        let twice = |first: &str, second: &str| {
            let mut image = header("base", Some(first), 0);
            let second = header("base", Some(second), 0)[120..136].to_vec();
            image[136..152].copy_from_slice(&second);
            image
        };
        folder.refused(&twice("raw", "qcow2"), "twice");
        folder.refused(&twice("qcow2", "qcow2"), "twice");
        let mut beyond = header("base", None, 0);
        let format = header("base", Some("qcow2"), 0)[120..144].to_vec();
        // An extension over all of the rest; behind the name another one.
        beyond[108..112].copy_from_slice(&(512_u32 + 8 - 112).to_be_bytes());
        beyond[520..544].copy_from_slice(&format);
        folder.refused(&beyond, "reach into");
        let mut far = header("base", Some("raw"), 0);
        far[8..16].copy_from_slice(&(1_u64 << 20).to_be_bytes());
        far.resize((1 << 20) + 4, b'x');
        folder.refused(&far, "beyond the first 64 KiB");
        let mut future = header("", None, 0);
        future[7] = 9;
        folder.refused(&future, "unknown version 9");
        assert!(all_below(&folder.0.path().join("none")).is_err());
        assert!(all_below(folder.0.path()).is_err());
    }

    /// A pipe tells: who wants to write to it waits until somebody opens it to read.
    #[test]
    fn what_is_refused_is_not_opened() {
        use nix::fcntl::OFlag;
        let folder = tempfile::tempdir().expect("a folder");
        let pipe = folder.path().join("pipe");
        nix::unistd::mkfifo(
            &pipe,
            nix::sys::stat::Mode::S_IRUSR | nix::sys::stat::Mode::S_IWUSR,
        )
        .expect("a pipe");
        // It comes back when somebody opens the other end.
        let writer = std::thread::spawn({
            let pipe = pipe.clone();
            move || OpenOptions::new().write(true).open(pipe)
        });
        let pause = || std::thread::sleep(std::time::Duration::from_millis(50));
        pause();
        assert!(open(&pipe, OFlag::empty(), true, |_, _| Ok(())).is_err());
        pause();
        assert!(!writer.is_finished(), "it was opened");
        let both = OpenOptions::new().read(true).write(true).open(&pipe);
        let written = writer.join().expect("no panic");
        assert!(both.is_ok() && written.is_ok());
        let image = folder.path().join("image");
        std::fs::write(&image, "x").expect("a file");
        let seen = std::cell::Cell::new(false);
        let admit = |_: &Path, file: &File| {
            let mut byte = [0];
            // It can only be looked at.
            seen.set(file.read_at(&mut byte, 0).is_err());
            Err(io::Error::other("no"))
        };
        assert!(Image::open(&image, Format::Raw, false, admit).is_err());
        assert!(seen.get());
        let top = folder.path().join("top");
        std::fs::write(&top, header("base", Some("qcow2"), 0)).expect("an image");
        // It is not there, which nobody is told who may not have it.
        let refused = below(&top, |_| Err(io::ErrorKind::PermissionDenied.into()));
        let kind = refused.map_err(|error| error.kind());
        assert_eq!(kind, Err(io::ErrorKind::PermissionDenied));
    }
}
