//! Who of this host's processes holds a file, for an operator whose VM could not take its disk.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Processes that are named, at most.
const LIMIT: usize = 4;

/// The processes of this host, but for this one, that have one of the files open, as in `4711 (qemu-system-x86)`.
pub fn holders<'a>(files: impl IntoIterator<Item = &'a Path>) -> Vec<String> {
    let wanted: Vec<(u64, u64)> = files
        .into_iter()
        .filter_map(|path| fs::metadata(path).ok())
        .map(|found| (found.dev(), found.ino()))
        .collect();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| *pid != std::process::id() && holds_one(*pid, &wanted))
        .take(LIMIT)
        .map(|pid| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            format!("{pid} ({})", name.trim().escape_debug())
        })
        .collect()
}

fn holds_one(pid: u32, wanted: &[(u64, u64)]) -> bool {
    let open = fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten();
    open.flatten().any(|entry| {
        let file = fs::metadata(entry.path());
        file.is_ok_and(|file| wanted.contains(&(file.dev(), file.ino())))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn names_who_has_a_file_open() {
        let folder = tempfile::tempdir().expect("a folder");
        let (held, free) = (folder.path().join("held"), folder.path().join("free"));
        fs::write(&held, "").expect("written");
        fs::write(&free, "").expect("written");
        let file = fs::File::open(&held).expect("a file");
        let mut process = Command::new("sleep")
            .arg("600")
            .stdin(Stdio::from(file))
            .spawn()
            .expect("a process");
        let found = holders([held.as_path()]);
        let none = holders([free.as_path(), Path::new("/none")]);
        process.kill().expect("killed");
        process.wait().expect("its end");
        // Until it has become `sleep` it has our name.
        let pid = format!("{} (", process.id());
        assert!(found.iter().any(|one| one.starts_with(&pid)), "{found:?}");
        assert!(none.is_empty(), "{none:?}");
    }
}
