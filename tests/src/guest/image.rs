//! The guest's kernel and initramfs.

use super::cpio::Archive;
use super::{build, modules};
use crate::layout::{Layout, write_whole};
use crate::packages::{Kernel, Packages};
use crate::{Error, Result};
use std::fs;
use std::path::PathBuf;

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
    }
    let mut order = String::new();
    for (name, content) in modules::load_order(&root, &release)? {
        archive.file(&format!("modules/{name}"), &content);
        order.push_str(&name);
        order.push('\n');
    }
    archive.file("modules/order", order.as_bytes());
    let folder = layout.folder("boot")?;
    let initrd = folder.join(format!("initrd-{}", kernel.version()));
    let bytes = archive.finish();
    if fs::read(&initrd).ok().as_deref() != Some(&bytes) {
        write_whole(&initrd, &bytes)?;
    }
    Ok(Boot {
        kernel: root.join(format!("boot/vmlinuz-{release}")),
        initrd: Some(initrd),
        append: "console=ttyS0 quiet panic=-1 mitigations=off".into(),
    })
}
