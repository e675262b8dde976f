//! What a host that runs as a guest boots: Debian's kernel, and a disk with Debian's programs and our own.

use super::cpio::Archive;
use super::image::add_modules;
use super::{Boot, build, disk, modules};
use crate::command::Run;
use crate::layout::{Layout, write_whole};
use crate::packages::{Kernel, Packages, Qemu};
use crate::progress::step;
use crate::{Error, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// Where the test bed's own folder is on that disk.
const BED: &str = "bed";
/// Of the disk, in bytes; what is not used takes no room.
const SIZE: u64 = 2 << 30;

/// A host that runs as a guest.
#[derive(Debug)]
pub struct NestedHost {
    /// Its kernel.
    pub kernel: PathBuf,
    /// Its initramfs.
    pub initrd: PathBuf,
    /// Its root, raw.
    pub disk: PathBuf,
}

/// What the test bed finds in such a host, from within.
#[derive(Debug)]
pub struct Contents {
    /// Its own folder, with unpacked packages.
    pub layout: Layout,
    /// The folder of transhumed and transhume.
    pub programs: PathBuf,
    /// What guests there boot.
    pub boot: Boot,
    /// A disk for a guest.
    pub disk: PathBuf,
}

impl Contents {
    /// At these places; nothing is looked for.
    pub fn new() -> Self {
        Self::at(&Path::new("/").join(BED))
    }

    fn at(base: &Path) -> Self {
        Self {
            layout: Layout {
                source: base.to_owned(),
                target: base.to_owned(),
                base: base.to_owned(),
                released: false,
            },
            programs: base.join("programs"),
            boot: Boot {
                kernel: base.join("boot/vmlinuz"),
                initrd: Some(base.join("boot/initrd")),
                append: super::image::APPEND.into(),
            },
            disk: base.join("disks/ext4.raw"),
        }
    }
}

impl Default for Contents {
    fn default() -> Self {
        Self::new()
    }
}

/// Builds such a host: for guests with that disk.
pub fn nested_host(layout: &Layout, packages: &Packages, guest_disk: &Path) -> Result<NestedHost> {
    let folder = layout.folder("nested")?;
    let root = packages.kernel(Kernel::V6_12)?;
    let release = modules::release(&root)?;
    let initrd = folder.join("initrd");
    write_whole(&initrd, &initramfs(packages, &root, &release)?)?;

    let boot = super::boot(layout, packages, Kernel::V6_12)?;
    let programs = build::host_programs(layout)?;
    packages.qemu(Qemu::V10_0)?;
    let own = build::own_program(layout)?;
    let files = folder.join("files");
    let disk = folder.join("host.raw");
    step("Making the nested host's disk", || {
        if files.exists() {
            fs::remove_dir_all(&files).map_err(Error::file("remove", &files))?;
        }
        link(&packages.nested_host()?, &files)?;
        make_folders(&files)?;
        write_whole(&files.join("start"), include_bytes!("nested-start"))?;
        let inside = Contents::at(&files.join(BED));
        let qemu = layout.root(Qemu::V10_0.folder());
        link(&qemu, &inside.layout.root(Qemu::V10_0.folder()))?;
        for program in ["transhumed", "transhume"] {
            link(&programs.join(program), &inside.programs.join(program))?;
        }
        link(&own, &inside.layout.base.join("testbed"))?;
        link(&boot.kernel, &inside.boot.kernel)?;
        if let (Some(from), Some(to)) = (&boot.initrd, &inside.boot.initrd) {
            link(from, to)?;
        }
        link(guest_disk, &inside.disk)?;
        let image = fs::File::create(&disk).map_err(Error::file("create", &disk))?;
        image.set_len(SIZE).map_err(Error::file("size", &disk))?;
        disk::ext4(&files, &disk, 0, SIZE)?;
        fs::remove_dir_all(&files).map_err(Error::file("remove", &files))
    })?;
    Ok(NestedHost {
        kernel: root.join(format!("boot/vmlinuz-{release}")),
        initrd,
        disk,
    })
}

fn initramfs(packages: &Packages, root: &Path, release: &str) -> Result<Vec<u8>> {
    let busybox = packages.busybox()?;
    let busybox = fs::read(&busybox).map_err(Error::file("read", &busybox))?;
    let mut archive = Archive::default();
    for folder in ["bin", "dev", "host", "modules", "proc", "sys"] {
        archive.folder(folder);
    }
    archive.device("dev/console", 5, 1);
    archive.file("init", include_bytes!("nested-init"));
    archive.file("bin/busybox", &busybox);
    add_modules(&mut archive, root, release, &modules::NESTED_HOST)?;
    Ok(archive.finish())
}

/// What a disk has beside packages, each with the folder that it is in.
fn make_folders(files: &Path) -> Result<()> {
    let folders = ["dev", "proc", "run", "sys", "tmp", "bed/boot", "bed/disks"];
    for name in folders.into_iter().chain(["bed/programs", "bed/roots"]) {
        let path = files.join(name);
        fs::create_dir_all(&path).map_err(Error::file("create", &path))?;
    }
    // QEMU runs as somebody without rights.
    let users = "root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n";
    write_whole(&files.join("etc/passwd"), users.as_bytes())?;
    let shell = files.join("bin/sh");
    std::os::unix::fs::symlink("busybox", &shell).map_err(Error::file("link", &shell))
}

/// Takes a file or folder over as it is, without a copy of its bytes.
fn link(from: &Path, to: &Path) -> Result<()> {
    Run::new("cp")
        .arg("-al")
        .args([from, to])
        .cure("target/ must be one file system")
        .output()
        .map(drop)
}
