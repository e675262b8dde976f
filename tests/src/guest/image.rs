//! The guest's kernel and initramfs.

use super::cpio::Archive;
use super::{build, modules};
use crate::layout::{Layout, write_whole};
use crate::packages::{Kernel, Packages};
use crate::{Error, Result};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The dynamic loader.
const LOADER: &str = "ld-linux-x86-64.so.2";

/// A guest's command line, before its settings.
pub(super) const APPEND: &str = "console=ttyS0 quiet panic=-1 mitigations=off";

/// What a guest boots from.
#[derive(Debug, Clone)]
pub struct Boot {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initramfs, if it has one.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line, to which a workload's settings are added.
    pub append: String,
}

/// Builds what a guest boots from. The module and the agent are in it; whether they are started is said
/// on the kernel's command line (`testbed.module=no`, `testbed.agent=no`).
pub fn boot(layout: &Layout, packages: &Packages, kernel: Kernel) -> Result<Boot> {
    make(layout, packages, kernel, false)
}

/// The same with servers in it: redis and nginx. `testbed.serve=NAME` starts one, `testbed.address=ADDRESS/PREFIX` is
/// its network card's address.
pub fn boot_with_servers(layout: &Layout, packages: &Packages, kernel: Kernel) -> Result<Boot> {
    make(layout, packages, kernel, true)
}

fn make(layout: &Layout, packages: &Packages, kernel: Kernel, servers: bool) -> Result<Boot> {
    let root = packages.kernel(kernel)?;
    let release = modules::release(&root)?;
    let more = if servers { "-servers" } else { "" };
    let name = format!("initrd-{}{more}", kernel.version());
    let initrd = build::once(layout, &name, || {
        initrd(layout, packages, kernel, servers, &name)
    })?;
    Ok(Boot {
        kernel: root.join(format!("boot/vmlinuz-{release}")),
        initrd: Some(initrd),
        append: APPEND.into(),
    })
}

fn initrd(
    layout: &Layout,
    packages: &Packages,
    kernel: Kernel,
    servers: bool,
    name: &str,
) -> Result<PathBuf> {
    let root = packages.kernel(kernel)?;
    let release = modules::release(&root)?;
    let read = |path: PathBuf| fs::read(&path).map_err(Error::file("read", &path));
    let mut archive = Archive::default();
    for folder in ["bin", "dev", "disk", "modules", "proc", "sys", "tmp"] {
        archive.folder(folder);
    }
    archive.device("dev/console", 5, 1);
    archive.file("init", include_bytes!("init"));
    archive.file("bin/busybox", &read(packages.busybox()?)?);
    let workload = build::static_program(layout, "guest-workload", "guest-workload")?;
    archive.file("bin/guest-workload", &read(workload)?);
    if layout.source.join("guest-agent/src/main.rs").exists() {
        let agent = build::static_program(layout, "transhume-agent", "transhume-agent")?;
        archive.file("bin/transhume-agent", &read(agent)?);
    }
    if layout.source.join("kernel-module/Kbuild").exists() {
        let module = build::kernel_module(layout, packages, kernel)?;
        archive.file("modules/transhume.ko", &read(module)?);
        archive.file("bin/gate-test", &read(build::gate_test(layout)?)?);
        let other = build::kernel_module(layout, packages, kernel.other())?;
        archive.file("modules/transhume-other.ko", &read(other)?);
        let livepatch = build::livepatch(layout, packages, kernel)?;
        archive.file("modules/livepatch_test.ko", &read(livepatch)?);
    }
    add_modules(&mut archive, &root, &release, &modules::GUEST)?;
    if servers {
        add_servers(packages, &mut archive)?;
    }
    let initrd = layout.folder("boot")?.join(name);
    let bytes = archive.finish();
    if fs::read(&initrd).ok().as_deref() != Some(&bytes) {
        write_whole(&initrd, &bytes)?;
    }
    Ok(initrd)
}

/// A kernel's modules, and in which order to load them.
pub(super) fn add_modules(
    archive: &mut Archive,
    root: &Path,
    release: &str,
    wanted: &[&str],
) -> Result<()> {
    let mut order = String::new();
    for (name, content) in modules::load_order(root, release, wanted)? {
        archive.file(&format!("modules/{name}"), &content);
        order.push_str(&name);
        order.push('\n');
    }
    archive.file("modules/order", order.as_bytes());
    Ok(())
}

/// Servers, where Debian has them, and what they load.
fn add_servers(packages: &Packages, archive: &mut Archive) -> Result<()> {
    let root = packages.servers()?;
    let mut files = BTreeSet::new();
    for program in ["usr/bin/redis-server", "usr/sbin/nginx"] {
        files.insert(PathBuf::from(program));
        files.extend(packages.libraries(&root, program)?);
    }
    let folders: BTreeSet<&Path> = files
        .iter()
        .flat_map(|file| file.ancestors().skip(1))
        .chain([Path::new("etc"), Path::new("lib64")])
        .collect();
    // Sorted, so that parents come first; the archive's own folders are there already.
    for folder in folders {
        if !folder.as_os_str().is_empty() {
            archive.folder(&folder.display().to_string());
        }
    }
    for file in &files {
        let path = root.join(file);
        let content = fs::read(&path).map_err(Error::file("read", &path))?;
        archive.file(&file.display().to_string(), &content);
        // A program names its loader by this path, which is a link where Debian is installed.
        if file.ends_with(LOADER) {
            archive.file(&format!("lib64/{LOADER}"), &content);
        }
    }
    archive.file("etc/passwd", b"root:x:0:0::/:/bin/sh\n");
    archive.file("etc/group", b"root:x:0:\n");
    Ok(())
}
