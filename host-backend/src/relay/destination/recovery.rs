//! What a restarted daemon does with the QEMUs that it had prepared.
//!
//! A file in the VM's run directory says how far it was, and is written before that is acted on:
//! `waiting JOB` from before QEMU starts, `committed JOB` (or `committed-paused JOB`) from the source's
//! commit until the daemon has taken note of the VM.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Host;
use crate::hypervisor::{Definition, Error, LaunchSettings, Vm};

const MARK: &str = "incoming";
const LAST: &str = "arrived";
const DEFINITION: &str = "definition.toml";
/// How often, and after which time each, a QEMU that answers wrongly is looked at again.
const ENDING_LOOKS: u32 = 20;
const ENDING_GLANCE: Duration = Duration::from_millis(100);

/// How far an arriving VM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mark {
    /// It belongs to the source.
    Waiting,
    /// It belongs to this host, and runs here unless it was paused at the source.
    Committed {
        /// Whether it is to run.
        runs: bool,
    },
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    let fresh = path.with_extension("new");
    std::fs::write(&fresh, text)?;
    std::fs::rename(fresh, path)
}

/// Notes how far the VM is.
pub(super) fn mark(folder: &Path, mark: Mark, job: u64) -> io::Result<()> {
    let word = match mark {
        Mark::Waiting => "waiting",
        Mark::Committed { runs: true } => "committed",
        Mark::Committed { runs: false } => "committed-paused",
    };
    write(&folder.join(MARK), &format!("{word} {job:016x}\n"))
}

/// Notes, in a folder that is made for it, that a VM is about to arrive: the mark first, so that whatever
/// is in the folder is known to be an arriving VM's.
pub(super) fn begin(folder: &Path, definition: &str, job: u64) -> io::Result<()> {
    std::fs::create_dir_all(folder)?;
    mark(folder, Mark::Waiting, job)?;
    write(&folder.join(DEFINITION), definition)
}

/// Notes that the daemon knows the VM, and which migration brought it.
pub(super) fn settle(folder: &Path, job: u64) -> io::Result<()> {
    write(&folder.join(LAST), &format!("{job:016x}\n"))?;
    clear(folder)
}

/// Takes the mark away: there is nothing to recover.
pub(super) fn clear(folder: &Path) -> io::Result<()> {
    match std::fs::remove_file(folder.join(MARK)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn read(folder: &Path) -> Option<(Mark, u64)> {
    let text = std::fs::read_to_string(folder.join(MARK)).ok()?;
    let (word, job) = text.trim_end().split_once(' ')?;
    let job = u64::from_str_radix(job, 16).ok()?;
    match word {
        "waiting" => Some((Mark::Waiting, job)),
        "committed" => Some((Mark::Committed { runs: true }, job)),
        "committed-paused" => Some((Mark::Committed { runs: false }, job)),
        _ => None,
    }
}

/// Whether this host got the VM by that migration, as far as its run directory tells; `None` while it
/// cannot be said.
pub(super) fn owns(host: &dyn Host, vm: &str, job: u64) -> Option<bool> {
    if !crate::hypervisor::definition::is_name(vm) {
        return None;
    }
    let files = host.launch_settings().files(vm);
    let folder = files.folder();
    match read(folder) {
        Some((Mark::Committed { .. }, marked)) if marked == job => return Some(true),
        // Its QEMU may still be there: not before it is killed.
        Some((Mark::Waiting, marked)) if marked == job => return None,
        _ => {}
    }
    let last = std::fs::read_to_string(folder.join(LAST)).ok();
    let last = last.and_then(|text| u64::from_str_radix(text.trim_end(), 16).ok());
    Some(last == Some(job))
}

/// Finishes or undoes what an earlier daemon of this host had begun. Call it before serving peers. A VM
/// that was committed is returned, running unless it was paused; one that was not has its QEMU killed.
pub async fn recover(settings: &LaunchSettings) -> Vec<Vm> {
    let mut arrived = Vec::new();
    let Ok(folders) = std::fs::read_dir(settings.run_directory.join("vms")) else {
        return arrived;
    };
    let folders: Vec<PathBuf> = folders
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    for folder in folders {
        let Some((mark, job)) = read(&folder) else {
            // What was made for a mark that did not come any more; a folder in use is not empty.
            let _ = std::fs::remove_file(folder.join(MARK).with_extension("new"));
            let _ = std::fs::remove_dir(&folder);
            continue;
        };
        match recover_one(settings, &folder, mark).await {
            Ok(Some(vm)) => {
                if let Err(error) = settle(&folder, job) {
                    tracing::warn!(folder = %folder.display(), %error, "mark of an arriving VM");
                }
                arrived.push(vm);
            }
            Ok(None) => {}
            Err(error) => {
                tracing::error!(
                    folder = %folder.display(), ?mark, %error,
                    "the QEMU of an unfinished migration could not be recovered: look at it"
                );
            }
        }
    }
    arrived
}

async fn recover_one(
    settings: &LaunchSettings,
    folder: &Path,
    mark: Mark,
) -> Result<Option<Vm>, Error> {
    let path = folder.join(DEFINITION);
    if mark == Mark::Waiting && !path.exists() {
        // Its QEMU was not started: that is done with a definition.
        std::fs::remove_dir_all(folder).map_err(|error| Error::file("remove", folder, error))?;
        return Ok(None);
    }
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let definition = Definition::parse(&text)?;
    let files = settings.files(&definition.name);
    let qmp = files.qmp();
    let adopt = || Vm::adopt(&definition, &qmp, settings);
    let mut adopted = adopt().await;
    for _ in 0..ENDING_LOOKS {
        if matches!(adopted, Ok(_) | Err(Error::Connect { .. })) {
            break;
        }
        // Its stream has just ended, and it may be about to end itself.
        tokio::time::sleep(ENDING_GLANCE).await;
        adopted = adopt().await;
    }
    match mark {
        Mark::Waiting => {
            match adopted {
                Ok(vm) => {
                    tracing::info!(
                        vm = definition.name,
                        "its migration was cut off here: QEMU ends"
                    );
                    vm.kill().await?;
                }
                // It ended with the stream.
                Err(Error::Connect { .. }) => {}
                // The mark stays: it may live.
                Err(error) => return Err(error),
            }
            files.remove()?;
            Ok(None)
        }
        Mark::Committed { runs } => {
            let vm = adopted?;
            tracing::info!(
                vm = definition.name,
                "it had been handed over: it belongs here"
            );
            if runs {
                vm.qmp().cont().await?;
            }
            Ok(Some(vm))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_read_as_written() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        assert_eq!(read(folder), None);
        mark(folder, Mark::Waiting, 7).unwrap();
        assert_eq!(read(folder), Some((Mark::Waiting, 7)));
        for runs in [true, false] {
            mark(folder, Mark::Committed { runs }, u64::MAX).unwrap();
            assert_eq!(read(folder), Some((Mark::Committed { runs }, u64::MAX)));
        }
        settle(folder, u64::MAX).unwrap();
        assert_eq!(read(folder), None);
        clear(folder).unwrap();
        std::fs::write(folder.join(MARK), "waiting nothing").unwrap();
        assert_eq!(read(folder), None);
    }

    #[tokio::test]
    async fn whatever_was_made_for_an_arrival_goes() {
        let run = tempfile::tempdir().unwrap();
        let vms = run.path().join("vms");
        let cut_off = |name: &str, files: &[&str]| {
            std::fs::create_dir_all(vms.join(name)).unwrap();
            for file in files {
                std::fs::write(vms.join(name).join(file), "").unwrap();
            }
        };
        cut_off("empty", &[]);
        cut_off("unmarked", &["incoming.new"]);
        cut_off("marked", &["definition.new"]);
        mark(&vms.join("marked"), Mark::Waiting, 7).unwrap();
        begin(&vms.join("defined"), "name = \"", 7).unwrap();
        cut_off("in-use", &["definition.toml"]);
        let settings = LaunchSettings {
            host: "hosta".into(),
            run_directory: run.path().into(),
            qemu: "qemu-system-x86_64".into(),
        };
        assert!(recover(&settings).await.is_empty());
        let mut left: Vec<_> = std::fs::read_dir(&vms)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        left.sort();
        // What cannot be read is left for a person to look at.
        assert_eq!(left, ["defined", "in-use"]);
    }
}
