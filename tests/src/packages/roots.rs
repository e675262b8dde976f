//! Folders of unpacked packages, and how to run what is in them where it is.

use super::{Recipe, incomplete};
use crate::command::Run;
use crate::layout::write_whole;
use crate::progress::step;
use crate::{Error, Result};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Raised when the same packages are to be unpacked differently.
const FORMAT: u32 = 1;
const STAMP: &str = ".testbed-recipe";
/// Where libraries are: of bookworm, and since.
const LIBRARIES: [&str; 2] = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"];
const LOADER: &str = "ld-linux-x86-64.so.2";

fn stamp(recipe: &Recipe) -> String {
    let Recipe {
        packages,
        suite,
        keep,
        ..
    } = recipe;
    format!(
        "{FORMAT} {} {} {}\n",
        packages.join(" "),
        suite.unwrap_or("-"),
        keep.join(" ")
    )
}

/// Whether a folder holds all of a recipe.
pub(super) fn is_complete(root: &Path, recipe: &Recipe) -> bool {
    fs::read_to_string(root.join(STAMP)).is_ok_and(|text| text == stamp(recipe))
}

/// Unpacks archives into a folder, anew.
pub(super) fn unpack(root: &Path, recipe: &Recipe, archives: &[PathBuf]) -> Result<()> {
    if root.exists() {
        fs::remove_dir_all(root).map_err(Error::file("remove", root))?;
    }
    fs::create_dir_all(root).map_err(Error::file("create", root))?;
    let next = AtomicUsize::new(0);
    let worker = || -> Result<()> {
        while let Some(archive) = archives.get(next.fetch_add(1, Ordering::Relaxed)) {
            Run::new("dpkg-deb")
                .arg("-x")
                .args([archive, root])
                .cure("Remove target/testbed/apt and run again")
                .output()?;
        }
        Ok(())
    };
    step(
        &format!("Unpacking {} ({} packages)", recipe.title, archives.len()),
        || {
            std::thread::scope(|scope| {
                let workers = [scope.spawn(worker), scope.spawn(worker)];
                workers.into_iter().try_for_each(|worker| {
                    worker
                        .join()
                        .unwrap_or_else(|_| Err(Error::Check("unpacking panicked".into())))
                })
            })
        },
    )?;
    write_whole(&root.join(STAMP), stamp(recipe).as_bytes())
}

/// Where the firmware is in a root with QEMU, as arguments.
pub(super) fn firmware(root: &Path) -> Vec<String> {
    ["usr/share/seabios", "usr/lib/ipxe/qemu", "usr/share/qemu"]
        .iter()
        .flat_map(|folder| ["-L".to_owned(), root.join(folder).display().to_string()])
        .collect()
}

/// A script that runs a program of a root with the root's own loader, libraries and QEMU modules, so
/// that it does not matter what this machine has installed.
pub(super) fn wrapper(root: &Path, program: &str, first: &[String]) -> Result<PathBuf> {
    let binary = root.join(program);
    let loader = root.join(loader(root));
    for path in [&binary, &loader] {
        if !path.exists() {
            return Err(incomplete(path));
        }
    }
    let name = binary.file_name().unwrap_or_default().to_owned();
    let folder = root.join(".run");
    fs::create_dir_all(&folder).map_err(Error::file("create", &folder))?;
    let script = folder.join(&name);
    let libraries = search_path(root);
    let modules = root.join("usr/lib/x86_64-linux-gnu/qemu");
    let first: String = first.iter().flat_map(|arg| [" ", arg]).collect();
    let text = format!(
        "#!/bin/sh\nexport QEMU_MODULE_DIR={}\nexec {} --library-path {libraries} {}{first} \"$@\"\n",
        modules.display(),
        loader.display(),
        binary.display(),
    );
    if fs::read_to_string(&script).is_ok_and(|old| old == text) {
        return Ok(script);
    }
    write_whole(&script, text.as_bytes())?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))
        .map_err(Error::file("make executable", &script))?;
    Ok(script)
}

/// The libraries that a program of a root loads, and its loader: what that loader says itself.
pub(super) fn libraries(root: &Path, program: &str) -> Result<Vec<PathBuf>> {
    let loader = loader(root);
    let path = search_path(root);
    let text = Run::new(root.join(&loader))
        .args(["--library-path", &path, "--list"])
        .arg(root.join(program))
        .cure("Remove target/testbed/roots and run again; if it stays, the package has changed")
        .text()?;
    let mut found = listed(&text, root);
    found.push(loader);
    Ok(found)
}

/// `NAME => PATH (ADDRESS)` of files below a root, without the root.
fn listed(text: &str, root: &Path) -> Vec<PathBuf> {
    let path = |line: &str| {
        let (_, rest) = line.split_once(" => ")?;
        let (path, _) = rest.rsplit_once(" (")?;
        Some(Path::new(path).strip_prefix(root).ok()?.to_owned())
    };
    text.lines().filter_map(path).collect()
}

/// The loader of a root, in it.
fn loader(root: &Path) -> PathBuf {
    let [old, new] = LIBRARIES.map(|folder| Path::new(folder).join(LOADER));
    if root.join(&old).exists() { old } else { new }
}

fn search_path(root: &Path) -> String {
    let [old, new] = LIBRARIES;
    [old, new, "usr/lib/x86_64-linux-gnu/pulseaudio"]
        .map(|part| root.join(part).display().to_string())
        .join(":")
}

/// Debian's headers point to /usr/src by absolute paths: turns those into paths into the root.
pub(super) fn relocate_headers(root: &Path) -> Result<()> {
    let sources = root.join("usr/src");
    let folders = fs::read_dir(&sources).map_err(Error::file("list", &sources))?;
    for folder in folders.flatten().map(|entry| entry.path()) {
        for name in ["Makefile", ".kernelvariables"] {
            let path = folder.join(name);
            let Ok(text) = fs::read_to_string(&path) else {
                continue;
            };
            let moved = relocated(&text, &sources);
            if moved != text {
                write_whole(&path, moved.as_bytes())?;
            }
        }
    }
    Ok(())
}

/// Debian writes `include /usr/src/…` at the start of a line; the rest of these files is the kernel's.
fn relocated(text: &str, sources: &Path) -> String {
    text.replace(
        "include /usr/src/",
        &format!("include {}/", sources.display()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_programs_libraries_are_those_below_the_root() {
        let text = "\tlinux-vdso.so.1 (0x7ffd)\n\tlibc.so.6 => /r/lib/x86_64-linux-gnu/libc.so.6 (0x7f00)\n\
                    \tlibm.so.6 => /lib/libm.so.6 (0x7f00)\n\tlibx.so => not found\n";
        assert_eq!(
            listed(text, Path::new("/r")),
            [PathBuf::from("lib/x86_64-linux-gnu/libc.so.6")]
        );
    }

    #[test]
    fn headers_are_relocated_once() {
        let sources = Path::new("/x/usr/src");
        let once = relocated("include /usr/src/linux-headers-common/Makefile\n", sources);
        assert_eq!(once, "include /x/usr/src/linux-headers-common/Makefile\n");
        assert_eq!(relocated(&once, sources), once);
    }
}
