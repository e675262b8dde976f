//! Programs of the machine that tests run on.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Whether a user without rights gets through to a file.
pub fn others_get_through(file: &Path) -> bool {
    let open = |folder: &Path| std::fs::metadata(folder).is_ok_and(|it| it.mode() & 0o001 != 0);
    file.ancestors().all(open)
}

/// A program of the machine, by what PATH says.
///
/// # Panics
/// If there is none.
pub fn program(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
        .unwrap_or_else(|| panic!("{name} is not in PATH (install qemu-system-x86 and qemu-utils)"))
}
